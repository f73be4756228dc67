"""What each way of making a network smaller costs and buys on real images, beside its controls.

    python benchmarks/compression.py [--quick] [--json] [--save] [--only NAME] [--seeds N]

Fashion-MNIST, 20,000 training and 10,000 held-out images. For each network and seed: the original is trained (cached), each
recipe is applied and run in ONNX Runtime and OpenVINO, and all are timed in the same rounds of fresh launches, batch 1. Accuracy is
that of the 10,000 in the engine itself; no choice looks at it. Controls: the original trained further for as long as the
recipes train, a smaller network of the same kind trained from scratch for as long as the original and the recipe together,
and structured pruning by chance. `--quick` takes the MLP on 2,000 images.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from reference_networks import Reference, reference
from torch import nn

from hasten.compress import (
    FactorizeConv,
    FactorizeLinear,
    FoldBatchNorm,
    PackCodebooks,
    PruneStructure,
    PruneWeights,
    QuantizeStatic,
    ShareWeights,
)
from hasten.core.data import View
from hasten.core.errors import Unsupported
from hasten.core.network import Network
from hasten.core.recipe import Context, Engine, Step
from hasten.core.runner import Runner
from hasten.engines import Eager, OnnxRuntime, OpenVINO
from hasten.load.files import from_module
from hasten.load.lower import lower
from hasten.measure import timing
from hasten.tasks import networks
from hasten.train import FineTune, Fit, fit

FIT = Fit(epochs=5, batch=64, learning_rate=0.01)
NETWORKS: dict[str, tuple[Reference, Callable[[], nn.Module]]] = {
    "mlp": (
        Reference(network="mlp", task="fashion_mnist", examples=20_000, goal=0.86, settings=Fit(epochs=20, learning_rate=0.003)),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10)),
    ),
    "lstm": (
        Reference(network="lstm", task="fashion_mnist", examples=20_000, goal=0.85, settings=Fit(epochs=8, batch=64, learning_rate=0.003)),
        lambda: networks.lstm(hidden=64),
    ),
    "mobilenet": (
        Reference(network="mobilenet", task="fashion_mnist", examples=20_000, goal=0.89, settings=FIT),
        lambda: networks.mobilenet(width=8),
    ),
    "resnet20": (
        Reference(network="resnet20", task="fashion_mnist", examples=20_000, goal=0.90, settings=FIT),
        lambda: networks.resnet18(width=8),
    ),
    "resnet18": (
        Reference(network="resnet18", task="fashion_mnist", examples=20_000, goal=0.91, settings=FIT),
        lambda: networks.resnet18(width=16),
    ),
}
TUNE = FineTune(epochs=3.0)
PRUNED = (FoldBatchNorm(), PruneStructure(ratio=0.5), TUNE)
RECIPES: dict[str, tuple[Step, ...]] = {
    "int8": (QuantizeStatic(),),
    "half the units": PRUNED,
    "half the units, by chance": (FoldBatchNorm(), PruneStructure(ratio=0.5, saliency="random"), TUNE),
    "half the units, by sensitivity": (FoldBatchNorm(), PruneStructure(ratio=0.5, scope="sensitivity"), TUNE),
    "a quarter of the units": (FoldBatchNorm(), PruneStructure(ratio=0.75), TUNE),
    "half the units, int8": (*PRUNED, QuantizeStatic()),
    "a quarter of the units, int8": (FoldBatchNorm(), PruneStructure(ratio=0.75), TUNE, QuantizeStatic()),
    "thin factors": (FoldBatchNorm(), FactorizeConv(), FactorizeLinear(), TUNE),
    "90 % zeros": (FoldBatchNorm(), PruneWeights(amount=0.9, scope="global", schedule="gradual", epochs=3)),
    "16 values": (FoldBatchNorm(), ShareWeights(bits=4), PackCodebooks()),
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All networks and seeds."""
    wanted = options.only or (["mlp"] if options.quick else list(NETWORKS))
    rows: list[dict[str, Any]] = []
    for name in wanted:
        for seed in range(1 if options.quick else options.seeds):
            rows += _one(name, seed, quick=options.quick)
            options.keep(_summed(rows))
    return _summed(rows)


