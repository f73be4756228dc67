"""What the training loop costs beside a bare one written by hand, and what others' loops cost: 784-128-64-10, batch 128.

One round is one pass of each loop over random images, in turning order; the ratio of each round is one sample, and the table has their
mean, standard deviation and median. The bare loop has torch's fused optimizer and clips nothing; hasten's always takes the norm of the
whole gradient, and is shown with its clipping off and at its default. With hasten's optimizer the bare loop takes the same steps to the
same bytes, which is checked. Lightning and Keras run as their tutorials have it, each Keras in a process of its own that has made one
pass before; what is not installed is left out.
Run: python benchmarks/loop_overhead.py [--quick] [--processor] [--json] [--save]
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import machine
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from hasten import optim
from hasten.core.data import View
from hasten.tasks.networks import mlp
from hasten.train import Fit, fit

BATCH = 128
SETTINGS = Fit(epochs=1, batch=BATCH, learning_rate=1e-3, schedule="constant", warm_up=0, weight_decay=0, clip=math.inf)


def _network() -> nn.Module:
    torch.manual_seed(0)
    return mlp()


def bare(x: torch.Tensor, y: torch.Tensor, adamw: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW) -> nn.Module:
    """Tensors in memory, a fused optimizer, the loss looked at in every step, as anyone would write it who wants speed."""
    network = _network().train()
    optimizer = adamw(network.parameters(), lr=1e-3, weight_decay=0, fused=True)
    torch.manual_seed(0)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    for index in order[: len(x) - len(x) % BATCH].split(BATCH):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x[index]), y[index])
        loss.backward()
        optimizer.step()
        if not math.isfinite(loss.item()):
            raise RuntimeError("diverged")
    return network


def loader(x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    """The loop of the tutorials: a shuffling DataLoader and torch's default Adam."""
    network = _network().train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for inputs, labels in DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True, drop_last=True):
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), labels).backward()
        optimizer.step()
    return network


def lightning(x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    """The same in a LightningModule, with logger, checkpoints and progress bar off."""
    import lightning

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = _network()

        def training_step(self, batch: Any, _: int) -> Any:
            return F.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    off: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    module = Lit()
    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True, drop_last=True)
    lightning.Trainer(max_epochs=1, accelerator="cpu", **off).fit(module, loader)
    return module


class Keras:
    """`Model.fit` in a process of its own, which takes a pass for each line that it is sent and answers with its seconds."""

    def __init__(self, backend: str, examples: int, *, processor: bool) -> None:
        told = [sys.executable, __file__, "--keras", str(examples), "--processor" if processor else "--wall"]
        surroundings = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        self._child = subprocess.Popen(told, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=surroundings)
        self()  # what is compiled at first is not counted

    def __call__(self) -> float:
        """The seconds of one more pass."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        print(file=self._child.stdin, flush=True)
        answer = self._child.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process with Keras ended with code {self._child.wait()}")
        return float(answer)

    def close(self) -> None:
        """Ends the process."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()


def serve_keras(examples: int, clock: Callable[[], float]) -> None:
    """What the process of a `Keras` does."""
    import keras

    view = images(examples)
    dense = [keras.layers.Dense(width, "relu") for width in (128, 64)]
    model = keras.Sequential([keras.Input((1, 28, 28)), keras.layers.Flatten(), *dense, keras.layers.Dense(10)])
    model.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for _ in sys.stdin:
        began = clock()
        model.fit(view.inputs[0], view.labels, batch_size=BATCH, epochs=1, verbose=0)
        print(clock() - began, flush=True)


def images(examples: int) -> View:
    """Random ones."""
    rng = np.random.default_rng(0)
    return View(inputs=(rng.random((examples, 1, 28, 28), dtype=np.float32),), labels=rng.integers(0, 10, examples))


def timed(loop: Callable[[], object], clock: Callable[[], float]) -> Callable[[], float]:
    """The seconds of a call."""

    def seconds() -> float:
        began = clock()
        loop()
        return clock() - began

    return seconds


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times a pass of each loop, in turning order."""
    examples, rounds = (12_800, 4) if options.quick else (60_000, 12)
    clock = time.process_time if options.processor else time.perf_counter
    if options.processor:
        torch.set_num_threads(1)
    view = images(examples)
    assert view.labels is not None
    x, y = torch.from_numpy(view.inputs[0]), torch.from_numpy(view.labels)
    mine: dict[str, Callable[[], nn.Module]] = {
        "bare": lambda: bare(x, y),
        "hasten": lambda: fit(_network(), view, settings=SETTINGS).module,
        "hasten, clip": lambda: fit(_network(), view, settings=replace(SETTINGS, clip=1.0)).module,
        "DataLoader": lambda: loader(x, y),
    }
    pairs = zip(bare(x, y, optim.AdamW).parameters(), mine["hasten"]().parameters(), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs)
    here = {package: importlib.util.find_spec(package) is not None for package in ("lightning", "keras", "tensorflow")}
    if here["lightning"]:
        mine["Lightning"] = lambda: lightning(x, y)
    loops = {name: timed(loop, clock) for name, loop in mine.items()}
    backends = [backend for backend in ("torch", "tensorflow") if here["keras"] and here.get(backend, True)]
    others = {f"Keras, {backend}": Keras(backend, examples, processor=options.processor) for backend in backends}
    loops |= others
    took: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds):
        for name in list(loops)[number % len(loops) :] + list(loops)[: number % len(loops)]:
            took[name].append(loops[name]())
    for child in others.values():
        child.close()
    rows = [_row(name, seconds, took["bare"]) for name, seconds in took.items()]
    settings = {"examples": examples, "batch": BATCH, "rounds": rounds, "threads": torch.get_num_threads()}
    return {**settings, "clock": "processor" if options.processor else "wall", "same_bytes": same, "loops": rows}


def _row(name: str, seconds: list[float], bare: list[float]) -> dict[str, Any]:
    ratios = [s / b for s, b in zip(seconds, bare, strict=True)]
    spread = {"ratio": statistics.fmean(ratios), "ratio_sd": statistics.stdev(ratios), "ratio_median": statistics.median(ratios)}
    return {"name": name, "pass_s": statistics.median(seconds), **spread}


def show(found: dict[str, Any]) -> None:
    """A line per loop."""
    print(f"{found['examples']} examples, batch {BATCH}, {found['rounds']} rounds, {found['threads']} threads, {found['clock']} time")
    print(f"same bytes as the bare loop with hasten's optimizer: {found['same_bytes']}")
    for row in found["loops"]:
        ratio = f"{row['ratio']:.3f} ± {row['ratio_sd']:.3f} of the bare loop's time (median {row['ratio_median']:.3f})"
        print(f"{row['name']:17} {row['pass_s']:7.3f} s a pass, {ratio}")


if __name__ == "__main__":
    if "--keras" in sys.argv:
        torch.set_num_threads(1 if "--processor" in sys.argv else torch.get_num_threads())
        serve_keras(int(sys.argv[2]), time.process_time if "--processor" in sys.argv else time.perf_counter)
        sys.exit(0)
    words = "processor time on one thread, for a machine that others use"
    machine.run("loop_overhead", measure, show, lambda parser: parser.add_argument("--processor", action="store_true", help=words))
