"""What is returned when the final timing shows no gain."""

from __future__ import annotations

import pytest

from hasten.core.report import Interval
from hasten.search.finals import FinalTiming
from hasten.search.run import fall_back
from sample_reports import latency, trial

ORIGINAL = trial(0, "Eager", p50=2.0)
PLAIN = trial(2, "OnnxRuntime", p50=1.0)
LOSSY = trial(7, "OnnxRuntime", "QuantizeStatic", p50=0.5, drop=0.002)


def ratio(value: float, half: float) -> tuple[Interval, ...]:
    return (Interval(batch=1, value=value, low=value - half, high=value + half, launches=8),)


def timing(over_plain: tuple[Interval, ...], plain_over_original: tuple[Interval, ...]) -> FinalTiming:
    return FinalTiming(
        original=(latency(1, 2.0),),
        plain=(latency(1, 1.0),),
        best=(latency(1, 0.5),),
        over_original=ratio(4.0, 0.1),
        over_plain=over_plain,
        plain_over_original=plain_over_original,
        memory=(3, 2, 1),
    )


@pytest.mark.parametrize(
    ("over_plain", "plain_over_original", "allowed", "returned"),
    [
        (ratio(2.0, 0.1), ratio(2.0, 0.1), (0, 2, 7), LOSSY),
        (ratio(1.1, 0.2), ratio(2.0, 0.1), (0, 2, 7), PLAIN),  # a lossy gain must be shown
        (ratio(1.1, 0.2), ratio(2.0, 0.1), (7,), LOSSY),  # the plain engine breaks a cap
        (ratio(1.0, 0.1), ratio(4.0, 3.5), (0, 2, 7), PLAIN),  # between equal networks the estimate decides
        (ratio(1.0, 0.1), ratio(0.9, 0.3), (0, 2, 7), ORIGINAL),
        (ratio(1.0, 0.1), ratio(0.9, 0.3), (2, 7), PLAIN),
    ],
)
def test_what_is_returned(over_plain, plain_over_original, allowed, returned) -> None:  # type: ignore[no-untyped-def]
    best, timed = fall_back(ORIGINAL, PLAIN, LOSSY, timing(over_plain, plain_over_original), allowed=allowed, batch=1)
    assert best.number == returned.number
    own = {7: (0.5, 1), 2: (1.0, 2), 0: (2.0, 3)}[best.number]
    assert (timed.best[0].p50_ms, timed.memory[2]) == own


def test_the_figures_of_the_network_as_given_are_the_inverse_of_the_plain_engines() -> None:
    best, timed = fall_back(ORIGINAL, PLAIN, PLAIN, timing(ratio(1.0, 0.0), ratio(0.8, 0.1)), allowed=(0, 2), batch=1)
    assert best.number == 0
    (over,) = timed.over_plain
    assert (over.value, over.low, over.high) == pytest.approx((1 / 0.8, 1 / 0.9, 1 / 0.7))
    assert timed.over_original[0].value == 1
