"""How much memory a training takes at most, plain and with each of the ways to take less.

    python benchmarks/training_memory.py [--quick] [--json] [--save]

Each row trains two steps in each of two fresh processes. The figure is the peak resident memory of the process beyond what it held
before it began, after a training of the same kind on 8 images, which loads what is loaded once, in MB of 10⁶ bytes. Two networks: ResNet-20
at a batch of 256, whose memory goes to activations, and an MLP of 14 million parameters at a batch of 16, whose memory goes to gradients
and the optimizer's state. `loss` is that of the last step, to see that checkpointing and accumulation train the same.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from torch import nn

from hasten import optim
from hasten.core.data import View
from hasten.tasks.networks import resnet20
from hasten.train import Fit, Precision, Stop, fit

STEPS = 2


def wide(width: int = 2048) -> nn.Module:
    """784 → width → … → width → 10 with three hidden squares: 14.2 million parameters."""
    hidden = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), *hidden, nn.Linear(width, 10))


def adamw(state: torch.dtype) -> Callable[..., torch.optim.Optimizer]:
    """AdamW that keeps its averages in another type."""
    return lambda groups, lr: optim.AdamW(groups, lr=lr, state_dtype=state)


Row = tuple[str, dict[str, Any]]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, list[Row]]] = {
    "ResNet-20, batch 256": (
        resnet20,
        256,
        [
            ("plain", {}),
            ("activations computed again, runs of 3 children", {"precision": Precision(checkpoint=3)}),
            ("activations computed again, each block", {"precision": Precision(checkpoint=1)}),
            ("batch in 8 parts", {"accumulate": 8}),
            ("batch in 8 parts, bfloat16", {"accumulate": 8, "precision": Precision(format="bfloat16")}),
        ],
    ),
    "MLP of 14 million, batch 16": (
        wide,
        16,
        [
            ("plain", {}),
            ("optimizer state in bfloat16", {"optimizer": adamw(torch.bfloat16)}),
            ("optimizer state in int8", {"optimizer": adamw(torch.int8)}),
            ("Lion, state in int8", {"optimizer": lambda groups, lr: optim.Lion(groups, lr=lr, state_dtype=torch.int8)}),
            ("Adafactor", {"optimizer": lambda groups, lr: optim.Adafactor(groups, lr=lr)}),
            ("SGD without momentum", {"optimizer": lambda groups, lr: optim.SGD(groups, lr=lr)}),
        ],
    ),
}


def once(network: str, name: str) -> dict[str, float]:
    """One training in this process: its peak in MB beyond the start, and the last loss."""
    build, batch, rows = NETWORKS[network]
    torch.manual_seed(0)
    module, rng = build(), np.random.default_rng(0)
    view = View(inputs=(rng.random((batch, 1, 28, 28), dtype=np.float32),), labels=rng.integers(0, 10, batch))
    settings: dict[str, Any] = {"batch": batch, "stop": Stop(steps=STEPS), "learning_rate": 1e-4, "warm_up": 0.0, **dict(rows)[name]}
    fit(build(), view.take(slice(0, 8)), settings=Fit(**settings | {"batch": 8}))  # whatever a training loads once
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    loss = fit(module, view, settings=Fit(**settings)).curve[-1][1]
    return {"mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 1e6, "loss": loss}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every row, each in processes of its own."""
    table: list[dict[str, Any]] = []
    for network, (_, _, rows) in NETWORKS.items():
        plain = 0.0
        for name, _ in rows[:2] if options.quick else rows:
            launches = [_launch(network, name) for _ in range(1 if options.quick else 2)]
            peaks = [one["mb"] for one in launches]
            plain = plain or statistics.median(peaks)
            row = {"network": network, "name": name, "mb": round(statistics.median(peaks), 1), "range": [min(peaks), max(peaks)]}
            table.append({**row, "share_of_plain": round(statistics.median(peaks) / plain, 3), "loss": launches[0]["loss"]})
            options.keep({"steps": STEPS, "table": table})
    return {"steps": STEPS, "table": table}


def _launch(network: str, name: str) -> dict[str, float]:
    found = subprocess.run([sys.executable, __file__, "--once", network, name], capture_output=True, text=True, check=False)
    if found.returncode:
        sys.exit(f"{name} failed:\n{found.stderr[-2000:]}")
    return dict(json.loads(found.stdout.splitlines()[-1]))


def show(found: dict[str, Any]) -> None:
    """A line per row."""
    for row in found["table"]:
        (low, high), what = row["range"], f"{row['network']:28} {row['name']:45}"
        print(f"{what} {row['mb']:7.0f} MB ({low:.0f}–{high:.0f})  {row['share_of_plain']:.2f} of plain  loss {row['loss']:.4f}")


if __name__ == "__main__":
    if "--once" in sys.argv:
        print(json.dumps(once(*sys.argv[2:4])))
    else:
        machine.run("training_memory", measure, show)
