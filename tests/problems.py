"""A small real problem, trained once: digits, a little CNN, its files as a user would have them. And a search cut short for tests."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hasten import presets, tasks
from hasten.compress import FoldBatchNorm, QuantizeStatic
from hasten.core.network import Kind
from hasten.core.store import Store
from hasten.engines import Eager, OnnxRuntime
from hasten.load import files
from hasten.load.program import export_program
from hasten.measure import timing
from hasten.search.catalogue import Catalogue
from hasten.tasks import TaskData
from hasten.train import Fit, fit


@functools.cache
def data() -> TaskData:
    return tasks.load("digits")


NAMES = tuple(f"digit {k}" for k in range(10))


def with_names() -> list[dict[str, np.ndarray]]:
    """The training and the held-out part, their arrays and classes by name."""
    return [{"picture": view.inputs[0], "label": np.array(NAMES)[view.labels]} for view in (data().train, data().held_out)]


@functools.cache
def trained() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    return fit(module, data().train, settings=Fit(epochs=6, batch=32)).module


def write_files(folder: Path) -> tuple[Path, Path, Path]:
    """model.pt2, data.npz, prove.npz in `folder`."""
    network = files.from_module(trained(), (data().train.inputs[0][:4],))
    torch.export.save(export_program(network), folder / "model.pt2")
    for name, view in (("data", data().train), ("prove", data().held_out)):
        np.savez(folder / f"{name}.npz", x=view.inputs[0], y=view.labels)
    return folder / "model.pt2", folder / "data.npz", folder / "prove.npz"


def lean(kind: Kind, *_: object, **__: object) -> Catalogue:
    """One engine beside the given one, two steps; any effort."""
    given = Eager() if kind == "module" else OnnxRuntime(threads=1)
    return Catalogue(as_given=given, engines=(OnnxRuntime(),), steps=(FoldBatchNorm, QuantizeStatic))


def cut_short() -> None:
    """Fewer methods and two rounds of launches: what is tested is the flow, not how good the result or the timing is."""
    presets.default = lean
    timing.FULL = timing.Protocol(fewest=2, most=2, block_ms=5, blocks=2)
    timing.RANKING = timing.FULL


def killed_until_done(inputs: tuple[Path, ...], run: Path, kills: int) -> list[list[dict[str, object]]]:
    """Starts the run again and again, each time killed a little later; the finished trials after each kill."""
    command = [sys.executable, __file__, *map(str, inputs), str(run)]
    seen = []
    rng = np.random.default_rng(0)
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=float(rng.uniform(1.5, 9)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if (run / "run.sqlite").exists():
            trials = Store(run / "run.sqlite").trials()
            seen.append([t.to_json() for t in trials if t.state != "running"])
    subprocess.run(command, check=True, capture_output=True)
    return seen


if __name__ == "__main__":  # the kill tests run this in a process of its own
    from hasten import verbs

    cut_short()
    model, train, prove, run = map(Path, sys.argv[1:5])
    print(verbs.optimize(model, train, prove, max_drop=0.05, run=run, options=verbs.Options(trials=8)).verdict)
