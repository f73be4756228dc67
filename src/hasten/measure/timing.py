"""Timing that can be believed.

The bias of a timing is per *launch*: two processes of one program differ by a few percent for as long as they live, so calls
inside one launch cannot tell two networks apart. The unit of replication is therefore a round of fresh launches. Inside a
round the contestants take turns in blocks (A B B A), and the ones that wait are stopped, so that spinning threads do not take
the cores from the one that is measured.

Shapes: round medians (rounds, contestants, batches) in milliseconds.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hasten.core.network import Arrays
from hasten.core.report import Interval, Latency
from hasten.core.runner import Runner
from hasten.measure import statistics

Array = np.ndarray[Any, Any]
T = TypeVar("T")
Progress = Callable[[float, str], None]


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A packed network that is to be timed: its folder, and the only batch size that it takes, if there is one."""

    folder: Path
    fixed_batch: int | None = None

    def launch(self) -> Runner:
        """A fresh process with the network loaded."""
        return Runner(self.folder, fixed_batch=self.fixed_batch)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How long and how often to time.

    Args:
        fewest: rounds of fresh launches at least.
        most: rounds at most; fewer once every interval's half-width is at most `half_width`.
        half_width: as a share of the ratio.
        block_ms: time that one block of calls aims at.
        blocks: per contestant, batch size and round; even, so that turns are ABBA.
        longest_s: after this time the fewest rounds are enough; the interval says what they are worth.
        hurry_s: where another round would end after this time, three rounds are enough.
    """

    fewest: int = 8
    most: int = 30
    half_width: float = 0.03
    block_ms: float = 40.0
    blocks: int = 4
    longest_s: float = 90.0
    hurry_s: float = math.inf

    def __post_init__(self) -> None:
        if not 2 <= self.fewest <= self.most:
            raise ValueError(f"rounds must be 2 <= fewest <= most, got {self.fewest} and {self.most}")


_ALONE = 4.0  # blocks that a call must take to be made alone
_FEW = 2  # blocks of such calls, where all are so long
HURRIED = 3  # rounds where there is no time for more
FULL = Protocol()
RANKING = Protocol(fewest=3, most=3)


@dataclass(frozen=True, kw_only=True, eq=False)
class Timing:
    """The times of several contestants, taken in the same rounds.

    Args:
        batches: the batch sizes.
        medians_ms: (rounds, contestants, batches).
        calls_ms: for each contestant and batch size, every call of every round.
        first_call_ms: (contestants, batches), mean over the rounds.
        peak_memory_bytes: per contestant, the median over the rounds.
    """

    batches: tuple[int, ...]
    medians_ms: Array
    calls_ms: Mapping[tuple[int, int], Array]
    first_call_ms: Array
    peak_memory_bytes: tuple[int, ...]

    def speedup(self, old: int, new: int) -> tuple[Interval, ...]:
        """Time of contestant `old` ÷ time of `new` for each batch size, with a 95 % t-interval over the rounds."""
        return tuple(self._interval(old, new, at) for at in range(len(self.batches)))

    def latency(self, who: int) -> tuple[Latency, ...]:
        """The distribution of the call times of one contestant for each batch size."""
        rounds = len(self.medians_ms)
        return tuple(
            summarize(self.calls_ms[who, at], batch=batch, launches=rounds, first_call_ms=float(self.first_call_ms[who, at]))
            for at, batch in enumerate(self.batches)
        )

    def _interval(self, old: int, new: int, at: int) -> Interval:
        logs = np.log(self.medians_ms[:, old, at] / self.medians_ms[:, new, at])
        ratio = statistics.ratio_interval(logs)
        return Interval(batch=self.batches[at], value=ratio.value, low=ratio.low, high=ratio.high, launches=len(logs))


def race(
    contestants: Sequence[Contestant],
    inputs: Arrays,
    batches: Sequence[int],
    *,
    protocol: Protocol | None = None,
    progress: Progress | None = None,
) -> Timing:
    """Times the contestants against each other.

    Args:
        contestants: the packed networks.
        inputs: one array per input; every call of a batch size sees the same rows, repeated where there are too few.
        batches: batch sizes.
        protocol: rounds and blocks; the full protocol if None.
        progress: called after each round with the share done, of the rounds that are to be expected, and a few words.

    Raises:
        ChildFailed: if a contestant cannot be loaded, crashes or hangs.
    """
    protocol = protocol or FULL
    pieces = [_piece(inputs, batch) for batch in batches]
    rounds: list[_Round] = []
    start = time.monotonic()
    while len(rounds) < protocol.most:
        rounds.append(_round(contestants, pieces, protocol, turn=len(rounds)))
        width = _widest(rounds)
        if progress:
            progress(len(rounds) / _expected(len(rounds), width, protocol), f"timing, round {len(rounds)}")
        if _enough(len(rounds), time.monotonic() - start, width, protocol):
            break
    return _gather(rounds, tuple(batches), len(contestants))


def summarize(calls_ms: Array, *, batch: int, launches: int, first_call_ms: float) -> Latency:
    """p50, p95 and, from 1,000 calls on, p99."""
    p50, p95, p99 = np.percentile(calls_ms, [50, 95, 99])
    return Latency(
        batch=batch,
        p50_ms=float(p50),
        p95_ms=float(p95),
        p99_ms=float(p99) if len(calls_ms) >= 1000 else None,
        calls=len(calls_ms),
        launches=launches,
        first_call_ms=first_call_ms,
    )


def quick(runner: Runner, inputs: Arrays, batches: Sequence[int], *, block_ms: float = 120.0) -> tuple[Latency, ...]:
    """A cheap look at one running network, for ranking only: one launch, so the figures may be off by several percent."""
    found = []
    for batch in batches:
        piece = _piece(inputs, batch)
        first, calls = _warm_up(runner, piece, block_ms)
        times = runner.time(piece, calls=calls) / 1e6
        found.append(summarize(times, batch=batch, launches=1, first_call_ms=first))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class _Round:
    calls_ms: dict[tuple[int, int], Array]
    first_call_ms: dict[tuple[int, int], float]
    peak_memory_bytes: list[int]

    def median(self, who: int, at: int) -> float:
        return float(np.median(self.calls_ms[who, at]))


def _round(contestants: Sequence[Contestant], pieces: Sequence[Arrays], protocol: Protocol, *, turn: int) -> _Round:
    count = len(contestants)
    order = [(i + turn) % count for i in range(count)]  # nobody always starts first
    with contextlib.ExitStack() as stack:
        runners: dict[int, Runner] = {}
        for who in order:
            runners[who] = stack.enter_context(contestants[who].launch())
            runners[who].pause()
        first, calls = {}, {}
        blocks: dict[tuple[int, int], list[Array]] = {(who, at): [] for at in range(len(pieces)) for who in order}
        for at, piece in enumerate(pieces):
            for who in order:
                first[who, at], calls[who, at] = _awake(runners[who], _warm_up, piece, protocol.block_ms)
            long = all(calls[who, at] == 1 for who in order)
            for who in _turns(order, _FEW if long else protocol.blocks):
                blocks[who, at].append(_awake(runners[who], _block, piece, calls[who, at]))
        memory = [runners[who].peak_memory_bytes() for who in range(count)]
    times = {key: np.concatenate(parts) for key, parts in blocks.items()}
    return _Round(calls_ms=times, first_call_ms=first, peak_memory_bytes=memory)


def _turns(order: Sequence[int], blocks: int) -> Iterator[int]:
    """A B C, C B A, A B C, …: what drifts while they take turns falls on all alike."""
    for block in range(blocks):
        yield from order if block % 2 == 0 else reversed(order)


def _piece(inputs: Arrays, batch: int) -> Arrays:
    return tuple(np.ascontiguousarray(a[np.arange(batch) % len(a)]) for a in inputs)


def _awake(runner: Runner, work: Callable[..., T], *arguments: Any) -> T:
    """Lets the runner run for the time of `work(runner, …)`."""
    runner.resume()
    try:
        return work(runner, *arguments)
    finally:
        runner.pause()


def _block(runner: Runner, piece: Arrays, calls: int) -> Array:
    times: Array = runner.time(piece, calls=calls) / 1e6
    return times


def _warm_up(runner: Runner, piece: Arrays, block_ms: float) -> tuple[float, int]:
    """The first call's time, and how many calls fill a block. The first calls of a process are slower: they are not counted."""
    first = float(runner.time(piece, calls=1)[0]) / 1e6
    end = time.perf_counter() + block_ms / 1e3
    guess = float(runner.time(piece, calls=2 if first < _ALONE * block_ms else 1).min()) / 1e6
    while time.perf_counter() < end:
        guess = float(np.median(runner.time(piece, calls=_fitting(guess, block_ms / 4)))) / 1e6
    return first, _fitting(guess, block_ms)


