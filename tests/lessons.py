"""Small networks and data that training is tested on."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from hasten.core.data import View


def seeded(build, seed=0):
    torch.manual_seed(seed)
    return build().eval()


def dense(classes=3):
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, classes))


def plain(classes=3):
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, classes))


def image():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def points(n=150, seed=0):
    x = draw(n, 6, seed=seed)
    return View(inputs=(x,), labels=x[:, :3].argmax(1))


def pictures(n=150):
    x = draw(n, 1, 8, 8)
    return View(inputs=(x,), labels=np.digitize(x.mean((1, 2, 3)), [-0.05, 0.05]))


def contents(module):
    return {name: value.detach().numpy().tobytes() for name, value in module.state_dict().items()}
