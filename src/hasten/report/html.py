"""The report as one page that stands alone: no script, no font, no picture from anywhere, readable in fifty years."""

from __future__ import annotations

import functools
import re
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from hasten.core.report import Chosen, Interval, Report
from hasten.report import facts, plot, tables, text
from hasten.report.sentence import verdict_sentence

LOADER = """import sys

sys.path.insert(0, {folder!r})
from load import load

run = load({folder!r})
outputs = run(*inputs)  # one array per input; a tuple of arrays comes back"""


def page(report: Report) -> str:
    """The whole HTML document. Strings of the user are escaped and stripped of control characters."""
    report = text.printable(report)
    badge = facts.badge(report)
    return (
        templates()
        .get_template("page.html.j2")
        .render(
            report=report,
            sentence=report.sentence or verdict_sentence(report),
            badge=badge,
            tone=facts.tone(report),
            style=Markup(asset("page.css")),
            cards=_cards(report, report.chosen) if report.chosen else (),
            comparison=tables.comparison(report),
            plot=plot.pareto_plot(report),
            drawing=plot,
            without=[t for t in tables.trials(report).lines if t.mark in ("failed", "running")],
            ledger=tables.ledger(report),
            classes=tables.classes(report),
            certificates=tables.certificates(report),
            offers=tables.offers(report),
            findings=tables.findings(report),
            openings=tables.openings(report),
            trials=tables.trials(report),
            environment=tables.environment(report),
            caps=text.caps(report.limit, facts.headline_batch(report)),
            share=text.is_share(report.score_name),
            loader=LOADER.format(folder=report.artifact) if report.artifact else "",
            reused=facts.reused(report),
        )
    )


@functools.cache
def templates() -> jinja2.Environment:
    """The pages of this room, with their filters."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": text.count,
        "drop": text.drop,
        "duration": text.duration,
        "percent": text.percent,
        "cut": text.clean,
        "tied": _tied,
    }
    return environment


def _tied(words: str) -> str:
    """Figures do not part from their units at the end of a line."""
    return re.sub(r"(?<=\d) (?=%|points?\b|[kMGT]?B\b|ms\b|examples\b)", "\u00a0", words)


def asset(name: str) -> str:
    """The text of a file of this room."""
    return resources.files("hasten.report").joinpath(name).read_text(encoding="utf-8")


def _cards(report: Report, chosen: Chosen) -> tuple[dict[str, Any], ...]:
    """The figures at the top: name, figure, what stands beside it, and bars."""
    given = report.baselines.get(facts.AS_GIVEN)
    cards = [_speed_card(interval) for interval in chosen.speedup]
    cards.append(_score_card(report, chosen))
    if given is not None:
        cards.append(_size_card("Size", given.size_bytes, chosen.size_bytes))
        cards.append(_size_card("Peak memory", given.peak_memory_bytes, chosen.peak_memory_bytes))
    return tuple(cards)


def _speed_card(interval: Interval) -> dict[str, Any]:
    scale, said, pace = max(interval.high, 1.0) * 1.08, facts.turned(interval), facts.pace(interval)
    band = tables.Bar(
        start=_share(interval.low, scale),
        length=_share(interval.high - interval.low, scale),
        tone="good" if pace == "faster" else "bad" if pace == "slower" else "plain",
        tick=_share(1.0, scale),
    )
    return {
        "name": f"Speed, batch {interval.batch}",
        "figure": text.ratio(said.value),
        "beside": pace,
        "below": f"95 % interval {text.interval(said)}, {interval.launches} pairs of launches",
        "bars": [band],
        "scale": "tick: as given",
    }


def _score_card(report: Report, chosen: Chosen) -> dict[str, Any]:
    share, bound, limit = text.is_share(report.score_name), chosen.score_drop, report.limit.max_drop
    given = report.baselines.get(facts.AS_GIVEN)
    after = text.score(chosen.score, share=share, places=2)
    moved = f"{text.score(given.score, share=share, places=2)} → {after}" if given else after
    scale = 1.15 * max(limit, bound.upper, bound.value, 1e-12)
    confidence = text.percent(report.limit.confidence)
    if report.verdict == "equal":
        figure, beside = "equal", "outputs"
    elif report.verdict == "kept":
        figure, beside = f"≤ {text.drop(bound.upper, share=share, at_most=True)}", f"drop, at {confidence} confidence"
    else:
        figure, beside = text.drop(bound.value, share=share), "drop, an estimate only"
    figure, points, plural = figure.partition(" point")
    tone: tables.Tone = "good" if report.verdict in ("equal", "kept") else "bad"
    return {
        "name": report.score_name[:1].upper() + report.score_name[1:],
        "figure": figure,
        "beside": f"point{plural} of {beside}" if points else beside,
        "below": f"{moved}; {text.count(bound.n)} examples",
        "bars": [tables.Bar(start=0, length=_share(max(bound.upper, 0), scale), tone=tone, tick=_share(limit, scale))],
        "scale": f"tick: limit {text.drop(limit, share=share)}",
    }


def _size_card(name: str, before: int, after: int) -> dict[str, Any]:
    times, most = facts.times_smaller(before, after), max(before, after, 1)
    smaller = times is None or times >= 1
    return {
        "name": name,
        "figure": text.ABSENT if times is None else text.ratio(times if smaller else 1 / times),
        "beside": "unchanged" if times == 1 else "smaller" if smaller else "larger",
        "below": f"{text.size(before)} → {text.size(after)}",
        "bars": [
            tables.Bar(start=0, length=_share(before, most)),
            tables.Bar(start=0, length=_share(after, most), tone="good" if smaller else "bad"),
        ],
        "scale": "before, after",
    }


def _share(part: float, whole: float) -> float:
    return round(min(max(part / whole, 0.0), 1.0) * 100, 1)
