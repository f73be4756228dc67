"""Which weights go: from one number per weight, the lowest of a layer, of all layers, or of every m neighbours.

Shapes: scores as their weights, (out, in) or (out, in, …); transposed convolutions (in, out, …).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Scores = Mapping[str, Tensor]
Masks = dict[str, Tensor]  # True where the weight becomes zero


def lowest(scores: Tensor, share: float) -> Tensor:
    """True for the round(share · n) lowest of n scores; of equal ones the first.

    >>> lowest(torch.tensor([3.0, 1.0, 2.0, 1.0]), 0.25)
    tensor([False,  True, False, False])
    """
    flat = scores.flatten()
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    mask[flat.argsort(stable=True)[: round(share * flat.numel())]] = True
    return mask.view_as(scores)


def by_layer(scores: Scores, share: float) -> Masks:
    """The lowest of each layer."""
    return {name: lowest(values, share) for name, values in scores.items()}


def overall(scores: Scores, share: float) -> Masks:
    """The lowest of all layers together."""
    flat = lowest(torch.cat([values.flatten() for values in scores.values()]), share)
    parts = torch.split(flat, [values.numel() for values in scores.values()])
    return {name: part.view_as(values) for (name, values), part in zip(scores.items(), parts, strict=True)}


def by_pattern(scores: Tensor, drop: int, of: int, axis: int) -> Tensor:
    """True for the `drop` lowest of every `of` consecutive scores along `axis`, whose length is a multiple of `of`.

    >>> by_pattern(torch.tensor([[4.0, 1.0, 2.0, 3.0]]), drop=2, of=4, axis=1)
    tensor([[False,  True,  True, False]])
    """
    moved = scores.movedim(axis, -1)
    groups = moved.reshape(*moved.shape[:-1], -1, of)  # (…, in / of, of)
    order = groups.argsort(dim=-1, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :drop], True)
    return mask.flatten(-2).movedim(-1, axis)


def zeros(tensors: Sequence[Tensor]) -> float:
    """Share of exact zeros in all of them."""
    return sum(int((t == 0).sum()) for t in tensors) / max(1, sum(t.numel() for t in tensors))
