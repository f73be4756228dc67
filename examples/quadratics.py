"""Descent on ½(x² + 25 y²) by several optimizers, their losses and effective steps side by side in a picture.

The network is a point θ = (x, y); it gives (x, 5y), and its target is (0, 0), so the loss is the quadratic up to a factor.
The effective step of an adaptive method is how far a parameter moved over its gradient: α/(√v + ε) and its like.
Run: python examples/quadratics.py quadratics.html
"""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hasten import Fit, Trainer
from hasten.core.data import View
from hasten.report import curves
from hasten.train import Stop

OPTIMIZERS = {
    "gradient descent": (torch.optim.SGD, 0.03),
    "momentum": (lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9), 0.005),
    "AdaGrad": (torch.optim.Adagrad, 0.5),
    "RMSprop": (torch.optim.RMSprop, 0.02),
    "Adam": (torch.optim.Adam, 0.1),
    "NAdam": (torch.optim.NAdam, 0.1),
}


class Bowl(nn.Module):
    """θ = (x, y) → (x, 5y); its input says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.tensor([4.0, 1.0]))

    def forward(self, nothing: torch.Tensor) -> torch.Tensor:
        """(batch, 2)."""
        return (self.place * torch.tensor([1.0, 5.0])).expand(len(nothing), 2)


def main(page: Path | None = None, steps: int = 200) -> dict[str, float]:
    """The last loss of each; writes the picture where a file is named."""
    view = View(inputs=(np.zeros((2, 1), dtype=np.float32),), labels=np.zeros((2, 2), dtype=np.float32))
    runs: dict[str, list[object]] = {}
    moved: dict[str, list[tuple[float, float | None]]] = {}
    for name, (optimizer, rate) in OPTIMIZERS.items():
        seen: list[object] = []
        places: list[torch.Tensor] = [Bowl().place.detach()]

        def note(bowl: nn.Module, *_: int, places: list[torch.Tensor] = places) -> None:
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
        fitted = Trainer(settings=settings, watch=seen.append, after_step=note).fit(Bowl(), view)
        runs[name] = seen
        heights = [place[1].item() for place in places]
        moved[name] = [(i, abs((b - a) / (25 * a))) for i, (a, b) in enumerate(itertools.pairwise(heights), start=1) if a]
        print(f"{name:17} rate {rate:<6} loss {fitted.curve[0][1]:8.3f} → {fitted.curve[-1][1]:.2e} ({fitted.trend})")
    if page is not None:
        text = curves.page(runs, {"loss": "mean of x² and 25 y²", "start": "(4, 1)"})
        picture = f"<h2>Effective step of y: its move over its gradient</h2>{curves.svg(moved)}<table>"
        page.write_text(text.replace("<table>", picture, 1))
    return {name: records[-1].loss for name, records in runs.items()}  # type: ignore[attr-defined]


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
