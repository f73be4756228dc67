"""In which order candidates go before *prove*, by what *select* tells."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hasten.core.report import Limit, Trial
from hasten.search.catalogue import Settings
from hasten.search.risk import risks
from sample_reports import measured

SETTINGS = Settings(limit=Limit(max_drop=0.01), select_examples=500)


def seen(number: int, drop: float, flips: float | None, distance: float | None) -> Trial:
    made = replace(measured(1.0, drop, 1), score_drop=drop, flips=flips, distance=distance)
    return Trial(number=number, recipe={}, words="", state="finished", measurement=made)


def test_flips_that_were_not_seen_count_by_the_distance() -> None:
    rounded, trained, others = seen(1, 0.002, 0.002, 0.01), seen(2, 0.0, 0.0, 0.2), [seen(n, 0.03, 0.04, 0.4) for n in (3, 4)]
    found = risks([rounded, trained, *others], SETTINGS)
    assert found[2] == pytest.approx(1.645 * (0.02 / 500) ** 0.5, rel=1e-3)  # 0.1 flips for each unit of distance
    assert found[1] < found[2] < found[3]


def test_the_drop_decides_between_those_that_are_as_far() -> None:
    found = risks([seen(1, 0.0085, 0.036, 0.1993), seen(2, -0.0035, 0.032, 0.1998)], SETTINGS)
    assert found[2] < found[1]


def test_what_did_not_change_risks_nothing() -> None:
    assert risks([seen(1, 0.0, 0.0, 1e-7), seen(2, 0.03, 0.04, 0.4)], SETTINGS)[1] == pytest.approx(0.0, abs=1e-3)


def test_without_flips_it_is_the_drop() -> None:
    assert risks([seen(1, 0.004, None, 0.3), seen(2, 0.001, 0.02, None)], replace(SETTINGS, select_examples=0)) == {1: 0.004, 2: 0.001}


def test_easy_examples_do_not_make_what_was_trained_safer_than_what_was_rounded() -> None:
    rounded, trained = seen(1, 0.002, 0.002, 0.01), [seen(n, 0.0, 0.001 * n, 0.2) for n in (2, 3)]
    found = risks([rounded, *trained], SETTINGS)
    assert found[1] < min(found[2], found[3])
