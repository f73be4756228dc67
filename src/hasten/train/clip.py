"""Keeping gradients small: by their global norm, value by value, or by the size of the weights that they change.

Shapes: weights and gradients (units, …): the first axis of a matrix or a kernel counts units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from hasten.core.errors import UsageError

By = Literal["norm", "value", "adaptive"]
_LEAST = 1e-3  # norm of a unit's weights below which it counts as this: weights that start at zero could not move


@dataclass(frozen=True, kw_only=True)
class Clip:
    """How gradients are kept small.

    Args:
        by: "norm": g ← g·min(1, at/‖g‖) with the norm of all gradients together; "value": each value cut to [−at, at];
            "adaptive": unit by unit g ← g·min(1, at·max(‖w‖, 0.001)/‖g‖).
        at: > 0; `math.inf` for none. About 0.01 for "adaptive".

    Raises:
        UsageError: on a value outside its range.

    References:
        A. Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", 2021, arXiv:2102.06171 (adaptive).
    """

    by: By = "norm"
    at: float = 1.0

    def __post_init__(self) -> None:
        if self.by not in get_args(By):
            raise UsageError(f"by must be one of {list(get_args(By))}, got {self.by!r}")
        if not self.at > 0:
            raise UsageError(f"clip must be above 0, got {self.at}")

    def __call__(self, weights: Sequence[nn.Parameter]) -> float:
        """Clips the gradients in place; the global norm that they had before. Where that is not finite they stay as they are."""
        held = [w for w in weights if w.grad is not None]
        for weight in held:
            if weight.grad is not None and weight.grad.is_sparse:
                weight.grad = weight.grad.coalesce()  # a row that is named twice has one gradient, their sum
        norm = global_norm([w.grad for w in held if w.grad is not None])
        size = norm.item()
        if not math.isfinite(size):
            return size
        if self.by == "norm":
            if size + 1e-6 > 0.999 * self.at:  # below it torch multiplies by exactly 1, which takes its time
                nn.utils.clip_grads_with_norm_(held, self.at, norm)
        elif self.by == "value":
            for weight in held:
                assert weight.grad is not None
                numbers(weight.grad).clamp_(-self.at, self.at)
        else:
            _adaptive(held, self.at)
        return size


def global_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """‖g‖ of all gradients together; those of one network on one device need not be sorted first, as torch does for a longer while."""
    gradients = [numbers(g) for g in gradients]
    if len({g.device for g in gradients}) != 1:
        return nn.utils.get_total_norm(gradients)
    norms: torch.Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norms


def numbers(gradient: torch.Tensor) -> torch.Tensor:
    """The numbers of a gradient: of a sparse one, such as that of `nn.Embedding(sparse=True)`, those of the rows that it names."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


@torch.no_grad()
def penalize(weights: Sequence[nn.Parameter], penalty: tuple[float, float]) -> None:
    """Adds the gradient of a·Σ|w| + b/2·Σw² on weights with two or more axes. A sparse gradient becomes dense, as this one is."""
    absolute, square = penalty
    for weight in weights:
        if weight.ndim >= 2 and weight.grad is not None:
            if weight.grad.is_sparse:
                weight.grad = weight.grad.to_dense()
            weight.grad.add_(weight.sign(), alpha=absolute).add_(weight, alpha=square)


@torch.no_grad()
def _adaptive(weights: Sequence[nn.Parameter], at: float) -> None:
    for weight in weights:
        assert weight.grad is not None
        held = weight[tuple(weight.grad.indices())] if weight.grad.is_sparse else weight
        most = at * _unit_norms(held).clamp_min(_LEAST)
        gradient = numbers(weight.grad)
        gradient.mul_((most / _unit_norms(gradient).clamp_min(1e-6)).clamp_max(1.0))


def _unit_norms(values: torch.Tensor) -> torch.Tensor:
    """(units, 1, …); a bias or a scale is one unit per value, as in the paper's code."""
    if values.ndim < 2:
        return values.abs()
    norms: torch.Tensor = torch.linalg.vector_norm(values, dim=tuple(range(1, values.ndim)), keepdim=True)
    return norms
