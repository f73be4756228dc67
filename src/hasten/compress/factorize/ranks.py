"""How thin: ranks by energy, by budget, or as told; and whether the thin layers are worth their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hasten.compress import calls, layers
from hasten.core.errors import Unsupported


def check(step: Any) -> None:
    """Checks the settings that factorizing steps share. Raises ValueError, or TypeError on names that are no tuple."""
    layers.patterns("only", step.only)
    layers.patterns("keep", step.keep)
    if step.energy is not None and not 0 < step.energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {step.energy}")
    if not 0 < step.budget < 1:
        raise ValueError(f"budget must be in (0, 1), got {step.budget}")
    if step.rank is not None and step.rank < 1:
        raise ValueError(f"rank must be at least 1, got {step.rank}")
    if step.energy is not None and step.rank is not None:
        raise ValueError(f"energy and rank both choose the rank: give one, got energy={step.energy} and rank={step.rank}")
    if step.multiple < 1:
        raise ValueError(f"multiple must be at least 1, got {step.multiple}")


def is_dense(layer: Any) -> bool:
    """Whether a convolution has a kernel wider than 1 and no groups."""
    return layer.groups == 1 and any(k > 1 for k in layer.kernel_size)


def below(name: str, rank: int, full: int) -> int:
    """`rank`, where the layer has as many. Raises Unsupported."""
    if rank > full:
        raise Unsupported(f"rank must be at most {full}, the full rank of {name}, got {rank}; leave the layer out with keep=({name!r},)")
    return rank


def by_energy(sizes: Tensor, energy: float, multiple: int) -> int:
    """The fewest singular values that hold this share of the sum of squares, rounded up to the multiple."""
    held = sizes.square().cumsum(0)
    enough = int((held < energy * held[-1] * (1 - 1e-12)).sum()) + 1
    return min(-(-enough // multiple) * multiple, len(sizes))


def down(rank: float, multiple: int) -> int:
    """The largest multiple up to `rank`, or its whole part where that is none; at least 1."""
    whole = int(rank)
    return max(whole // multiple * multiple or whole, 1)


def most(cost: Callable[[float], float], limit: float) -> float:
    """The largest share in (0, 1] whose cost, which grows with it, is within the limit; the smallest tried where none is."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= limit else (low, middle)
    return low


def cheaper(layer: nn.Module, parts: Sequence[nn.Module], shape: tuple[int, ...]) -> bool:
    """Whether the parts hold fewer numbers than the layer and multiply no more, for an input of this shape."""
    if sum(calls.numbers(part) for part in parts) >= calls.numbers(layer):
        return False
    weight: Any = layer.weight
    with torch.no_grad():
        x = torch.zeros(shape, dtype=weight.dtype)
        before, work = calls.multiply_adds(layer, tuple(layer(x).shape)), 0
        for part in parts:
            x = part(x)
            work += calls.multiply_adds(part, tuple(x.shape))
    return work <= before
