"""The training loop and FineTune: exact, repeatable, and nobody else's network is written on."""

from __future__ import annotations

import copy
import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hasten.core.data import View
from hasten.core.errors import DataRefused, Unsupported, UsageError
from hasten.core.network import Network
from hasten.core.recipe import Context, Step, describe, part_from_json, part_to_json
from hasten.train import Diverged, FineTune, Fit, fit
from hasten.train.augment import shift


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


def _seeded(build, seed=0):
    torch.manual_seed(seed)
    return build().eval()


def _dense(classes=3):
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, classes))


def _image():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


def _per_pixel():
    return nn.Conv2d(1, 3, 3, padding=1)


def _draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _points(n=150):
    x = _draw(n, 6)
    return View(inputs=(x,), labels=x[:, :3].argmax(1))


def _pictures(n=150):
    x = _draw(n, 1, 8, 8)
    return View(inputs=(x,), labels=np.digitize(x.mean((1, 2, 3)), [-0.05, 0.05]))


def _words(n=150):
    x = np.random.default_rng(0).integers(0, 12, (n, 5))
    return View(inputs=(x,), labels=np.digitize(x.mean(1), [4.5, 6.5]))


def _line(n=150):
    x = _draw(n, 6)
    return View(inputs=(x,), labels=1e4 * (x[:, 0] - 2 * x[:, 1]).astype(np.float64))


CASES = {
    "classes": (_dense, _points(), Fit(epochs=6, batch=32, learning_rate=0.01)),
    "classes, sgd, smooth": (
        _dense,
        _points(),
        Fit(epochs=6, batch=32, optimizer="sgd", learning_rate=0.1, label_smoothing=0.1, schedule="cosine"),
    ),
    "probabilities": (
        lambda: nn.Sequential(_dense(), nn.Softmax(1)),
        _points(),
        Fit(epochs=6, batch=32, learning_rate=0.01, schedule="constant"),
    ),
    "images, shifted": (_image, _pictures(), Fit(epochs=6, batch=32, learning_rate=0.01, augmentation="shift")),
    "classes of pixels": (
        _per_pixel,
        View(inputs=(x := _draw(40, 1, 8, 8),), labels=np.digitize(x[:, 0], [-0.5, 0.5])),
        Fit(epochs=6, batch=8, learning_rate=0.05),
    ),
    "tokens": (Tokens, _words(), Fit(epochs=6, batch=32, learning_rate=0.03)),
    "values": (lambda: _dense(1), _line(), Fit(loss="values", epochs=6, batch=32, learning_rate=0.01)),
    "original": (Several, View(inputs=(_draw(150, 6), _draw(150, 5))), Fit(loss="original", epochs=6, batch=32, learning_rate=0.03)),
    "classes, distilled": (_dense, _points(), Fit(epochs=6, batch=32, learning_rate=0.01, distil=0.5)),
    "values, distilled": (
        lambda: _dense(1),
        _line(),
        Fit(loss="values", epochs=6, batch=32, learning_rate=0.01, distil=0.5),
    ),
    "shifted, distilled": (_image, _pictures(), Fit(epochs=6, batch=32, learning_rate=0.01, distil=1.0, augmentation="shift")),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(", ", "-"))
def case(request):
    build, view, settings = CASES[request.param]
    teacher = _seeded(build, 1) if settings.needs_teacher else None
    return _seeded(build), view, settings, teacher


def _bytes(module):
    return {name: value.numpy().tobytes() for name, value in module.state_dict().items()}


def test_laws_of_fit(case):
    module, view, settings, teacher = case
    before, taught = _bytes(module), _bytes(teacher) if teacher else None
    state = torch.get_rng_state()
    fitted = fit(module, view, settings=settings, teacher=teacher)
    assert torch.equal(torch.get_rng_state(), state), "the global random state is restored"
    assert _bytes(module) == before, "the user's network is as it was"
    assert all(p.grad is None for p in [*module.parameters(), *fitted.module.parameters()])
    assert not module.training
    assert not fitted.module.training
    assert teacher is None or (_bytes(teacher) == taught and not teacher.training)
    torch.manual_seed(99)
    again = fit(module, view, settings=settings, teacher=teacher)
    assert _bytes(again.module) == _bytes(fitted.module), "same seed, same bytes"
    assert again.curve == fitted.curve
    other = fit(module, view, settings=replace(settings, seed=1), teacher=teacher)
    assert _bytes(other.module) != _bytes(fitted.module), "the seed matters"
    losses = [loss for _, loss in fitted.curve]
    assert [step for step, _ in fitted.curve] == list(range(1, fitted.steps + 1))
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5]), "the loss falls"
