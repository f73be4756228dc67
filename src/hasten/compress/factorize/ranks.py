"""How thin: ranks by energy, by budget, by measured time, or as told; and whether the thin layers are worth their place."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hasten.compress import calls, layers
from hasten.compress.settings import whole_numbers
from hasten.core.errors import Unsupported

_BUDGETS = (0.75, 0.5, 0.35, 0.2)  # of a layer's weights, that are timed
_CALLS = 15


def check(step: Any) -> None:
    """Checks the settings that factorizing steps share. Raises ValueError, or TypeError on names that are no tuple."""
    whole_numbers(step)
    layers.patterns("only", step.only)
    layers.patterns("keep", step.keep)
    if step.energy is not None and not 0 < step.energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {step.energy}")
    if not 0 < step.budget < 1:
        raise ValueError(f"budget must be in (0, 1), got {step.budget}")
    if step.rank is not None and step.rank < 1:
        raise ValueError(f"rank must be at least 1, got {step.rank}")
    if step.faster is not None and not 0 < step.faster < 1:
        raise ValueError(f"faster must be in (0, 1), got {step.faster}")
    given = [f"{name}={getattr(step, name)}" for name in ("energy", "rank", "faster") if getattr(step, name) is not None]
    if len(given) > 1:
        raise ValueError(f"energy, rank and faster each choose the rank: give one, got {' and '.join(given)}")
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


def within(layer: nn.Module, chain: Callable[[float], Sequence[nn.Module]], shape: tuple[int, ...], share: float) -> float | None:
    """The largest of a few budgets whose `chain` takes at most this share of the layer's own time, on an input of this shape.

    None where none of them does.
    """
    weight: Any = layer.weight
    runs = [nn.Sequential(*parts) for parts in ([layer], *(chain(budget) for budget in _BUDGETS))]
    own, *found = seconds(runs, torch.rand(shape, dtype=weight.dtype))
    return next((budget for budget, took in zip(_BUDGETS, found, strict=True) if took <= share * own), None)


@torch.no_grad()
def seconds(runs: Sequence[nn.Module], x: Tensor) -> list[float]:
    """The shortest of several calls of each, taken in turns."""
    best = [math.inf] * len(runs)
    for _ in range(_CALLS):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run(x)
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def stays(name: str, share: float | None) -> str:
    """Words for a layer that no rank makes so much faster."""
    return f"{name} stays: no rank takes at most {share:.0%} of its time"


def too_slow(names: Sequence[str], share: float | None) -> str:
    """The same words at the end of a refusal; empty where there are no such layers."""
    return f"; no rank takes at most {share:.0%} of the time of {', '.join(names)}" if names else ""


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
