"""Units: examples that must stay on one side of a cut, and the order in which they are dealt out.

Examples with equal inputs, and examples of one group, are one unit, and so is what hangs together through them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hasten.core.data import Array
from hasten.core.network import Arrays

_ROWS_AT_ONCE = 4_096


@dataclass(frozen=True)
class Units:
    """What must stay together, in the order in which it is dealt out.

    unit (n,) number of each example's unit; sizes (units,); order: the unit numbers, classes interleaved.
    """

    unit: Array
    sizes: Array
    order: list[int]

    @classmethod
    def of(cls, digests: list[bytes], *, labels: Array | None, groups: Array | None, seed: int) -> Units:
        """The units of the examples with these digests. Integer labels are classes, which are dealt out evenly."""
        unit = connected(digests, groups)
        sizes = np.bincount(unit)
        classes = labels if labels is not None and labels.dtype.kind == "i" else np.zeros(len(unit), dtype=np.int64)
        first = _first_by_content(unit, digests, classes)
        keys = np.array([_draw(seed, digests[i]) for i in first])
        return cls(unit, sizes, _interleaved(classes[first], sizes, keys, seed))

    def __len__(self) -> int:
        return len(self.sizes)

    def fill(self, order: Sequence[int], quota: int, *, leave: int) -> tuple[list[int], list[int]]:
        """The units that fit into `quota` examples one after the other, and the rest, at least `leave` units.

        Where none fits, the smallest.
        """
        taken: list[int] = []
        rest: list[int] = []
        room = quota
        for unit in order:
            if self.sizes[unit] <= room and len(order) - len(taken) > leave:
                taken.append(unit)
                room -= int(self.sizes[unit])
            else:
                rest.append(unit)
        if not taken:
            smallest = min(rest, key=lambda unit: self.sizes[unit])
            rest.remove(smallest)
            taken.append(smallest)
        return taken, rest

    def members(self, units: Sequence[int]) -> Array:
        """The examples of the units, in the order of the units."""
        place = np.full(len(self.sizes), -1)
        place[units] = np.arange(len(units))
        found = np.flatnonzero(place[self.unit] >= 0)
        return found[np.argsort(place[self.unit[found]], kind="stable")]


def content_digests(inputs: Arrays) -> list[bytes]:
    """A hash of each example's inputs; −0.0 counts as 0.0."""
    digests: list[bytes] = []
    for start in range(0, len(inputs[0]), _ROWS_AT_ONCE):
        pieces = [np.ascontiguousarray(array[start : start + _ROWS_AT_ONCE]) for array in inputs]
        pieces = [piece + piece.dtype.type(0) if piece.dtype.kind == "f" else piece for piece in pieces]
        for row in range(len(pieces[0])):
            digest = hashlib.blake2b(digest_size=16)
            for piece in pieces:
                digest.update(piece[row].tobytes())
            digests.append(digest.digest())
    return digests


def connected(digests: list[bytes], groups: Array | None) -> Array:
    """(n,) the number of each example's unit: equal inputs and equal groups, and what hangs together through them."""
    numbers: dict[bytes, int] = {}
    content = np.array([numbers.setdefault(digest, len(numbers)) for digest in digests])
    if groups is None:
        return content
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    _, group = np.unique(groups, return_inverse=True)
    nodes = len(numbers) + int(group.max()) + 1
    edges = coo_array((np.ones(len(content), dtype=np.int8), (content, group + len(numbers))), shape=(nodes, nodes))
    _, component = connected_components(edges, directed=False)
    return np.asarray(np.unique(component[content], return_inverse=True)[1])


def _first_by_content(unit: Array, digests: list[bytes], labels: Array) -> list[int]:
    """For each unit its example with the smallest digest and label: the same one in whatever order the examples come."""
    first: dict[int, tuple[bytes, int, int]] = {}
    for i, (number, digest, label) in enumerate(zip(unit.tolist(), digests, labels.tolist(), strict=True)):
        first[number] = min(first.get(number, (digest, label, i)), (digest, label, i))
    return [first[number][2] for number in range(len(first))]


def _draw(seed: int, content: bytes) -> int:
    """A random number in [0, 2⁶³) that is a function of its arguments alone."""
    return int.from_bytes(hashlib.blake2b(f"{int(seed)}:".encode() + content, digest_size=8).digest(), "big") >> 1


def _interleaved(strata: Array, sizes: Array, key: Array, seed: int) -> list[int]:
    """The units in an order of which every stretch has each stratum's share.

    Within a stratum the units follow their keys, (units,) numbers. The unit that begins after c of the stratum's s examples is
    put at (c + u·size)/s in [0, 1), with one random u for each stratum, and all units are sorted by that.
    """
    order = np.lexsort((key, strata))
    where = np.empty(len(order))
    for stratum in np.unique(strata):
        members = order[strata[order] == stratum]
        before = np.cumsum(sizes[members]) - sizes[members]
        shift = _draw(seed, f"stratum {stratum}".encode()) / 2**63
        where[members] = (before + shift * sizes[members]) / sizes[members].sum()
    return [int(unit) for unit in np.lexsort((key, where))]
