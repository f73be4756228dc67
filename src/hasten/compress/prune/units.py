"""Units: positions along the axes of tensors that live and die together, and the axes that hold them.

Every position along an axis that may shrink has a unit, an integer. Tying two units makes them one: a residual sum ties the
channels of its branches. A fixed unit never goes. The axes of a tensor are described by `Axes`; an axis without units
(batch, height, an input) keeps its size for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Ids = np.ndarray[Any, np.dtype[np.int64]]


class Units:
    """Makes units, ties them, fixes them."""

    def __init__(self) -> None:
        self._parent = np.zeros(0, dtype=np.int64)
        self._fixed: dict[int, str] = {}

    def new(self, count: int) -> Ids:
        """So many fresh units, each on its own."""
        ids = np.arange(len(self._parent), len(self._parent) + count)
        self._parent = np.concatenate([self._parent, ids])
        return ids

    def find(self, ids: Ids) -> Ids:
        """The one that stands for each unit and all that are tied to it."""
        roots = self._parent[ids]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                return roots
            roots = above

    def tie(self, first: Ids | None, second: Ids | None, why: str) -> None:
        """Makes each pair of units one. Where one side is an axis without units, the other side is fixed."""
        if first is None or second is None:
            self.fix(first if second is None else second, why)
            return
        for a, b in zip(first.ravel().tolist(), second.ravel().tolist(), strict=True):
            one, other = self._root(a), self._root(b)
            if one != other:
                low, high = min(one, other), max(one, other)
                self._parent[high] = low
                if high in self._fixed:
                    self._fixed.setdefault(low, self._fixed.pop(high))

    def fix(self, ids: Ids | None, why: str) -> None:
        """These units stay, for this reason."""
        if ids is not None:
            for root in np.unique(self.find(ids)).tolist():
                self._fixed.setdefault(root, why)

    def why_fixed(self, unit: int) -> str | None:
        """The reason why a unit stays, or None where it may go."""
        return self._fixed.get(self._root(unit))

    def _root(self, unit: int) -> int:
        while (above := int(self._parent[unit])) != unit:
            self._parent[unit] = self._parent[above]
            unit = above
        return unit


@dataclass(frozen=True)
class Joint:
    """Units that hang on several axes at once: what a view of channels as (heads, width) leaves until one axis is chosen.

    Args:
        axes: of the tensor, ascending.
        ids: one unit for each combination of positions, with one axis for each of `axes`.
        last: which of `axes` was the innermost when the axis was cut up.
    """

    axes: tuple[int, ...]
    ids: Ids
    last: int


@dataclass(frozen=True)
class Axes:
    """The units of a tensor, axis by axis; at most one `Joint`, whose axes hold None in `plain`."""

    shape: tuple[int, ...]
    plain: tuple[Ids | None, ...]
    joint: Joint | None = None

    @classmethod
    def bare(cls, shape: Sequence[int]) -> Axes:
        """No axis may shrink."""
        return cls(tuple(shape), (None,) * len(shape))

    @classmethod
    def of(cls, shape: Sequence[int], plain: Sequence[Ids | None]) -> Axes:
        """Checks lengths; an axis of size 1 has no units."""
        for size, ids in zip(shape, plain, strict=True):
            assert ids is None or len(ids) == size, f"an axis of {size} got {len(ids)} units"
        return cls(tuple(shape), tuple(None if size == 1 else ids for size, ids in zip(shape, plain, strict=True)))

    def everything(self) -> list[Ids]:
        """All units that hang on it."""
        found = [ids for ids in self.plain if ids is not None]
        return found if self.joint is None else [*found, self.joint.ids.ravel()]

    def resolved(self, units: Units) -> Axes:
        """The same with the joint carried by its first axis alone: whole heads."""
        return self if self.joint is None else self._on(self.joint.axes[0], units)

    def merged(self, units: Units) -> Axes:
        """The same with the joint's units tied along every axis but the innermost: equal positions in every group."""
        return self if self.joint is None else self._on(self.joint.last, units)

    def sizes(self, units: Units, gone: Ids) -> tuple[int, ...]:
        """The shape after the units in `gone` (roots) have left."""
        left = [
            size if ids is None else int((~np.isin(units.find(ids), gone)).sum()) for size, ids in zip(self.shape, self.plain, strict=True)
        ]
        if self.joint is not None:
            stays = ~np.isin(units.find(self.joint.ids), gone)
            for place, axis in enumerate(self.joint.axes):
                others = tuple(i for i in range(stays.ndim) if i != place)
                left[axis] = int(stays.any(axis=others).sum())
        return tuple(left)

    def _on(self, axis: int, units: Units) -> Axes:
        assert self.joint is not None
        along = np.moveaxis(self.joint.ids, self.joint.axes.index(axis), 0).reshape(self.shape[axis], -1)
        tie_rows(units, along)
        plain = list(self.plain)
        plain[axis] = along[:, 0]
        return Axes.of(self.shape, plain)


