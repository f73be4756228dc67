"""A training that cannot end in time is stopped when its progress says so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hasten.core.errors import ChildFailed
from hasten.search.pace import Pace


def told(events: list[tuple[float, float]], deadline_s: float) -> tuple[Pace, list[float]]:
    """A pace that hears of shares at given seconds, and what it passed on."""
    times: Iterator[float] = iter([0.0, *(at for at, _ in events)])
    heard: list[float] = []
    pace = Pace(lambda share, words: heard.append(share), deadline_s=deadline_s, clock=lambda: next(times))
    for _, share in events:
        pace(share, "")
    return pace, heard


def test_the_pace_leaves_out_what_came_before_the_first_step() -> None:
    pace, heard = told([(30.0, 0.01), (31.0, 0.11), (32.0, 0.21)], 100.0)
    assert pace.whole_s == pytest.approx(10.0)
    assert heard == [0.01, 0.11, 0.21]


def test_of_several_trainings_the_last_one_tells() -> None:
    pace, _ = told([(1.0, 0.5), (2.0, 1.0), (10.0, 0.1), (11.0, 0.2)], 100.0)
    assert pace.whole_s == pytest.approx(10.0)


def test_a_hopeless_one_is_stopped_once_its_pace_is_sure() -> None:
    slow = [(1.0, 0.01), (3.0, 0.02), (4.0, 0.03)]
    pace, heard = told(slow, 100.0)  # 150 s, but it has been looked at for 3 s only
    assert len(heard) == 3
    with pytest.raises(ChildFailed, match=r"it would take about 150 s, more than there was: stopped"):
        told([*slow, (7.0, 0.05)], 100.0)
    assert told([*slow, (7.0, 0.05)], 130.0)[0].whole_s == pytest.approx(150.0)
    del pace


def test_one_that_is_nearly_in_time_may_try() -> None:
    told([(1.0, 0.01), (11.0, 0.11), (51.0, 0.51)], 92.0)
