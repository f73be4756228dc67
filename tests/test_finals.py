"""Who goes to the proof, what is returned when the final timing shows no gain, and what may be picked afterwards."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from hasten.compress import QuantizeWeights
from hasten.core.errors import UsageError
from hasten.core.recipe import Recipe
from hasten.core.report import Bound, Chosen, Interval, Limit, Measurement, Trial
from hasten.engines import OnnxRuntime
from hasten.search import finals
from hasten.search.catalogue import Settings
from hasten.search.conclude import Finalists, leading
from hasten.search.finals import FinalTiming, contenders, smallest
from hasten.search.objective import Objective
from hasten.search.summary import Final, Offer
from sample_reports import latency, trial

ORIGINAL = trial(0, "Eager", p50=2.0)
PLAIN = trial(2, "OnnxRuntime", p50=1.0)
LOSSY = trial(7, "OnnxRuntime", "QuantizeStatic", p50=0.5, drop=0.002)
ALL = {t.number: t for t in (ORIGINAL, PLAIN, LOSSY)}
ONE = (Interval(batch=1, value=1.0, low=1.0, high=1.0, launches=8),)


def ratio(value: float, half: float) -> tuple[Interval, ...]:
    return (Interval(batch=1, value=value, low=value - half, high=value + half, launches=8),)


def finalists(over_plain: tuple[Interval, ...], plain_over_original: float, *, certified: tuple[int, ...] = (0, 2, 7)) -> Finalists:
    timed = FinalTiming(
        latency={0: (latency(1, plain_over_original),), 2: (latency(1, 1.0),), 7: (latency(1, 1 / over_plain[0].value),)},
        memory={0: 3, 2: 2, 7: 1},
        over_original={0: ONE, 2: ratio(plain_over_original, 0.1), 7: ratio(4.0, 0.1)},
        over_plain={0: ratio(1 / plain_over_original, 0.1), 2: ONE, 7: over_plain},
    )
    return Finalists(original=ORIGINAL, plain=PLAIN, certified=tuple(ALL[n] for n in certified), timed=timed)


@pytest.mark.parametrize(
    ("over_plain", "plain_over_original", "certified", "returned"),
    [
        (ratio(2.0, 0.1), 2.0, (0, 2, 7), 7),
        (ratio(1.1, 0.2), 2.0, (0, 2, 7), 2),  # a lossy gain must be shown
        (ratio(1.1, 0.2), 2.0, (7,), 7),  # the plain engine breaks a cap
        (ratio(0.9, 0.1), 4.0, (0, 2, 7), 2),  # between equal networks the estimate decides
        (ratio(0.8, 0.1), 0.9, (0, 2, 7), 0),
        (ratio(0.8, 0.1), 0.9, (2, 7), 2),
    ],
)
def test_what_is_returned(over_plain, plain_over_original, certified, returned) -> None:  # type: ignore[no-untyped-def]
    among = finalists(over_plain, plain_over_original, certified=certified)
    ranked = among.ranked(among.within(Limit(), 1), Objective())
    assert ranked[0].number == returned
    assert {t.number for t in ranked} == set(certified)


def test_caps_look_at_the_final_figures() -> None:
    among = finalists(ratio(2.0, 0.1), 2.0)
    assert [t.number for t in among.within(Limit(latency_ms=0.6), 1)] == [7]
    assert [t.number for t in among.within(Limit(peak_memory_bytes=2), 1)] == [2, 7]
    assert [t.number for t in among.within(Limit(examples_per_s=1_500), 1)] == [7]
    assert among.missed(ORIGINAL, Limit(min_speedup=1.5, energy_mj=3), 1) == ["0 mJ, cap 3 mJ", "1.00× faster, minimum 1.5×"]


def test_contenders_are_those_that_a_proof_is_expected_of_and_a_few_more() -> None:
    """Ten recipes in a row, each faster and lossier: the fastest alone would leave nothing that is proved."""
    trials = [trial(i, "OnnxRuntime", "QuantizeStatic", p50=10.0 / 1.2**i, drop=0.0014 * i) for i in range(10)]
    settings = Settings(limit=Limit(max_drop=0.01), prove_examples=2_000)
    likely = [t.number for t in trials if t.measurement and settings.promising(t.measurement)]
    chosen = [t.number for t in contenders(trials, settings)]
    assert max(likely) < 7  # what the estimate alone would let through
    assert chosen == [*sorted(likely, reverse=True)[:4], 9, 8]
    hot = {t.number: t.measurement for t in trials if t.measurement}
    assert leading([trials[n] for n in chosen], hot, settings).number == max(likely)


def test_the_safest_whose_answers_changed_is_among_the_contenders() -> None:
    trials = [trial(i, "OnnxRuntime", "QuantizeStatic", p50=10.0 / 1.2**i, drop=0.0005 * i) for i in range(8)]
    found = [t.number for t in contenders(trials, Settings(limit=Limit(max_drop=0.01), prove_examples=4_000))]
    assert found == [7, 1, 6, 5, 4]  # trial 0 answers as the original


def test_contenders_meet_the_caps_where_some_do() -> None:
    sizes = (900, 900, 500, 400)
    trials = [
        replace(t, measurement=replace(t.measurement, size_bytes=size)) if t.measurement else t
        for t, size in zip((ORIGINAL, PLAIN, LOSSY, trial(9, "OnnxRuntime", "QuantizeWeights", p50=0.9, drop=0.001)), sizes, strict=True)
    ]

    def numbers(**caps: float) -> list[int]:
        return [t.number for t in contenders(trials, Settings(limit=Limit(max_drop=0.01, **caps), batches=(1,), prove_examples=9_000))]  # type: ignore[arg-type]

    assert numbers(size_bytes=450) == [9]
    assert numbers(size_bytes=450, latency_ms=0.1) == numbers()  # none meets both: the caps are said at the end
    assert 7 in numbers(size_bytes=500)
    small = smallest(trials, trials[:2], Settings(limit=Limit(max_drop=0.01), batches=(1,)))
    assert [t.number for t in small] == [9]
    assert not smallest(trials, trials[2:], Settings(limit=Limit(max_drop=0.01), batches=(1,)))  # 400 bytes are among them


@pytest.mark.parametrize(("cap", "stays"), [(None, False), (450, True)])
def test_what_a_cap_needs_is_not_dropped_for_gaining_no_time(monkeypatch: pytest.MonkeyPatch, cap: int | None, stays: bool) -> None:
    steps = Recipe((QuantizeWeights(),), OnnxRuntime())
    plain = Recipe((), OnnxRuntime())
    made = trial(3, "OnnxRuntime", p50=1.0)
    small = replace(made, number=3, recipe=steps.to_json(), measurement=sized(made, 400))
    large = replace(made, number=4, recipe=plain.to_json(), measurement=sized(made, 900))
    monkeypatch.setattr(finals, "heat", lambda bench, trials, progress: {t.number: t.measurement for t in trials})
    bench: Any = SimpleNamespace(settings=Settings(limit=Limit(size_bytes=cap), batches=(1,)), attempt=lambda recipe, progress: large)
    bench.store = SimpleNamespace(trials=lambda: [large])
    best, _ = finals.ablate(bench, small)
    assert (best is small) == stays


def sized(made: Trial, size: int) -> Measurement:
    assert made.measurement
    return replace(made.measurement, size_bytes=size)


def chosen(tried: Trial, ms: float, size: int) -> Chosen:
    return Chosen(
        trial=tried.number, recipe=tried.recipe, words=tried.words, speedup=ONE, speedup_over_best_plain=ONE, score=0.9,
        score_drop=Bound(value=0.0, upper=0.0, n=9, method="equal outputs"), size_bytes=size, peak_memory_bytes=1, parameters=None,
        macs=None, latency_ms=(latency(1, ms),),
    )  # fmt: skip


FINAL = Final(
    baselines={},
    offers=(
        Offer(chosen=chosen(LOSSY, 1.0, 900), verdict="kept"),
        Offer(chosen=chosen(PLAIN, 1.2, 400), verdict="equal"),
        Offer(chosen=chosen(ORIGINAL, 9.0, 300), verdict="equal"),
    ),
    taken=7,
)


def test_picking_offers_certified_candidates_only() -> None:
    assert [FINAL.pick(word, 1) for word in ("fastest", "smallest", "balanced", "2")] == [7, 0, 2, 2]
    with pytest.raises(UsageError, match=r"certified trials \[7, 2, 0\], got '5'"):
        FINAL.pick("5", 1)
    with pytest.raises(UsageError, match="nothing to pick: too large"):
        replace(FINAL, taken=None, closest_miss="too large").pick("fastest", 1)
    assert Final.from_json(FINAL.to_json()) == FINAL