def tie_rows(units: Units, table: Ids) -> None:
    """Makes each row of a table one unit."""
    for column in range(1, table.shape[1]):
        units.tie(table[:, 0], table[:, column], "")


def reshaped(axes: Axes, shape: Sequence[int], units: Units) -> Axes:
    """The units of a tensor that is viewed in another shape, both shapes in full numbers."""
    if (same := _renumbered(axes, shape)) is not None:
        return same
    runs = list(_pieces(axes.shape, shape))
    if axes.joint is not None:
        home = [after for before, after in runs if set(axes.joint.axes) <= set(before)]
        axes = axes.resolved(units) if not home else axes.merged(units) if len(home[0]) == 1 else axes
    plain: list[Ids | None] = [None] * len(shape)
    joint: Joint | None = None
    for before, after in runs:
        ids = _together(axes, before, units)
        if ids is None:
            continue
        ids = ids.reshape([shape[i] for i in after])
        moving = tuple(i for i, axis in enumerate(after) if _varies(ids, i))
        kept = ids[tuple(slice(None) if i in moving else 0 for i in range(ids.ndim))]
        if len(moving) == 1:
            plain[after[moving[0]]] = kept
        elif moving and joint is None:
            where = tuple(after[i] for i in moving)
            joint = Joint(axes=where, ids=kept, last=where[-1])
        elif moving:
            units.fix(kept.ravel(), "two groups of axes are cut up at once")
    made = Axes.of(shape, plain)
    return Axes(made.shape, made.plain, joint)


def _renumbered(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The units where only axes of size 1 come or go, else None."""
    old = [i for i, size in enumerate(axes.shape) if size != 1]
    new = [i for i, size in enumerate(shape) if size != 1]
    if [axes.shape[i] for i in old] != [shape[i] for i in new]:
        return None
    to = dict(zip(old, new, strict=True))
    plain: list[Ids | None] = [None] * len(shape)
    for i, j in to.items():
        plain[j] = axes.plain[i]
    joint = axes.joint and Joint(axes=tuple(to[a] for a in axes.joint.axes), ids=axes.joint.ids, last=to[axes.joint.last])
    return Axes(tuple(shape), tuple(plain), joint)


def _varies(ids: Ids, axis: int) -> bool:
    return ids.shape[axis] > 1 and not (ids == np.take(ids, [0], axis=axis)).all()


def _pieces(before: Sequence[int], after: Sequence[int]) -> Iterable[tuple[list[int], list[int]]]:
    """Pairs of runs of axes that hold the same numbers; axes of size 1 stand alone or ride along."""
    i = j = 0
    while i < len(before) or j < len(after):
        left: list[int] = []
        right: list[int] = []
        many, other = 1, 1
        while True:
            if many <= other and i < len(before) and (many < other or not left):
                left.append(i)
                many *= before[i]
                i += 1
            elif j < len(after) and (other < many or not right):
                right.append(j)
                other *= after[j]
                j += 1
            elif many == other:
                break
            else:
                raise AssertionError(f"cannot view {tuple(before)} as {tuple(after)}")
        yield left, right


def _together(axes: Axes, run: Sequence[int], units: Units) -> Ids | None:
    """One unit for each combination of positions along a run of axes, or None where none of them has units.

    Of several axes that could shrink only the innermost goes on doing so.
    """
    shape = tuple(axes.shape[i] for i in run)
    found: list[Ids] = []
    for place, axis in enumerate(run):
        ids = axes.plain[axis]
        if ids is not None:
            found.append(np.broadcast_to(ids.reshape([-1 if i == place else 1 for i in range(len(run))]), shape))
    joint = axes.joint
    if joint is not None and set(joint.axes) & set(run):
        assert set(joint.axes) <= set(run), "a joint is resolved before a view takes its axes apart"
        sizes = [axes.shape[axis] if axis in joint.axes else 1 for axis in run]
        found.append(np.broadcast_to(joint.ids.reshape(sizes), shape))
    for ids in found[:-1]:
        units.fix(ids.ravel(), "two axes that shrink are merged into one")
    return found[-1] if found else None
