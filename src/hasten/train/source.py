"""Where batches come from: tensors in memory, or a stream that is read batch by batch.

Shapes: inputs, one tensor per network input, each (n, …) of the data or (batch, …) of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch

from hasten.core.data import Array
from hasten.core.errors import DataRefused, UsageError
from hasten.train.chance import put_random_states, random_states
from hasten.train.outputs import Tensors
from hasten.train.sampler import Sampler
from hasten.train.targets import Targets


class Source(Protocol):
    """Batches without end."""

    @property
    def per_pass(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def begun(self) -> int: ...
    @property
    def done(self) -> int: ...
    def next(self) -> tuple[torch.Tensor, Tensors]: ...
    def state(self) -> dict[str, Any]: ...
    def load(self, state: dict[str, Any]) -> None: ...


class Resident:
    """All data as tensors; batches are gathered by a sampler."""

    def __init__(self, inputs: Tensors, sampler: Sampler, device: torch.device) -> None:
        self._inputs, self._sampler, self._device = inputs, sampler, device

    @property
    def per_pass(self) -> int:
        """Batches in a pass."""
        return self._sampler.per_pass

    @property
    def size(self) -> int:
        """Examples in a batch."""
        return self._sampler.size

    @property
    def begun(self) -> int:
        """Passes begun."""
        return self._sampler.passes

    @property
    def done(self) -> int:
        """Passes finished."""
        return self._sampler.done

    def next(self) -> tuple[torch.Tensor, Tensors]:
        """The places of the next batch and its inputs."""
        index = next(self._sampler)
        return index, tuple(a.index_select(0, index.to(a.device)).to(self._device) for a in self._inputs)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return self._sampler.state()

    def load(self, state: dict[str, Any]) -> None:
        """Takes up what `state` gave."""
        self._sampler.load(state)


class Stream:
    """The batches of an iterable that can be gone through again and again, such as a DataLoader.

    Taken up in the middle of a pass, it is gone through from the pass's beginning, with the random states of then, to the batch
    that was next. That is exact where all that it draws follows from those of torch, Python and NumPy, as the order of a
    DataLoader does.

    Args:
        batches: of x, (x, y) or (x1, x2, …, y), tensors or arrays.
        labelled: whether the last part of a batch are its labels.
    """

    def __init__(self, batches: Iterable[Any], device: torch.device, *, labelled: bool) -> None:
        if iter(batches) is batches:
            raise UsageError(f"a stream must begin anew for every pass, got an iterator ({type(batches).__name__}); give what makes one")
        self._batches, self._device, self._labelled = batches, device, labelled
        self._targets: Targets | None = None
        self._iterator: Iterator[Any] | None = None
        self._start = random_states()
        self._taken, self._first = 0, self._read(next(iter(batches), None))
        self.begun, self.size = 0, len(self._first[0][0])
        self.per_pass = _length(batches)
        self._peeked: Any = None

    @property
    def first(self) -> tuple[Tensors, Array | None]:
        """Inputs and labels of a first batch, to look at."""
        return self._first

    @property
    def done(self) -> int:
        """Passes finished."""
        return self.begun - 1 if self._peeked is not None else self.begun

    def feed(self, targets: Targets | None) -> None:
        """Where the labels of each batch go."""
        self._targets = targets

    def next(self) -> tuple[torch.Tensor, Tensors]:
        """The next batch, its labels put into the targets."""
        if self._peeked is None:
            self._begin(random_states(), 0)
        inputs, labels = self._read(self._peeked)
        assert self._iterator is not None
        self._peeked, self._taken = next(self._iterator, None), self._taken + 1
        if self._targets is not None and labels is not None:
            self._targets.put(labels)
        return torch.arange(len(inputs[0])), inputs

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"start": self._start, "taken": self._taken, "begun": self.begun, "open": self._peeked is not None}

    def load(self, state: dict[str, Any]) -> None:
        """Takes up what `state` gave; leaves the random states as they are."""
        now = random_states()
        self._peeked = self._iterator = None
        if state["open"]:
            start = state["start"] if isinstance(state["start"], dict) else {"random": state["start"]}  # torch's alone, once
            put_random_states(start)
            self._begin(start, state["taken"])
        self.begun = state["begun"]
        put_random_states(now)

    def _begin(self, start: dict[str, Any], skipped: int) -> None:
        self._start, self._taken = start, skipped
        self._iterator = iter(self._batches)
        for _ in range(skipped):
            next(self._iterator, None)
        self._peeked = next(self._iterator, None)
        if self._peeked is None:
            raise DataRefused(f"the stream must give batches in every pass, got none in pass {self.begun + 1} behind {skipped}")
        self.begun += 1

    def _read(self, item: Any) -> tuple[Tensors, Array | None]:
        if item is None:
            raise DataRefused("the stream must give batches, got none")
        parts = list(item) if isinstance(item, (tuple, list)) else [item]
        if not all(isinstance(p, (torch.Tensor, np.ndarray)) for p in parts):
            raise UsageError(f"a batch must be tensors or arrays, got {[type(p).__name__ for p in parts]}")
        labels = np.asarray(parts.pop()) if self._labelled and len(parts) > 1 else None
        return tuple(torch.as_tensor(p).to(self._device) for p in parts), labels


def _length(batches: Iterable[Any]) -> int:
    """Batches in a pass; 0 where that is not known before its end. A DataLoader has a length that raises where its data has none."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return 0
