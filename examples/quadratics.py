"""Descent on ½(x² + 25 y²) by every optimizer of hasten, their losses side by side in pictures, and effective steps.

The network is a point θ = (x, y); it gives (x, 5y), and its target is (0, 0), so the loss is the quadratic up to a factor. The
point is a matrix of one row, for rules that look at matrices. The effective step of an adaptive method is how far a parameter
moved over its gradient: α/(√v + ε) and its like.
Run: python examples/quadratics.py quadratics.html
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hasten import Fit, Trainer, optim
from hasten.core.data import View
from hasten.report import curves
from hasten.train import Stop

Made = Callable[..., torch.optim.Optimizer]
ADAPTIVE = "Divided by the size of the gradients"
FAMILIES: dict[str, dict[str, tuple[Made, float]]] = {
    "Along the gradient": {
        "gradient descent": (optim.SGD, 0.03),
        "heavy ball": (lambda groups, lr: optim.SGD(groups, lr=lr, momentum=0.9), 0.005),
        "Nesterov": (lambda groups, lr: optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True), 0.005),
        "averaged momentum": (optim.Momentum, 0.05),
        "Schedule-Free SGD": (optim.ScheduleFreeSGD, 0.05),
        "SAM": (lambda groups, lr: optim.SAM(optim.SGD(groups, lr=lr)), 0.03),
    },
    ADAPTIVE: {
        "AdaGrad": (optim.Adagrad, 0.5),
        "RMSprop": (optim.RMSprop, 0.02),
        "Adam": (optim.Adam, 0.1),
        "AdamW": (optim.AdamW, 0.1),
        "NAdam": (optim.NAdam, 0.1),
        "Schedule-Free AdamW": (optim.ScheduleFreeAdamW, 0.2),
    },
    "Other sizes": {
        "Lion": (optim.Lion, 0.02),
        "Prodigy": (lambda groups, lr: optim.Prodigy(groups, lr=lr, d0=0.01), 1.0),
        "Adafactor": (optim.Adafactor, 0.1),
        "Muon": (optim.Muon, 0.05),
        "SOAP": (optim.SOAP, 0.1),
    },
}


class Bowl(nn.Module):
    """θ = (x, y) → (x, 5y); its input says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.tensor([[4.0, 1.0]]))

    def forward(self, nothing: torch.Tensor) -> torch.Tensor:
        """(batch, 2)."""
        return (self.place * torch.tensor([1.0, 5.0])).expand(len(nothing), 2)


def descent(optimizer: Made, rate: float, steps: int) -> tuple[list[Any], list[tuple[float, float | None]]]:
    """The record of each step, and how far y moved over its gradient."""
    view = View(inputs=(np.zeros((2, 1), dtype=np.float32),), labels=np.zeros((2, 2), dtype=np.float32))
    seen: list[Any] = []
    places = [Bowl().place.detach()]

    def note(bowl: nn.Module, *_: int) -> None:
        places.append(next(bowl.parameters()).detach().clone())

    settings = Fit(
        loss="values",
        batch=None,
        optimizer=optimizer,
        learning_rate=rate,
        schedule="constant",
        warm_up=0,
        clip=math.inf,
        weight_decay=0,
        stop=Stop(steps=steps),
    )
    Trainer(settings=settings, watch=seen.append, after_step=note).fit(Bowl(), view)
    heights = [place[0, 1].item() for place in places]
    return seen, [(i, abs((b - a) / (25 * a))) for i, (a, b) in enumerate(itertools.pairwise(heights), start=1) if a]


def main(page: Path | None = None, steps: int = 200) -> dict[str, float]:
    """The last loss of each; writes a picture of each family, and the effective steps, where a file is named."""
    losses, drawn = {}, ""
    for family, members in FAMILIES.items():
        runs: dict[str, list[Any]] = {}
        moved: dict[str, list[tuple[float, float | None]]] = {}
        for name, (optimizer, rate) in members.items():
            runs[name], moved[name] = descent(optimizer, rate, steps)
            losses[name] = runs[name][-1].loss
            print(f"{name:19} rate {rate:<6} loss {runs[name][0].loss:8.3f} → {losses[name]:.2e}")
        path = curves.svg({name: [(r.step, r.loss) for r in records] for name, records in runs.items()})
        drawn += f"<h2>{family}: loss of each step</h2>{path}"
        if family == ADAPTIVE:
            drawn += f"<h2>{family}: effective step of y, its move over its gradient</h2>{curves.svg(moved)}"
    if page is not None:
        page.write_text(f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Optimizers on a bowl</title>{drawn}</html>\n')
    return losses


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
