"""The tables of a report as words: the terminal and the page draw the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hasten.core.report import Baseline, Chosen, Report
from hasten.report import facts, text

Tone = Literal["good", "bad", "plain"]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A small bar beside a row: where it starts, how long it is and where a tick stands, in per cent of the width."""

    start: float
    length: float
    tone: Tone = "plain"
    tick: float | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row: its cells, one word that marks it, and its bar."""

    cells: tuple[str, ...]
    mark: str = ""
    bar: Bar | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Headings with rows. `figures` are the columns that hold numbers; `bar` is the heading of the bars, if there are any."""

    name: str
    headings: tuple[str, ...]
    lines: tuple[Line, ...]
    figures: frozenset[int] = frozenset()
    bar: str = ""


def comparison(report: Report) -> Table:
    """The network as given, the best plain engine and the result, one quantity a row."""
    columns: list[tuple[str, Baseline | Chosen]] = list(report.baselines.items())
    if report.chosen is not None:
        columns.append(("chosen", report.chosen))
    share = text.is_share(report.score_name)
    lines = [Line(cells=("runs as", *(c.words for _, c in columns)))]
    for batch in report.batches:
        lines += _latency_lines(report, columns, batch)
    lines += [
        Line(cells=("size", *(text.size(c.size_bytes) for _, c in columns))),
        Line(cells=("peak memory", *(text.size(c.peak_memory_bytes) for _, c in columns))),
        Line(cells=("parameters", *(text.many(c.parameters) for _, c in columns))),
        Line(cells=("multiply-adds", *(text.many(c.macs) for _, c in columns))),
        Line(cells=(report.score_name, *(text.score(c.score, share=share, places=2) for _, c in columns))),
    ]
    if any(c.energy_mj is not None for _, c in columns):
        counted = (text.ABSENT if c.energy_mj is None else f"{text.decimals(c.energy_mj, 2)} mJ" for _, c in columns)
        lines.append(Line(cells=("energy of a call, counted once", *counted)))
    headings = ("", *(name.replace("_", " ") for name, _ in columns))
    return Table(name="Before and after", headings=headings, lines=tuple(lines) if columns else ())


def _latency_lines(report: Report, columns: list[tuple[str, Baseline | Chosen]], batch: int) -> list[Line]:
    found = [facts.entry(c.latency_ms, batch) for _, c in columns]
    return [
        Line(cells=(f"p50, batch {batch}", *(text.milliseconds(e.p50_ms if e else None) for e in found))),
        Line(cells=(f"p95, batch {batch}", *(text.milliseconds(e.p95_ms if e else None) for e in found))),
        Line(cells=(f"speed-up, batch {batch}", *(_speedup(report, name, c, batch) for name, c in columns))),
        Line(cells=("measured on", *(f"{e.calls:,} calls, {_launches(e.launches)}" if e else text.ABSENT for e in found))),
    ]


def _launches(n: int) -> str:
    return f"{n} launch" if n == 1 else f"{n} launches"


def _speedup(report: Report, name: str, column: Baseline | Chosen, batch: int) -> str:
    if isinstance(column, Chosen):
        interval = facts.at_batch(column.speedup, batch)
        return f"{text.ratio(interval.value)} ({text.interval(interval)})" if interval else text.ABSENT
    given = report.baselines.get(facts.AS_GIVEN)
    times = facts.plain_speedup(given, column, batch) if given and name != facts.AS_GIVEN else None
    return "1" if name == facts.AS_GIVEN else text.ABSENT if times is None else f"{text.ratio(times)} (medians)"


def trials(report: Report) -> Table:
    """Every trial with its ranking figures, or the reason why it has none."""
    share = text.is_share(report.score_name)
    lines = tuple(
        Line(
            cells=(
                str(row.trial.number),
                row.trial.words,
                text.ABSENT if row.speedup is None else text.ratio(row.speedup),
                text.drop(row.drop, share=share),
                text.size(row.trial.measurement.size_bytes if row.trial.measurement else None),
                _standing(row),
            ),
            mark="chosen" if row.chosen else "front" if row.front else row.trial.state,
        )
        for row in facts.rows(report)
    )
    return Table(
        name="Trials",
        headings=("#", "recipe", "speed-up", "drop", "size", "state"),
        lines=lines,
        figures=frozenset((0, 2, 3, 4)),
    )


def _standing(row: facts.Row) -> str:
    word = "chosen" if row.chosen else "on the front" if row.front else row.trial.state
    return f"{word}: {row.trial.reason}" if row.trial.reason else word


def ledger(report: Report) -> Table:
    """What each part of the chosen recipe bought and cost, on *select*. Negative savings are losses."""
    share = text.is_share(report.score_name)
    most = max((abs(line.latency_ms or 0) for line in report.ledger), default=0)
    lines = tuple(
        Line(
            cells=(
                line.part,
                text.milliseconds(line.latency_ms),
                text.size(line.size_bytes),
                text.drop(line.score_drop, share=share),
                line.note,
            ),
            bar=_length((line.latency_ms or 0) / most if most else 0),
        )
        for line in report.ledger
    )
    headings = ("part", "saves time", "saves size", "costs", "note")
    return Table(name="What each step bought", headings=headings, lines=lines, figures=frozenset((1, 2, 3)), bar="time")


