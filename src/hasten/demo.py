"""The demonstration: a small network, trained here on real images, made fast and proved. Uses what a user would type."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hasten.core import folder
from hasten.core.data import View
from hasten.core.report import Report
from hasten.search.watch import Watch, Watcher, nobody
from hasten.verbs import Options, optimize

_TIME = "5m"
_MOST = 20_000  # training images; more would not fit into the time of a demonstration


def demo(
    run: Path,
    *,
    task: str = "mnist5k",
    max_drop: str = "1pt",
    seed: int = 0,
    watcher: Watcher = nobody,
    say: Callable[[str], None] = print,
) -> Report:
    """Trains a small CNN, saves it as a user would have it (`model.pt2`, two `.npz` files), and optimizes those files.

    Args:
        task: "mnist5k" or "fashion_mnist".
        run: folder; the inputs go to `run/inputs`, the run to `run/result`.
        max_drop: as in `optimize`.
        seed: of the training and of the run.
        watcher: is told the progress.
        say: takes a line of text.

    Raises:
        BackendMissing: if the data is not installed; the message names the one command that installs it.
    """
    inputs = run / "inputs"
    if not folder.intact(inputs):
        _make_inputs(inputs, task, seed, say, Watch(watcher=watcher))
    paths = {"model": inputs / "model.pt2", "data": inputs / "data.npz", "prove": inputs / "prove.npz"}
    words = ["hasten", "optimize", str(paths["model"]), "--data", str(paths["data"]), "--prove", str(paths["prove"])]
    command = shlex.join([*words, "--max-drop", max_drop, "--time-limit", _TIME, "--run", str(run / "result")])
    say(f"$ {command}")
    options = Options(seed=seed, time_limit=_TIME, command=command)
    return optimize(paths["model"], paths["data"], paths["prove"], max_drop=max_drop, run=run / "result", options=options, watcher=watcher)


def _make_inputs(inputs: Path, name: str, seed: int, say: Callable[[str], None], watch: Watch) -> None:
    import torch

    from hasten import tasks
    from hasten.load import files
    from hasten.load.program import export_program
    from hasten.tasks import networks
    from hasten.train import Fit, fit

    task = tasks.load(name)
    train = task.train.take(np.arange(min(len(task.train), _MOST)))
    say(f"training a small CNN on {len(train):,} images of {name}")
    start = time.monotonic()
    torch.manual_seed(seed)
    settings = Fit(epochs=12, batch=32, learning_rate=0.01, augmentation="shift", seed=seed)
    watch.stage("train", "training the network to begin with")
    trained = fit(networks.small_cnn(), train, settings=settings, progress=watch.progress).module
    right = _accuracy(trained, task.held_out)
    say(f"trained in {time.monotonic() - start:.0f} s: {right:.1%} of {len(task.held_out):,} held-out images right")
    network = files.from_module(trained, tuple(a[:4] for a in train.inputs))
    with folder.new_folder(inputs) as fresh:
        torch.export.save(export_program(network), fresh / "model.pt2")
        _save(train, fresh / "data.npz")
        _save(task.held_out, fresh / "prove.npz")


def _accuracy(module: object, view: View) -> float:
    import torch

    with torch.inference_mode():
        answers = [module(torch.from_numpy(b.inputs[0])).argmax(1).numpy() for b in view.batches(256)]  # type: ignore[operator]
    return float(np.mean(np.concatenate(answers) == view.labels))


def _save(view: View, file: Path) -> None:
    assert view.labels is not None
    np.savez_compressed(file, x=view.inputs[0], y=view.labels)
