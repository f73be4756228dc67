"""Linear regression on four points by full-batch gradient descent; what does it say of x = 5?

The points lie on y = x. One feature and a bias are two numbers to learn, no more. Run: python examples/four_points.py
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from hasten import Fit, Trainer
from hasten.core.data import View
from hasten.train import Stop


def main() -> float:
    """The prediction for x = 5."""
    x = np.array([[1], [2], [3], [4]], dtype=np.float32)
    y = np.array([1, 2, 3, 4], dtype=np.float32)
    line = nn.Linear(1, 1)
    nn.init.zeros_(line.weight)
    nn.init.zeros_(line.bias)
    settings = Fit(
        loss="values",
        batch=None,  # all four at once
        epochs=1000,
        optimizer=torch.optim.SGD,
        learning_rate=0.1,
        schedule="constant",
        warm_up=0,
        weight_decay=0,
        clip=math.inf,
        stop=Stop(loss=1e-8),
    )
    fitted = Trainer(settings=settings).fit(line, View(inputs=(x,), labels=y))
    predicted: float = fitted.module(torch.tensor([[5.0]])).item()
    weight, bias = (p.item() for p in fitted.module.parameters())
    print(f"after {len(fitted.curve)} steps ({fitted.ended}): y = {weight:.4f} x + {bias:.4f}; at x = 5: {predicted:.4f}")
    return predicted


if __name__ == "__main__":
    main()
