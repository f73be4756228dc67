"""Labels as a loss takes them: checked once, looked up by the places of a batch.

Shapes: labels (n,) or (n, …) integers for classes, as the outputs without their classes' axis; (n, …) floats for values.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from hasten.core.data import Array
from hasten.core.errors import DataRefused, Unsupported

IGNORED = -100  # a class label that is left out, as in torch


class Targets:
    """Labels by place. A stream puts those of its batch in the place of the last.

    Args:
        labels: of all data, or of a stream's first batch.
        read: checks labels and makes a tensor of them.
    """

    def __init__(self, labels: Array, read: Callable[[Array], torch.Tensor]) -> None:
        self._read = read
        self.values = read(labels)

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        return self.values.index_select(0, index.to(self.values.device))

    def put(self, labels: Array) -> None:
        """Takes the labels of the next batch of a stream."""
        self.values = self._read(labels)


def class_axis(shown: torch.Tensor, labels_shape: tuple[int, ...]) -> int:
    """Which axis of the outputs counts classes."""
    return -1 if shown.shape[1:-1] == labels_shape[1:] else 1  # as the scores read it where both would fit


def as_classes(labels: Array, shown: torch.Tensor) -> torch.Tensor:
    """Class labels that fit the outputs `shown`. Raises DataRefused or Unsupported."""
    if labels.dtype.kind not in "iub":
        raise DataRefused(f"the loss 'classes' needs integer labels, got {labels.dtype}")
    if shown.ndim < 2 or labels.shape[1:] not in (shown.shape[2:], shown.shape[1:-1]):
        raise DataRefused(
            "labels must have the shape of the outputs without the classes' axis, "
            f"got labels {labels.shape} and outputs {('n', *shown.shape[1:])}"
        )
    found = torch.from_numpy(labels.astype(np.int64)).to(shown.device)
    classes = shown.shape[class_axis(shown, labels.shape)]
    if classes < 2:
        raise Unsupported("the loss 'classes' needs one output per class, got 1; give the network two, or learn values")
    told = found[found != IGNORED]
    if not told.numel():
        raise DataRefused(f"labels must name classes, got {IGNORED}, left out, everywhere")
    if told.min() < 0 or told.max() >= classes:
        raise DataRefused(f"labels must lie in 0 … {classes - 1}, got {int(told.min())} … {int(told.max())}")
    return found


def as_values(labels: Array, shown: torch.Tensor) -> torch.Tensor:
    """(n, …) as the outputs; without this (n,) labels would be spread over (n, 1) outputs into an n × n table."""
    found = torch.from_numpy(np.array(labels)).to(shown)
    if found[0].numel() != shown[0].numel():
        raise DataRefused(f"labels must have as many values as the outputs {tuple(shown.shape)}, got {tuple(found.shape)}")
    return found.reshape(-1, *shown.shape[1:])


def class_weights(labels: torch.Tensor, classes: int, asked: object) -> torch.Tensor | None:
    """(classes,): n/(classes·n_c) for "weights", the user's own, or None. A class without examples counts nothing.

    Raises:
        DataRefused: where there are not as many weights as classes, or one is negative.
    """
    if isinstance(asked, str):
        return balanced(labels, classes) if asked == "weights" else None
    weights = torch.tensor(asked, dtype=torch.float32, device=labels.device)
    if weights.shape != (classes,) or not bool((weights >= 0).all()) or not bool(weights.any()):
        raise DataRefused(f"balance must hold one weight of at least 0 for each of {classes} classes, got {asked}")
    return weights


def balanced(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """(classes,): n/(classes·n_c), so that every class weighs the same together.

    >>> balanced(torch.tensor([0, 0, 0, 1]), 2)
    tensor([0.6667, 2.0000])
    """
    counts = torch.bincount(labels[labels != IGNORED].flatten(), minlength=classes)
    present = int((counts > 0).sum())
    return torch.where(counts > 0, counts.sum() / (present * counts.clamp_min(1)), 0.0).to(torch.float32)
