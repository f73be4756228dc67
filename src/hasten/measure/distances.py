"""How far outputs lie apart, taken a piece at a time: those of a recogniser of text are gigabytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hasten.core.data import Array

_AT_ONCE = 2**18  # numbers, which caches hold


def kept(ours: Array, theirs: Array) -> Array:
    """(n,) of each row of `ours`, how much of `theirs` is left in it, in [0, 1]; the formula is at `scores.Fidelity`."""
    parts = [_apart(a, b) for a, b in zip(pieces(ours), pieces(theirs), strict=True)]
    distance, broken = (np.concatenate(part) for part in zip(*parts, strict=True))
    mean = sum(_clean(piece).sum(axis=0) for piece in pieces(theirs)) / len(theirs)
    variation = sum(float(((_clean(piece) - mean) ** 2).sum()) for piece in pieces(theirs)) / len(theirs)
    variation = variation or sum(float((_clean(piece) ** 2).sum()) for piece in pieces(theirs)) / len(theirs)
    lost = distance / variation if variation > 0 else (distance > 0).astype(float)
    return np.asarray(np.where(broken, 0.0, np.clip(1 - lost, 0, 1)))


def close(a: Array, b: Array, tolerance: float) -> bool:
    """Whether no number differs by more than `tolerance` of the largest |a|, and what is not finite is the same in both."""
    farthest, largest = extremes(a, b)
    return farthest <= tolerance * largest


def extremes(a: Array, b: Array) -> tuple[float, float]:
    """The largest |a − b|, infinite where what is not finite is not the same in both; and the largest |a| of what is finite."""
    largest = farthest = 0.0
    for one, other in zip(pieces(a), pieces(b), strict=True):
        one, other = one.astype(float), other.astype(float)
        finite = np.isfinite(one)
        if not np.array_equal(one[~finite], other[~finite], equal_nan=True) or not np.isfinite(other[finite]).all():
            return np.inf, largest
        largest = max(largest, float(np.abs(one[finite]).max(initial=0.0)))
        farthest = max(farthest, float(np.abs(one[finite] - other[finite]).max(initial=0.0)))
    return farthest, largest


def pieces(values: Array) -> Iterator[Array]:
    """Runs of rows, each (rows, numbers)."""
    size = values[:1].size
    rows = max(1, _AT_ONCE // max(1, size))
    for start in range(0, len(values), rows):
        yield values[start : start + rows].reshape(-1, size)


def _clean(values: Array) -> Array:
    values = values.astype(float)
    return values if np.isfinite(values).all() else np.where(np.isfinite(values), values, 0.0)


def _apart(ours: Array, theirs: Array) -> tuple[Array, Array]:
    """The squared distance of each row, and whether it holds what is not finite in one alone."""
    both = np.isfinite(ours) & np.isfinite(theirs)
    with np.errstate(invalid="ignore"):
        distance = np.where(both, ours.astype(float) - theirs.astype(float), 0.0)
    return np.einsum("ij,ij->i", distance, distance), ~(both | (ours == theirs)).all(axis=1)
