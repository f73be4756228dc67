"""What the training loop refuses, and in which words."""

from __future__ import annotations

import math

import numpy as np
import pytest
from torch import nn

from hasten.core.data import View
from hasten.core.errors import DataRefused, Unsupported, UsageError
from hasten.train import Fit, fit
from lessons import draw, line, points

LINEAR = nn.Linear(6, 3)
REFUSALS = [
    (lambda: fit(LINEAR, points(1), settings=Fit()), DataRefused, "at least 2 examples, got 1"),
    (lambda: fit(LINEAR, View(inputs=(draw(9, 6),)), settings=Fit()), DataRefused, "'classes' needs labels, got none"),
    (lambda: fit(LINEAR, line(), settings=Fit()), DataRefused, "needs integer labels, got float32"),
    (lambda: fit(nn.Linear(6, 2), points(), settings=Fit()), DataRefused, r"must lie in 0 … 1, got 0 … 2"),
    (
        lambda: fit(LINEAR, View(inputs=(draw(9, 6),), labels=np.zeros((9, 2), int)), settings=Fit()),
        DataRefused,
        "without the classes' axis, got labels \\(9, 2\\) and outputs \\('n', 3\\)",
    ),
    (lambda: fit(nn.Linear(6, 1), points(), settings=Fit()), Unsupported, "one output per class, got 1"),
    (lambda: fit(LINEAR, line(), settings=Fit(loss="values")), DataRefused, r"as many values as the outputs \(128, 3\)"),
    (lambda: fit(LINEAR, points(), settings=Fit(loss="original")), UsageError, "needs a teacher, got none"),
    (lambda: fit(LINEAR, points(), settings=Fit(), teacher=LINEAR), UsageError, "no use of the teacher; set distil above 0"),
    (
        lambda: fit(LINEAR, points(), settings=Fit(distil=0.5), teacher=nn.Linear(6, 4)),
        UsageError,
        r"of the network's shapes \[\(128, 3\)\], got \[\(128, 4\)\]",
    ),
    (lambda: fit(LINEAR, points(), settings=Fit(augmentation="shift")), UsageError, r"shift needs images .*, got \(150, 6\)"),
    (lambda: fit(nn.ReLU(), points(), settings=Fit()), Unsupported, "requires_grad=True, the network has none"),
    (lambda: fit(Telling(6, 3), points(), settings=Fit()), Unsupported, "returns tensors, got str"),
    (
        lambda: fit(nn.Sequential(LINEAR, Argmax()), points(), settings=Fit(loss="original"), teacher=nn.Sequential(Argmax())),
        Unsupported,
        "all of them are integers",
    ),
    (lambda: fit(Aside(), points(), settings=Fit()), Unsupported, "outputs that depend on the parameters, these do not"),
]


class Telling(nn.Linear):
    def forward(self, x):
        return "no tensor"


class Argmax(nn.Module):
    def forward(self, x):
        return x.argmax(1)


class Aside(nn.Linear):
    """Its parameters reach no output."""

    def __init__(self) -> None:
        super().__init__(6, 3)

    def forward(self, x):
        return x[:, :3] + 0


@pytest.mark.parametrize(("call", "kind", "words"), REFUSALS, ids=lambda value: value if isinstance(value, str) else "")
def test_refusals_of_fit(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"loss": "hinge"}, r"loss must be one of \['classes', 'values', 'original'\], got 'hinge'"),
        ({"optimizer": "adan"}, "optimizer must be one of"),
        ({"schedule": "steep"}, "schedule must be one of"),
        ({"augmentation": "flip"}, "augmentation must be one of"),
        ({"epochs": 0}, "epochs must be a finite number above 0, got 0"),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number above 0, got nan"),
        ({"temperature": math.inf}, "temperature must be a finite number above 0, got inf"),
        ({"batch": 0}, "batch must be at least 1, or None for all, got 0"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number of at least 0, got -0.1"),
        ({"warm_up": 1.0}, r"warm_up must be in \[0, 1\), got 1.0"),
        ({"label_smoothing": -1}, r"label_smoothing must be in \[0, 1\), got -1"),
        ({"distil": 1.2}, r"distil must be in \[0, 1\], got 1.2"),
        ({"clip": 0}, "clip must be above 0, got 0"),
        ({"loss": "original", "distil": 0.5}, "must be 0 with the loss 'original', got 0.5"),
        ({"loss": "values", "label_smoothing": 0.1}, "label_smoothing must be 0 with the loss 'values', got 0.1"),
    ],
    ids=str,
)
def test_settings_out_of_range(wrong, words):
    with pytest.raises(UsageError, match=words):
        Fit(**wrong)
