"""What the sentence, the terminal and the page read off a report: no new figure, only ratios of those that are in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from hasten.core.report import Baseline, Certificate, Interval, Latency, Report, Trial

AS_GIVEN = "as given"
BEST_PLAIN = "best plain engine"

Badge = Literal["equal", "kept", "not shown", "exceeded", "estimate only", "cap not met", "running", "interrupted"]
Outcome = Literal["unfinished", "no result", "as given", "plain engine", "new"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One trial with its ranking figures: p50 of the network as given ÷ p50 of the trial, and the drop, both on *select*."""

    trial: Trial
    speedup: float | None
    drop: float | None
    chosen: bool
    front: bool


def headline_batch(report: Report) -> int:
    """The batch size whose latency was to fall."""
    return report.batch


def ranking_batch(report: Report) -> int:
    """The batch size at which the trials are compared: the user's, or the last other one that they were timed at."""
    timed = {latency.batch for t in report.trials if t.measurement for latency in t.measurement.latency}
    return report.batch if report.batch in timed else max(timed, default=report.batch)


def pace(interval: Interval) -> Literal["faster", "slower", "no difference shown"]:
    """What an interval of a speed-up shows: "faster" from 1.02 up, "slower" from 1 ÷ 1.02 down."""
    if interval.faster:
        return "faster"
    return "slower" if 0 < interval.low <= interval.high < 1 / 1.02 else "no difference shown"


def turned(interval: Interval) -> Interval:
    """A slow-down as new ÷ old, so that "1.6× slower" stands beside its own interval; anything else as it is."""
    if pace(interval) != "slower":
        return interval
    return replace(interval, value=1 / interval.value, low=1 / interval.high, high=1 / interval.low)


def entry(latencies: Sequence[Latency], batch: int) -> Latency | None:
    """The latency at a batch size, if it was timed."""
    return next((latency for latency in latencies if latency.batch == batch), None)


def at_batch(intervals: Sequence[Interval], batch: int) -> Interval | None:
    """The interval at a batch size, if there is one."""
    return next((interval for interval in intervals if interval.batch == batch), None)


def outcome(report: Report) -> Outcome:
    """What came out of the run.

    "as given" is the network and the engine of the user, "plain engine" the user's network, bit for bit, in a faster one.
    """
    if report.state != "finished":
        return "unfinished"
    if report.chosen is None:
        return "no result"
    given = report.baselines.get(AS_GIVEN)
    if given is not None and given.trial == report.chosen.trial:
        return "as given"
    if not report.chosen.recipe.get("steps") and report.verdict == "equal":
        return "plain engine"
    return "new"


def badge(report: Report) -> Badge:
    """The verdict in one or two words."""
    if report.state != "finished":
        return report.state
    if report.chosen is None:
        return report.verdict if report.verdict in ("not shown", "exceeded") else "cap not met"
    if report.verdict in ("equal", "kept"):
        return report.verdict
    return "estimate only"


def tone(report: Report) -> Literal["good", "bad", "plain"]:
    """How the badge is coloured."""
    tones: dict[Badge, Literal["good", "plain"]] = {"equal": "good", "kept": "good", "running": "plain", "interrupted": "plain"}
    return tones.get(badge(report), "bad")


def first_failure(report: Report) -> Certificate | None:
    """The certificate at which the sequence of tests stopped."""
    return next((c for c in report.certificates if c.verdict in ("not shown", "exceeded")), None)


def rows(report: Report) -> tuple[Row, ...]:
    """Every trial in the order of its number."""
    batch, front = ranking_batch(report), {point.trial: point for point in report.pareto}
    first = next((t.measurement for t in sorted(report.trials, key=lambda t: t.number) if t.measurement), None)
    base = entry(first.latency, batch) if first else None

    def row(trial: Trial) -> Row:
        measured = trial.measurement
        point = front.get(trial.number) if measured else None
        timed = entry(measured.latency, batch) if measured else None
        quotient = base.p50_ms / timed.p50_ms if base and timed and timed.p50_ms > 0 else None
        return Row(
            trial=trial,
            speedup=point.speedup if point else quotient,
            drop=point.score_drop if point else measured.score_drop if measured else None,
            chosen=report.chosen is not None and report.chosen.trial == trial.number,
            front=point is not None,
        )

    return tuple(row(trial) for trial in sorted(report.trials, key=lambda t: t.number))


def times_smaller(before: int | None, after: int | None) -> float | None:
    """Old ÷ new, or None where one is unknown or nothing."""
    return before / after if before and after else None


def plain_speedup(given: Baseline, plain: Baseline, batch: int) -> float | None:
    """Ratio of medians; the report holds no interval for it."""
    old, new = entry(given.latency_ms, batch), entry(plain.latency_ms, batch)
    return old.p50_ms / new.p50_ms if old and new and new.p50_ms > 0 else None


def reused(report: Report) -> bool:
    """Whether the *prove* data had been opened before."""
    return any(opening.reused for opening in report.openings)


def proof_examples(report: Report) -> int | None:
    """How many examples the proof rests on."""
    if report.chosen and report.chosen.score_drop.n:
        return report.chosen.score_drop.n
    tested = next((c.bound.n for c in report.certificates if c.bound), None)
    return tested or report.examples.get("prove")
