"""What the training loop costs beside a bare one written by hand, and what a DataLoader loop costs: 784-128-64-10, batch 128.

One round is one pass of each loop over random images, in turning order; the ratio of each round is one sample. The bare loop has torch's
fused optimizer and clips nothing; hasten's always takes the norm of the whole gradient, and is shown with its clipping off and at
its default. With hasten's optimizer the bare loop takes the same steps to the same bytes, which is checked.
Run: python benchmarks/loop_overhead.py [--quick] [--processor] [--json] [--save]
"""

from __future__ import annotations

import argparse
import math
import statistics
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


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times a pass of each loop, in turning order."""
    examples, rounds = (12_800, 8) if options.quick else (60_000, 8)
    clock = time.process_time if options.processor else time.perf_counter
    if options.processor:
        torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    view = View(inputs=(rng.random((examples, 1, 28, 28), dtype=np.float32),), labels=rng.integers(0, 10, examples))
    x, y = torch.from_numpy(view.inputs[0]), torch.from_numpy(view.labels)
    loops: dict[str, Callable[[], nn.Module]] = {
        "bare": lambda: bare(x, y),
        "hasten": lambda: fit(_network(), view, settings=SETTINGS).module,
        "hasten, clip": lambda: fit(_network(), view, settings=replace(SETTINGS, clip=1.0)).module,
        "DataLoader": lambda: loader(x, y),
    }
    pairs = zip(bare(x, y, optim.AdamW).parameters(), loops["hasten"]().parameters(), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs)
    took: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds):
        for name in list(loops)[number % len(loops) :] + list(loops)[: number % len(loops)]:
            began = clock()
            loops[name]()
            took[name].append(clock() - began)
    rows = []
    for name, seconds in took.items():
        ratios = [s / b for s, b in zip(seconds, took["bare"], strict=True)]
        spread = statistics.stdev(ratios)
        rows.append({"name": name, "pass_s": statistics.median(seconds), "ratio": statistics.fmean(ratios), "ratio_sd": spread})
    settings = {"examples": examples, "batch": BATCH, "rounds": rounds, "threads": torch.get_num_threads()}
    return {**settings, "clock": "processor" if options.processor else "wall", "same_bytes": same, "loops": rows}


def show(found: dict[str, Any]) -> None:
    """A line per loop."""
    print(f"{found['examples']} examples, batch {BATCH}, {found['rounds']} rounds, {found['threads']} threads, {found['clock']} time")
    print(f"same bytes as the bare loop with hasten's optimizer: {found['same_bytes']}")
    for row in found["loops"]:
        print(f"{row['name']:12} {row['pass_s']:7.3f} s a pass, {row['ratio']:.3f} ± {row['ratio_sd']:.3f} of the bare loop's time")


if __name__ == "__main__":
    words = "processor time on one thread, for a machine that others use"
    machine.run("loop_overhead", measure, show, lambda parser: parser.add_argument("--processor", action="store_true", help=words))
