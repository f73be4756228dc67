"""hasten in miniature: the whole flow on one page, with the library's own parts. Read this first; run it: python docs/mini.py

load → score the network as given → try recipes → freeze the order → prove on untouched data → the fastest one that is proved.
Left out here and found in `hasten.search`: the run folder, resuming, the full timing protocol, the ablation, the report.
Shapes: images (n, 1, 28, 28), logits (n, 10), labels (n,).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from hasten import tasks
from hasten.compress import FoldBatchNorm, QuantizeStatic
from hasten.core.data import View
from hasten.core.errors import HastenError
from hasten.core.network import Network
from hasten.core.recipe import Context, Recipe
from hasten.core.runner import Runner
from hasten.engines import Eager, OnnxRuntime, OpenVINO
from hasten.load import files
from hasten.load.lower import lower
from hasten.measure.scores import Accuracy
from hasten.measure.statistics import tango_upper
from hasten.measure.timing import quick
from hasten.tasks.networks import small_cnn
from hasten.train import Fit, fit

MAX_DROP, CONFIDENCE = 0.01, 0.95
SCORE = Accuracy()


def pack(recipe: Recipe, network: Network, context: Context, folder: Path) -> Path:
    """Applies the steps from left to right, lowers the module to a graph where one is needed, and packs the result."""
    for part in recipe.parts:
        if part.takes == "graph":
            network = lower(network)
        if part is not recipe.engine:
            network = part.apply(network, context)  # type: ignore[union-attr]
    folder.mkdir()
    recipe.engine.pack(network, folder)
    return folder


def right(folder: Path, view: View) -> np.ndarray:
    """Which examples the packed network gets right: (n,) of 0 and 1, in its own process."""
    assert view.labels is not None
    with Runner(folder) as runner:
        values = SCORE.per_example(runner.outputs(view.inputs), view.labels)
    assert values is not None
    return values


def latency_ms(folder: Path, view: View) -> float:
    """A quick look at one launch, good for ranking only."""
    with Runner(folder) as runner:
        return quick(runner, view.inputs, [1])[0].p50_ms


def drop_at_most(before: np.ndarray, after: np.ndarray) -> float:
    """The upper bound of the drop in accuracy, from the examples that were lost and won."""
    lost, won = int(np.sum(before > after)), int(np.sum(after > before))
    return tango_upper(lost, won, len(before), confidence=CONFIDENCE)


def optimize(network: Network, recipes: list[Recipe], context: Context, select: View, prove: View) -> str:
    """Ranks the recipes on *select*, freezes their order from safest to fastest, then opens *prove* once."""
    with tempfile.TemporaryDirectory() as name:
        original = pack(Recipe((), Eager()), network, context, Path(name) / "original")
        original_ms, before = latency_ms(original, select), right(original, select)
        trials = []
        for number, recipe in enumerate(recipes):
            try:
                folder = pack(recipe, network, context, Path(name) / str(number))
                drop = float(before.mean() - right(folder, select).mean())
            except HastenError as why:
                print(f"  {recipe}: refused, {why}")
                continue
            trials.append((drop, latency_ms(folder, select), recipe, folder))
        frozen = sorted(trials, key=lambda trial: (trial[0], -trial[1]))
        chosen, fastest_ms = "the original: nothing was proved within the limit", original_ms
        before = right(original, prove)
        for _, ms, recipe, folder in frozen:
            upper = drop_at_most(before, right(folder, prove))
            print(f"  {recipe}: {original_ms / ms:.1f}× faster, drop at most {100 * upper:.2f} points")
            if upper > MAX_DROP:
                break  # fixed-sequence testing: the first failure ends it, so the error rate holds for them all
            if ms < fastest_ms:
                chosen, fastest_ms = str(recipe), ms
    return chosen


def main(epochs: float = 6) -> str:
    """Trains a small CNN on MNIST 5k and makes it fast."""
    data = tasks.load("mnist5k")
    train, select = data.train.take(slice(0, 2500)), data.train.take(slice(2500, 3000))
    torch.manual_seed(0)
    trained = fit(small_cnn(), train, settings=Fit(epochs=epochs)).module
    network = files.from_module(trained, tuple(a[:4] for a in train.inputs))
    recipes = [
        Recipe((), OnnxRuntime()),
        Recipe((FoldBatchNorm(),), OpenVINO()),
        *(Recipe((FoldBatchNorm(), QuantizeStatic()), engine) for engine in (OnnxRuntime(), OpenVINO())),
        Recipe((FoldBatchNorm(), QuantizeStatic(weight_bits=2)), OnnxRuntime()),
        Recipe((QuantizeStatic(),), OnnxRuntime(threads=1)),
    ]
    context = Context(train=train, calibrate=train.take(slice(0, 200)), original=network, profile=OnnxRuntime().profile)
    chosen = optimize(network, recipes, context, select, data.held_out)
    print("chosen:", chosen)
    return chosen


if __name__ == "__main__":
    main()