def _one(name: str, seed: int, *, quick: bool) -> list[dict[str, Any]]:
    _KEPT.clear()
    made, smaller = NETWORKS[name]
    made = replace(made, settings=replace(made.settings, seed=seed))
    if quick:
        made = replace(made, examples=2_000)
    trained, data, training = reference(made)
    original = from_module(trained, (data.train.inputs[0][:4],))
    context = Context(train=data.train, calibrate=data.train.take(slice(0, 500)), original=original, seed=seed)
    longer = replace(made.settings, epochs=made.settings.epochs + TUNE.epochs)
    torch.manual_seed(seed)
    candidates: dict[str, Callable[[], Network]] = {
        "as given": lambda: original,
        "control: trained further": lambda: TUNE.apply(original, context),
        "control: small from scratch": lambda: original.with_body(fit(smaller().eval(), data.train, settings=longer).module),
    }
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folders: dict[tuple[str, str], Path] = {}

        def pack(words: str, network: Network, engine: Engine) -> None:
            folder = Path(place) / str(len(folders))
            folder.mkdir()
            engine.pack(lower(network) if engine.takes == "graph" else network, folder)
            folders[words, type(engine).__name__] = folder

        pack("as given", original, Eager())
        for words, make in candidates.items():
            network = make()
            for engine in (OnnxRuntime(), OpenVINO()):
                pack(words, network, engine)
        for words, steps in RECIPES.items():
            for engine in (OnnxRuntime(packed=words in ("90 % zeros", "16 values")), OpenVINO()):
                try:
                    pack(words, _applied(steps, original, replace(context, profile=engine.profile)), engine)
                except Unsupported as why:
                    rows.append({"network": name, "seed": seed, "recipe": words, "engine": type(engine).__name__, "reason": str(why)[:200]})
        rows += _timed(folders, data.held_out, quick=quick)
    told = {"network": name, "seed": seed, "training_seconds": training["seconds"]}
    return [told | row for row in rows]


_KEPT: dict[str, Network] = {}


def _applied(steps: tuple[Step, ...], network: Network, context: Context) -> Network:
    """What the steps make; beginnings that recipes share are made once. A step that finds nothing to do is left out."""
    done, changed, reason = "", False, ""
    for step in steps:
        now = f"{done}{step} {context.seed} {context.profile if step.reads_profile else ''};"
        try:
            if now not in _KEPT:
                _KEPT[now] = step.apply(lower(network) if step.takes == "graph" else network, context)
        except Unsupported as why:
            reason = str(why)
            continue
        done, network = now, _KEPT[now]
        changed = changed or not (step.lossless or step.aims == {"score"})
    if not changed:
        raise Unsupported(reason)
    return network


def _timed(folders: dict[tuple[str, str], Path], held_out: View, *, quick: bool) -> list[dict[str, Any]]:
    protocol = timing.Protocol(fewest=2, most=2, block_ms=10, blocks=2) if quick else timing.Protocol(fewest=5, most=5, longest_s=300)
    timed = timing.race([timing.Contestant(folder=f) for f in folders.values()], held_out.inputs, (1,), protocol=protocol)
    medians = np.exp(np.log(timed.medians_ms[:, :, 0]).mean(axis=0))
    rows = []
    for (words, engine), folder, ms in zip(folders, folders.values(), medians, strict=True):
        with Runner(folder) as runner:
            right = runner.outputs(held_out.inputs)[0].argmax(1) == held_out.labels
        size = sum(f.stat().st_size for f in folder.iterdir())
        rows.append({"recipe": words, "engine": engine, "accuracy": float(right.mean()), "ms": float(ms), "size_bytes": size})
    return rows


def _summed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For each network and recipe, in its faster engine: mean and standard deviation over seeds."""
    table = []
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        if "ms" in row and row["engine"] != "Eager":
            groups.setdefault((row["network"], row["recipe"]), {}).setdefault(row["engine"], []).append(row)
    eager = {r["network"]: [x["ms"] for x in rows if x.get("engine") == "Eager" and x["network"] == r["network"]] for r in rows}
    for (network, recipe), engines in groups.items():
        engine, found = min(engines.items(), key=lambda item: np.mean([r["ms"] for r in item[1]]))
        accuracy = [r["accuracy"] for r in found]
        table.append(
            {
                "network": network,
                "recipe": recipe,
                "engine": engine,
                "seeds": len(found),
                "accuracy": float(np.mean(accuracy)),
                "accuracy_std": float(np.std(accuracy, ddof=1)) if len(found) > 1 else None,
                "ms": float(np.mean([r["ms"] for r in found])),
                "over_eager": float(np.mean(eager[network]) / np.mean([r["ms"] for r in found])),
                "size_bytes": int(np.mean([r["size_bytes"] for r in found])),
            }
        )
    return {"table": table, "rows": rows}


def show(found: dict[str, Any]) -> None:
    """Prints one line per network and recipe."""
    print(f"{'network':10} {'recipe':32} {'engine':12} {'accuracy':>16} {'ms':>8} {'over eager':>10} {'kB':>8}")
    for r in found["table"]:
        spread = f" ± {r['accuracy_std']:.4f}" if r["accuracy_std"] is not None else ""
        accuracy = f"{r['accuracy']:.4f}{spread}"
        figures = f"{r['ms']:8.3f} {r['over_eager']:9.1f}× {r['size_bytes'] / 1e3:8.0f}"
        print(f"{r['network']:10} {r['recipe']:32} {r['engine']:12} {accuracy:>16} {figures}")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", choices=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=3)


if __name__ == "__main__":
    machine.run("compression", measure, show, _options)
