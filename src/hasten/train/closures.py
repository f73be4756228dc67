"""Optimizers that ask for the gradient by themselves, more than once a step: SAM, LBFGS."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from hasten.train.optim import SAM

Again = Callable[[], tuple[float, float]]
"""Leaves the gradient of the same batch at the weights as they are now; (loss, norm)."""


class _Sick(Exception):
    def __init__(self, loss: float, norm: float) -> None:
        self.found = loss, norm


def asks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step needs a closure."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return isinstance(optimizer, SAM) or (closure is not None and closure.default is closure.empty)


def step(
    optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter], found: tuple[float, float], again: Again
) -> tuple[float, float]:
    """One step; the first time that the optimizer asks it gets the gradient that is there, whose loss and norm are `found`.

    Returns:
        `found`; or, where a gradient on the way is not finite, its loss and norm, the weights being as before the step.
    """
    before = [weight.detach().clone() for weight in weights]
    asked = 0

    def closure() -> float:
        nonlocal asked
        loss, norm = again() if asked else found
        asked += 1
        if not math.isfinite(loss + norm):
            raise _Sick(loss, norm)
        return loss

    try:
        optimizer.step(closure)
    except _Sick as why:
        with torch.no_grad():
            for weight, kept in zip(weights, before, strict=True):
                weight.copy_(kept)
        return why.found
    return found
