"""The examples of a data set, answered by several runners side by side and put together in their order."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from hasten.core.errors import WorkerLost
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

    Each runner takes the next shard when it has answered one. The shard of a runner that is lost goes to another.

    Args:
        starts: start one runner each, which is closed at the end.
        inputs: one array per input, the first axis the examples, at least one.
        batch: examples of a call.

    Raises:
        WorkerLost: if all runners were lost.
        HastenError: what a runner raised; the others stop at their next shard.
    """
    size = batch * _BATCHES
    waiting = deque(range(0, len(inputs[0]), size))
    count, found = len(waiting), dict[int, Arrays]()

    def take() -> int | None:
        with contextlib.suppress(IndexError):  # another may have been quicker since one looked
            return waiting.popleft()
        return None

    def answer(runner: Runner, at: int) -> None:
        found[at] = runner.outputs(tuple(a[at : at + size] for a in inputs), batch=batch)
        if progress:
            done = min(len(found) * size, len(inputs[0]))
            progress(len(found) / count, f"{done:,} of {len(inputs[0]):,} examples answered")

    def work(start: Callable[[], Runner]) -> WorkerLost | None:
        """Answers shards until there are none; the loss, where the runner was lost."""
        at = None
        try:
            with start() as runner:
                while (at := take()) is not None:
                    answer(runner, at)
        except WorkerLost as why:
            waiting.extend(() if at is None else (at,))
            return why
        except BaseException:
            waiting.clear()
            raise
        return None

    left = list(starts)
    while len(found) < count:
        with ThreadPoolExecutor(len(left)) as pool:
            losses = list(pool.map(work, left))
        left = [start for start, lost in zip(left, losses, strict=True) if lost is None]
        if not left:
            raise next(lost for lost in losses if lost is not None)
    return joined(found[at] for at in sorted(found))