def _fitting(call_ms: float, block_ms: float) -> int:
    """One call where it takes several blocks, so that waking up weighs nothing, else three at least."""
    return 1 if call_ms >= _ALONE * block_ms else int(np.clip(block_ms / max(call_ms, 1e-4), 3, 2000))


def _widest(rounds: Sequence[_Round]) -> float:
    """The largest half-width among the ratios of each contestant to the last, as a share; infinite for a single round."""
    if len(rounds) < 2:
        return math.inf
    keys = rounds[0].calls_ms.keys()
    last = max(who for who, _ in keys)
    others = [(who, at) for who, at in keys if who != last]
    logs = [np.array([np.log(r.median(who, at) / r.median(last, at)) for r in rounds]) for who, at in others]
    ratios = [statistics.ratio_interval(log) for log in logs]
    return max((math.sqrt(r.high / r.low) - 1 for r in ratios), default=0.0)


def _enough(done: int, spent_s: float, width: float, protocol: Protocol) -> bool:
    """Whether so many rounds will do."""
    if spent_s * (done + 1) / done > protocol.hurry_s:
        return done >= min(HURRIED, protocol.fewest)
    return done >= protocol.fewest and (spent_s > protocol.longest_s or width <= protocol.half_width)


def _expected(done: int, width: float, protocol: Protocol) -> int:
    """How many rounds it will take in all: widths shrink with the root of their number."""
    if not math.isfinite(width) or protocol.half_width <= 0:
        return protocol.most
    wanted = done * (width / protocol.half_width) ** 2
    return int(np.clip(math.ceil(wanted), max(protocol.fewest, done), protocol.most))


def _gather(rounds: Sequence[_Round], batches: tuple[int, ...], count: int) -> Timing:
    cells = [[(who, at) for at in range(len(batches))] for who in range(count)]
    return Timing(
        batches=batches,
        medians_ms=np.array([[[r.median(*cell) for cell in row] for row in cells] for r in rounds]),
        calls_ms={cell: np.concatenate([r.calls_ms[cell] for r in rounds]) for row in cells for cell in row},
        first_call_ms=np.array([[np.mean([r.first_call_ms[cell] for r in rounds]) for cell in row] for row in cells]),
        peak_memory_bytes=tuple(int(np.median([r.peak_memory_bytes[who] for r in rounds])) for who in range(count)),
    )
