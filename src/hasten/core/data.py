"""Examples and labels, the views that a run cuts them into, and the seal on the one that proves.

Shapes: inputs, one array per network input, each (n, …); labels (n,) integers for classes, (n, …) floats for values, or None.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hasten.core.errors import StorageError
from hasten.core.network import Arrays

Array = np.ndarray[Any, Any]
Provenance = Literal["held out", "unknown"]


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """Examples with their labels.

    Args:
        inputs: one array per network input, each (n, …).
        labels: (n, …), or None where there are none.
    """

    inputs: Arrays
    labels: Array | None = None

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError("a view needs at least one input array, got none")
        lengths = {len(a) for a in (*self.inputs, *(() if self.labels is None else (self.labels,)))}
        if len(lengths) != 1:
            raise ValueError(f"inputs and labels must have the same length, got {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.inputs[0])

    def take(self, index: Array | slice) -> View:
        """The examples at `index`, in that order."""
        return View(inputs=tuple(a[index] for a in self.inputs), labels=None if self.labels is None else self.labels[index])

    def batches(self, size: int) -> Iterator[View]:
        """Consecutive pieces of `size` examples; the last may be shorter."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    def fingerprint(self) -> str:
        """SHA-256 over the values, in hexadecimal: equal data has an equal fingerprint wherever it lies."""
        digest = hashlib.sha256()
        for array in (*self.inputs, *(() if self.labels is None else (self.labels,))):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Writes `input0.npy`, …, `labels.npy` into `folder`, an empty or a new one."""
        folder.mkdir(parents=True, exist_ok=True)
        for i, array in enumerate(self.inputs):
            np.save(folder / f"input{i}.npy", array, allow_pickle=False)
        if self.labels is not None:
            np.save(folder / "labels.npy", self.labels, allow_pickle=False)
        (folder / "view.json").write_text(json.dumps({"inputs": len(self.inputs), "labels": self.labels is not None}))

    @classmethod
    def load(cls, folder: Path) -> View:
        """Reads what `save` wrote; arrays stay on disk until they are touched."""
        try:
            facts = json.loads((folder / "view.json").read_text())
            inputs = tuple(np.load(folder / f"input{i}.npy", mmap_mode="r") for i in range(facts["inputs"]))
            labels = np.load(folder / "labels.npy", mmap_mode="r") if facts["labels"] else None
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as why:
            raise StorageError(f"cannot read the data in {folder}: {why}; start again in a new run folder") from why
        return cls(inputs=inputs, labels=labels)


def drawn(n: int, size: int, *, seed: int) -> Array:
    """`size` of the numbers below n, in their order, by a hash: the same with every version of every library.

    >>> drawn(10, 4, seed=0).tolist() == drawn(10, 4, seed=0).tolist()
    True
    """
    keys = [hashlib.blake2b(f"{seed} {i}".encode(), digest_size=8).digest() for i in range(n)]
    return np.sort(np.array(sorted(range(n), key=keys.__getitem__)[:size], dtype=np.int64))


class Sealed:
    """The *prove* view, shut. It tells its size and fingerprint; the examples come out through `open` only, which records it.

    Args:
        read: gives the view; called once at most.
        size: number of examples.
        fingerprint: of the view, so that a second opening of the same data is known as one.
    """

    def __init__(self, read: Callable[[], View], *, size: int, fingerprint: str) -> None:
        self._read = read
        self.size = size
        self.fingerprint = fingerprint

    def open(self, record: Callable[[str], None]) -> View:
        """Calls `record` with the fingerprint (it must have reached the disk when it returns), then gives the view."""
        record(self.fingerprint)
        return self._read()

    def part(self, size: int, *, seed: int) -> Sealed:
        """So many examples drawn at random before anyone has seen one, in their order, under the same seal."""
        index = drawn(self.size, size, seed=seed)
        return Sealed(lambda: self._read().take(index), size=len(index), fingerprint=self.fingerprint)


@dataclass(frozen=True, kw_only=True, eq=False)
class Views:
    """The user's data, cut for one run.

    Args:
        train: for gradients; `calibrate`, a part of it, for ranges of activations.
        select: every choice of the search looks here and nowhere else.
        prove: sealed; no choice touches it.
        provenance: "held out" if the user says that the original was not trained on *prove*, else "unknown".
    """

    train: View
    calibrate: View
    select: View
    prove: Sealed
    provenance: Provenance
