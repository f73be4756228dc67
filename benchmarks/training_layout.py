"""What the layout of a network is worth in training: seconds of a step with channels together over those with channels apart.

    python benchmarks/training_layout.py [--quick] [--json] [--save]

Forwards, backwards and an AdamW step on 64 random 28 × 28 images, the two layouts in turns, `ROUNDS` times; each layout's network has
the same weights. The ratio is the geometric mean over the rounds with its 95 % t-interval; below 1 channels together are faster.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import machine
import numpy as np
import torch
from torch import nn

from hasten.measure import statistics
from hasten.tasks import networks

BATCH, ROUNDS, STEPS = 64, 10, 3
NETWORKS = {
    "small CNN": networks.small_cnn,
    "ResNet-20": networks.resnet20,
    "ResNet-20, half as wide": lambda: networks.resnet20(width=8),
    "ResNet-18, a quarter as wide": lambda: networks.resnet18(width=16),
    "ResNet-18": networks.resnet18,
    "MobileNet-like": networks.mobilenet,
    "MobileNet-like, half as wide": lambda: networks.mobilenet(width=8),
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All networks."""
    rows = []
    for name, make in list(NETWORKS.items())[: 2 if options.quick else None]:
        torch.manual_seed(0)
        module, images, labels = make().train(), torch.randn(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))
        both = [_Step(copy.deepcopy(module), images, labels, layout) for layout in (torch.contiguous_format, torch.channels_last)]
        for step in both:
            step.seconds()  # the first ones warm up
        seconds = np.array([[step.seconds() for step in both] for _ in range(2 if options.quick else ROUNDS)])
        ratio = statistics.ratio_interval(np.log(seconds[:, 1] / seconds[:, 0]))
        rows.append({"network": name, "apart_ms": float(np.median(seconds[:, 0])) * 1e3, "ratio": tuple(ratio)})
    return {"batch": BATCH, "rounds": ROUNDS, "threads": torch.get_num_threads(), "rows": rows}


class _Step:
    def __init__(self, module: nn.Module, images: torch.Tensor, labels: torch.Tensor, layout: torch.memory_format) -> None:
        self.module, self.labels = module.to(memory_format=layout), labels  # type: ignore[call-overload]
        self.images, self.optimizer = images.contiguous(memory_format=layout), torch.optim.AdamW(module.parameters(), fused=True)

    def seconds(self) -> float:
        """Of one step, the mean of a few."""
        begin = time.perf_counter()
        for _ in range(STEPS):
            self.optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(self.module(self.images), self.labels))
            self.optimizer.step()
        return (time.perf_counter() - begin) / STEPS


def show(found: dict[str, Any]) -> None:
    """One line per network."""
    for row in found["rows"]:
        value, low, high = row["ratio"]
        print(f"{row['network']:30} {row['apart_ms']:9.1f} ms apart; together {value:.2f} ({low:.2f}–{high:.2f}) of that")


if __name__ == "__main__":
    machine.run("training_layout", measure, show)
