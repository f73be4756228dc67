"""Small networks and data that training is tested on."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from hasten.core.data import View


class Tokens(nn.Module):
    """Integers in, class scores out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens).mean(1))


class Several(nn.Module):
    """Two inputs; two outputs of very different size and one of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(5, 2)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        left = self.left(a)
        return left, 100 * self.right(b), left.argmax(1)


def seeded(build, seed=0):
    torch.manual_seed(seed)
    return build().eval()


def dense(classes=3):
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, classes))


def plain(classes=3):
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, classes))


def image():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))


def per_pixel():
    return nn.Conv2d(1, 3, 3, padding=1)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def points(n=150, seed=0):
    x = draw(n, 6, seed=seed)
    return View(inputs=(x,), labels=x[:, :3].argmax(1))


def pictures(n=150):
    x = draw(n, 1, 8, 8)
    return View(inputs=(x,), labels=np.digitize(x.mean((1, 2, 3)), [-0.05, 0.05]))


def sentences(n=150):
    x = np.random.default_rng(0).integers(0, 12, (n, 5))
    return View(inputs=(x,), labels=np.digitize(x.mean(1), [4.5, 6.5]))


def line(n=150):
    x = draw(n, 6)
    return View(inputs=(x,), labels=x[:, 0] - 2.0 * x[:, 1])


def contents(module):
    return {name: value.detach().numpy().tobytes() for name, value in module.state_dict().items()}