def findings(report: Report) -> Table:
    """What each method could do here, as first seen and as it came out."""
    share = text.is_share(report.score_name)
    lines = tuple(
        Line(
            cells=(
                found.method,
                text.ABSENT if found.forecast is None else text.ratio(found.forecast),
                text.drop(found.score_drop, share=share),
                text.ABSENT if found.gain is None else text.ratio(found.gain),
                found.note,
            ),
            mark="chosen" if found.note == "in the result" else "",
        )
        for found in report.findings
    )
    headings = ("method", "alone", "costs", "in the end", "note")
    return Table(name="What each method could do here", headings=headings, lines=lines, figures=frozenset((1, 2, 3)))


def _length(share: float) -> Bar:
    return Bar(start=0, length=round(abs(share) * 100, 1), tone="good" if share >= 0 else "bad")


def classes(report: Report) -> Table:
    """The classes whose score changed, the greatest loss first."""
    share = text.is_share(report.score_name)
    changed = sorted((c for c in report.classes if c.before != c.after), key=lambda c: (c.after - c.before, c.name))
    most = max((abs(c.after - c.before) for c in changed), default=1.0)
    lines = tuple(
        Line(
            cells=(
                c.name,
                text.count(c.n),
                text.score(c.before, share=share),
                text.score(c.after, share=share),
                text.change(c.after - c.before, share=share),
            ),
            bar=_sideways((c.after - c.before) / most),
        )
        for c in changed
    )
    headings = ("class", "examples", "before", "after", "change")
    return Table(name="Per class", headings=headings, lines=lines, figures=frozenset((1, 2, 3, 4)), bar="loss | gain")


def _sideways(share: float) -> Bar:
    half = round(abs(share) * 50, 1)
    return Bar(start=50 if share > 0 else 50 - half, length=half, tone="good" if share > 0 else "bad", tick=50)


def certificates(report: Report) -> Table:
    """What the proof data said of each frozen candidate, in the order of the tests."""
    share, limit = text.is_share(report.score_name), report.limit.max_drop
    bounds = [c.bound for c in report.certificates if c.bound]
    scale = 1.15 * max([limit, *(b.upper for b in bounds)])
    lines = []
    for certificate in report.certificates:
        bound = certificate.bound
        enough = f" (about {text.count(certificate.enough)} examples would do)" if certificate.enough else ""
        lines.append(
            Line(
                cells=(
                    str(certificate.trial),
                    certificate.verdict + enough,
                    text.drop(bound.value if bound else None, share=share),
                    text.drop(bound.upper if bound else None, share=share, at_most=True),
                    text.count(bound.n if bound else None),
                    _flips(bound.lost, bound.won) if bound else text.ABSENT,
                    bound.method if bound else text.ABSENT,
                ),
                mark="chosen" if report.chosen and report.chosen.trial == certificate.trial else certificate.verdict,
                bar=_towards(bound.upper, limit, scale, certificate.verdict) if bound and scale > 0 else None,
            )
        )
    headings = ("trial", "verdict", "drop", "at most", "examples", "lost / won", "method")
    bar = f"bound against {text.drop(limit, share=share)}"
    return Table(name="Proof", headings=headings, lines=tuple(lines), figures=frozenset((0, 2, 3, 4, 5)), bar=bar)


def _flips(lost: int | None, won: int | None) -> str:
    return text.ABSENT if lost is None or won is None else f"{lost:,} / {won:,}"


def _towards(upper: float, limit: float, scale: float, verdict: str) -> Bar:
    tone: Tone = "good" if verdict in ("equal", "kept") else "bad"
    return Bar(start=0, length=round(max(upper, 0) / scale * 100, 1), tone=tone, tick=round(limit / scale * 100, 1))


def offers(report: Report) -> Table:
    """The certified candidates that were timed in the end, where there is more than one to pick from."""
    share, batch = text.is_share(report.score_name), facts.headline_batch(report)
    lines = []
    for offer in report.offers if len(report.offers) > 1 else ():
        speed = facts.at_batch(offer.speedup, batch)
        lines.append(
            Line(
                cells=(
                    str(offer.trial),
                    offer.words,
                    text.ratio(speed.value) if speed else text.ABSENT,
                    text.size(offer.size_bytes),
                    text.drop(offer.score_drop.upper, share=share, at_most=True),
                ),
                mark="chosen" if report.chosen and report.chosen.trial == offer.trial else "",
            )
        )
    headings = ("trial", "recipe", "speed-up", "size", "drop at most")
    return Table(name="Certified, for --pick", headings=headings, lines=tuple(lines), figures=frozenset((0, 2, 3, 4)))


def openings(report: Report) -> Table:
    """When the proof data was opened, and for which candidates."""
    lines = tuple(
        Line(
            cells=(o.when, ", ".join(map(str, o.candidates)), o.fingerprint[:16], "reused" if o.reused else "first opening"),
            mark="reused" if o.reused else "",
        )
        for o in report.openings
    )
    return Table(name="Openings of the proof data", headings=("when", "trials", "data (SHA-256)", "standing"), lines=lines)


def environment(report: Report) -> Table:
    """The machine and the versions."""
    lines = tuple(Line(cells=(str(key), flat(value))) for key, value in report.environment.items())
    return Table(name="Environment", headings=("what", "value"), lines=lines)


def flat(value: object) -> str:
    """A JSON value in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{k}: {flat(v)}" for k, v in value.items())
    return ", ".join(map(flat, value)) if isinstance(value, (list, tuple)) else str(value)
