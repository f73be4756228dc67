"""A packed network, running in its own process.

The folder that an engine packed holds `load.py`; the process executes that very file, so what is measured is what the user
receives.
"""

from __future__ import annotations

import math
import runpy
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hasten.core.child import Child, Reply
from hasten.core.errors import ChildFailed
from hasten.core.network import Arrays

_MOST, _ROOM = 64, 4 << 20

_run: Callable[..., Arrays] | None = None


class Caller(Protocol):
    """A process that calls functions by their names: a `Child` here, or one on another machine."""

    def call(self, function: str, /, *arrays: np.ndarray[Any, Any], deadline_s: float | None = None, **values: Any) -> Reply: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def peak_memory_bytes(self) -> int: ...
    def close(self) -> None: ...


class Runner:
    """A callable on arrays in its own worker process. A context manager; leaving it kills the process.

    Args:
        folder: what an engine packed, where the process finds it.
        deadline_s: seconds that loading, or one request, may take.
        ends: moment of the monotonic clock at which all of it must be done.
        memory_bytes: address space that the process may take.
        fixed_batch: the only batch size that the network takes; calls are cut and padded to it.
        child: the process; one of its own here without it.

    Raises:
        ChildFailed: if the network cannot be loaded, crashes or hangs.
    """

    def __init__(
        self,
        folder: Path,
        *,
        deadline_s: float = 120.0,
        ends: float = math.inf,
        memory_bytes: int | None = None,
        fixed_batch: int | None = None,
        child: Caller | None = None,
    ) -> None:
        self._folder = folder
        self._deadline_s, self._ends = deadline_s, ends
        self._fixed_batch = fixed_batch
        self._child: Caller = child or Child(memory_bytes=memory_bytes)
        try:
            self._child.call("hasten.core.runner:_open", folder=str(folder), deadline_s=self._left_s())
        except BaseException:
            self._child.close()
            raise

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, *inputs: np.ndarray[Any, Any]) -> Arrays:
        """The outputs for one batch, a tuple of arrays."""
        return piecewise(self._once, inputs, self._fixed_batch) if self._fixed_batch else self._once(*inputs)

    def outputs(self, inputs: Arrays, *, batch: int | None = None) -> Arrays:
        """The outputs for all examples, in batches of a size, or of one that suits them."""
        batch = batch or batch_of(inputs)
        if self._fixed_batch:
            batch = max(1, batch // self._fixed_batch) * self._fixed_batch
        return joined(self(*(np.asarray(a[start : start + batch]) for a in inputs)) for start in range(0, len(inputs[0]), batch))

    def time(self, inputs: Arrays, *, calls: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Nanoseconds of `calls` consecutive calls on `inputs`, measured inside the process."""
        reply = self._child.call("hasten.core.runner:_time", *inputs, calls=calls, deadline_s=self._left_s())
        times: np.ndarray[Any, np.dtype[np.int64]] = reply.arrays[0]
        return times

    def pause(self) -> None:
        """Stops the process, so that its spinning threads leave the cores to another."""
        self._child.pause()

    def resume(self) -> None:
        """Lets it run on."""
        self._child.resume()

    def peak_memory_bytes(self) -> int:
        """Resident set of the process at its highest so far."""
        return self._child.peak_memory_bytes()

    def save(self, folder: Path) -> None:
        """Copies the packed network to `folder`, which must not exist; it runs there without hasten."""
        shutil.copytree(self._folder, folder)

    def close(self) -> None:
        """Kills the process."""
        self._child.close()

    def _once(self, *rows: np.ndarray[Any, Any]) -> Arrays:
        return self._child.call("hasten.core.runner:_call", *rows, deadline_s=self._left_s()).arrays

    def _left_s(self) -> float:
        left_s = self._ends - time.monotonic()
        if left_s <= 0:
            raise ChildFailed("the time that there was for it is over: stopped")
        return min(self._deadline_s, left_s)


def batch_of(inputs: Arrays) -> int:
    """Examples that are best answered together: 64, or as many as take 4 MiB, 2 at least: what caches hold takes less time for each."""
    each = sum(a.nbytes for a in inputs) // max(1, len(inputs[0]))
    return max(2, min(_MOST, _ROOM // max(1, each)))


def piecewise(run: Callable[..., Arrays], inputs: Arrays, size: int) -> Arrays:
    """What `run` gives for all rows, in pieces of exactly `size`: the last one is filled up with its last row."""
    pieces = []
    for start in range(0, len(inputs[0]), size):
        rows = [a[start : start + size] for a in inputs]
        real = len(rows[0])
        full = [np.concatenate([r, np.repeat(r[-1:], size - real, axis=0)]) if real < size else r for r in rows]
        pieces.append(tuple(o[:real] for o in run(*full)))
    return joined(pieces)


def joined(pieces: Iterable[Arrays]) -> Arrays:
    """The outputs of several calls as those of one."""
    return tuple(np.concatenate(parts) for parts in zip(*pieces, strict=True))


def _open(*, folder: str) -> None:
    global _run
    _run = runpy.run_path(str(Path(folder) / "load.py"))["load"](folder)


def _call(*inputs: np.ndarray[Any, Any]) -> Reply:
    assert _run is not None
    return Reply(arrays=tuple(np.asarray(o) for o in _run(*inputs)))


def _time(*inputs: np.ndarray[Any, Any], calls: int) -> Reply:
    assert _run is not None
    marks = np.empty(calls + 1, np.int64)
    run, clock = _run, time.perf_counter_ns
    marks[0] = clock()
    for i in range(calls):
        run(*inputs)
        marks[i + 1] = clock()
    return Reply(arrays=(np.diff(marks),))
