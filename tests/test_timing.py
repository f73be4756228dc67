"""Timing: the arithmetic on known times. How honest it is on a real machine is a benchmark, not a test."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest

from hasten.core.errors import ChildFailed
from hasten.measure import timing
from hasten.measure.timing import Contestant, Protocol, Timing

SHORT = Protocol(fewest=2, most=2, block_ms=5, blocks=2)


def sleeper(folder: Path, ms: float) -> Path:
    """A "network" that sleeps: the times are known to be far apart whatever the machine does."""
    folder.mkdir()
    (folder / "load.py").write_text(
        f"import time\n\ndef load(folder):\n    def run(x):\n        time.sleep({ms} / 1e3)\n        return (x,)\n    return run\n"
    )
    return folder


@pytest.mark.parametrize(("ms", "calls"), [((900.0, 800.0), 4), ((900.0, 0.001), 6)])
def test_long_calls_take_fewer_turns_where_all_are_long(ms: tuple[float, float], calls: int) -> None:
    asked = [0, 0]

    class One:
        def __init__(self, who: int) -> None:
            self.who = who

        def __enter__(self) -> One:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def launch(self) -> One:
            return self

        def time(self, piece: object, *, calls: int) -> np.ndarray:  # type: ignore[type-arg]
            del piece
            asked[self.who] += 1
            return np.full(calls, ms[self.who] * 1e6)

        def nothing(self) -> int:
            return 0

        pause = resume = peak_memory_bytes = nothing

    timing._round([One(0), One(1)], [()], Protocol(block_ms=0.001), turn=0)  # type: ignore[list-item]
    assert asked[0] == calls


def test_a_call_that_takes_several_blocks_is_made_once_for_each() -> None:
    asked: list[int] = []

    class Slow:
        def time(self, piece: object, *, calls: int) -> np.ndarray:  # type: ignore[type-arg]
            del piece
            asked.append(calls)
            return np.full(calls, 160e6)

    assert timing._warm_up(Slow(), (), 40.0)[1] == 1  # type: ignore[arg-type]
    assert asked[:2] == [1, 1]
    assert timing._fitting(159.0, 40.0) == 3
    assert timing._fitting(4.0, 40.0) == 10


def test_a_race_tells_the_fast_from_the_slow(tmp_path: Path) -> None:
    contestants = [Contestant(folder=sleeper(tmp_path / "slow", 20)), Contestant(folder=sleeper(tmp_path / "fast", 2))]
    heard: list[float] = []
    timed = timing.race(contestants, (np.zeros((4, 2)),), [1, 4], protocol=SHORT, progress=lambda share, words: heard.append(share))
    assert timed.medians_ms.shape == (2, 2, 2)
    for interval in timed.speedup(0, 1):
        assert interval.value > 2
        assert interval.low <= interval.value <= interval.high
    assert [entry.batch for entry in timed.latency(0)] == [1, 4]
    assert timed.latency(0)[0].p50_ms >= 20
    assert timed.latency(0)[0].launches == 2
    assert all(memory > 1 << 20 for memory in timed.peak_memory_bytes)
    assert heard == [0.5, 1.0]


def test_speedups_are_ratios_of_round_medians() -> None:
    medians = np.array([[[4.0], [2.0]], [[6.0], [2.0]]])
    calls = {(0, 0): np.array([4.0, 6.0]), (1, 0): np.array([2.0, 2.0])}
    timed = Timing(batches=(1,), medians_ms=medians, calls_ms=calls, first_call_ms=np.ones((2, 1)), peak_memory_bytes=(1, 1))
    (interval,) = timed.speedup(0, 1)
    assert interval.value == pytest.approx(np.sqrt(6.0))
    (back,) = timed.speedup(1, 0)
    assert back.low == pytest.approx(1 / interval.high)


def test_p99_is_given_from_a_thousand_calls_on() -> None:
    few = timing.summarize(np.arange(999.0), batch=1, launches=1, first_call_ms=1)
    many = timing.summarize(np.arange(1000.0), batch=1, launches=1, first_call_ms=1)
    assert few.p99_ms is None
    assert many.p99_ms == pytest.approx(989.01)
    assert many.p50_ms == pytest.approx(499.5)


def test_rounds_go_on_until_the_interval_is_narrow(tmp_path: Path) -> None:
    folder = sleeper(tmp_path / "a", 3)
    exact = Protocol(fewest=2, most=3, half_width=0.0, block_ms=3, blocks=2)
    loose = Protocol(fewest=2, most=3, half_width=10.0, block_ms=3, blocks=2)
    inputs = (np.zeros((1, 1)),)
    both = [Contestant(folder=folder)] * 2
    assert len(timing.race(both, inputs, [1], protocol=exact).medians_ms) == 3
    assert len(timing.race(both, inputs, [1], protocol=loose).medians_ms) == 2


@pytest.mark.parametrize(
    ("hurry_s", "round_s", "rounds"),
    [(math.inf, 1, 30), (math.inf, 5, 19), (math.inf, 20, 8), (60, 5, 12), (60, 10, 6), (15, 5, 3), (0, 5, 3)],
)
def test_rounds_fit_into_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch, hurry_s: float, round_s: float, rounds: int) -> None:
    """Of a noisy pair: thirty rounds at most, eight at least, and three where there is no time."""
    now = [0.0]

    def one(*_: object, turn: int, **__: object) -> timing._Round:
        now[0] += round_s
        times = {(0, 0): np.ones(2), (1, 0): np.full(2, 1.0 + turn % 2)}
        return timing._Round(calls_ms=times, first_call_ms=dict.fromkeys(times, 1.0), peak_memory_bytes=[1, 1])

    monkeypatch.setattr(timing, "_round", one)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    found = timing.race([Contestant(folder=Path())] * 2, (np.ones((1, 1)),), (1,), protocol=Protocol(hurry_s=hurry_s))
    assert len(found.medians_ms) == rounds


def test_a_contestant_that_cannot_start_is_named(tmp_path: Path) -> None:
    (tmp_path / "load.py").write_text("def load(folder):\n    raise OSError('no weights')\n")
    with pytest.raises(ChildFailed, match="no weights"):
        timing.race([Contestant(folder=tmp_path)] * 2, (np.zeros((1, 1)),), [1], protocol=SHORT)


def test_a_protocol_needs_two_rounds() -> None:
    with pytest.raises(ValueError, match="2 <= fewest <= most, got 1 and 3"):
        Protocol(fewest=1, most=3)


def test_too_few_rows_are_repeated_to_fill_a_batch() -> None:
    rows = np.array([[1.0], [2.0], [3.0]])
    (piece,) = timing._piece((rows,), 5)
    assert piece[:, 0].tolist() == [1, 2, 3, 1, 2]
