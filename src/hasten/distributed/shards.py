"""The examples of a data set, answered by several runners side by side and put together in their order."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from hasten.core.errors import BackendMissing, HastenError, WorkerLost
from hasten.core.network import Arrays
from hasten.core.runner import Runner, joined

_BATCHES = 16  # in a shard


def outputs(
    starts: Sequence[Callable[[], Runner]],
    inputs: Arrays,
    *,
    batch: int = 64,
    progress: Callable[[float, str], None] | None = None,
) -> Arrays:
    """The outputs for all examples, as `Runner.outputs` gives them.

    Each runner takes the next shard when it has answered one. The shard of a runner that is lost goes to another; one that cannot start is
    done without.

    Args:
        starts: start one runner each, which is closed at the end.
        inputs: one array per input, the first axis the examples, at least one.
        batch: examples of a call.

    Raises:
        WorkerLost, BackendMissing: if no runner is left.
        HastenError: what a runner raised; the others stop at their next shard.
    """
    round_ = _Round(inputs, batch, progress)
    left = list(starts)[: round_.count]
    while not round_.done:
        with ThreadPoolExecutor(len(left)) as pool:
            try:
                losses = list(pool.map(round_.work, left))
            except BaseException:  # Ctrl-C among them: nobody begins another shard
                round_.waiting.clear()
                raise
        left = [start for start, lost in zip(left, losses, strict=True) if lost is None]
        if not left and not round_.done:
            raise next(lost for lost in losses if lost is not None)
    return joined(round_.found[at] for at in sorted(round_.found))


class _Round:
    """The shards of some inputs, those that wait for a runner and those that are answered; used by several threads."""

    def __init__(self, inputs: Arrays, batch: int, progress: Callable[[float, str], None] | None) -> None:
        self._inputs, self._batch, self._size, self._progress = inputs, batch, batch * _BATCHES, progress
        self.waiting = deque(range(0, len(inputs[0]), self._size))
        self.count, self.found = len(self.waiting), dict[int, Arrays]()

    @property
    def done(self) -> bool:
        """Whether all are answered."""
        return len(self.found) == self.count

    def work(self, start: Callable[[], Runner]) -> HastenError | None:
        """Answers shards until there are none; the loss, where the runner was lost or could not start."""
        at = None
        try:
            with start() as runner:
                while (at := self._take()) is not None:
                    self._answer(runner, at)
        except (WorkerLost, BackendMissing) as why:
            self.waiting.extend(() if at is None else (at,))
            return why
        except BaseException:
            self.waiting.clear()
            raise
        return None

    def _take(self) -> int | None:
        with contextlib.suppress(IndexError):  # another may have been quicker since one looked
            return self.waiting.popleft()
        return None

    def _answer(self, runner: Runner, at: int) -> None:
        self.found[at] = runner.outputs(tuple(a[at : at + self._size] for a in self._inputs), batch=self._batch)
        if self._progress:
            rows = len(self._inputs[0])
            self._progress(len(self.found) / self.count, f"{min(len(self.found) * self._size, rows):,} of {rows:,} examples answered")
