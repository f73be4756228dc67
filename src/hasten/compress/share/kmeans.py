"""k-means of numbers on a line: sorted once, each round costs as much as there are centroids.

Shapes: values (n,), sizes (n,), centroids (k,) in ascending order.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 300


def linear(values: Tensor, k: int, *, hole: tuple[float, float] | None = None) -> Tensor:
    """k centroids at equal distances from the lowest value to the highest, none of them inside of `hole`.

    >>> linear(torch.tensor([-3.0, -2.0, 2.0, 3.0]), 4, hole=(-2.0, 2.0)).round(decimals=2).tolist()
    [-3.0, -2.33, 2.33, 3.0]
    """
    ends, (left, right) = values.double().aminmax(), hole or (0.0, 0.0)
    places = torch.linspace(0, 1, k, dtype=torch.float64, device=values.device)
    places = ends.min + (ends.max - ends.min - (right - left)) * places
    return torch.where(places > left, places + (right - left), places)


def lloyd(values: Tensor, start: Tensor, sizes: Tensor | None = None) -> Tensor:
    """Centroids that are each the mean of the values nearest to them: minimises Σ size·(value − centroid)² locally.

    A value halfway between two centroids belongs to the lower one; a centroid without values stays where it is. Ends when no
    value changes its centroid, or after 300 rounds.

    Args:
        start: the first centroids, ascending.
        sizes: how much each value counts, >= 0; the same for all if not given.

    >>> lloyd(torch.tensor([0.0, 1.0, 10.0, 12.0]), torch.tensor([0.0, 12.0])).tolist()
    [0.5, 11.0]
    """
    ordered, order = values.detach().double().sort()
    size = torch.ones_like(ordered) if sizes is None else sizes.detach().double()[order]
    count = torch.cat([size.new_zeros(1), size.cumsum(0)])
    total = torch.cat([size.new_zeros(1), (size * ordered).cumsum(0)])
    centroids, before = start.double(), None
    for _ in range(_ROUNDS):
        inner = torch.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2, right=True)
        ends = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(ordered))])
        if before is not None and torch.equal(ends, before):
            break
        before = ends
        held, sums = count[ends].diff(), total[ends].diff()
        centroids = torch.where(held > 0, sums / held.clamp_min(torch.finfo(torch.float64).tiny), centroids)
    return centroids


def nearest(values: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid, of two equally near the lower."""
    return torch.searchsorted((centroids[1:] + centroids[:-1]) / 2, values.detach().double().contiguous())
