"""The geometry of the Pareto plot: speed-up to the right on a logarithmic axis, score drop downwards. Up and right is better.

Units are those of the drawing, WIDTH × HEIGHT, origin at the top left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from hasten.core.report import Report
from hasten.report import facts, text

WIDTH, HEIGHT = 680, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 664, 34, 348
BAND = 34  # the strip at the bottom for drops too deep for the axis
RADIUS = 6
LETTER = 7.2  # mean width of a letter of the labels

Kind = Literal["other", "front", "plain", "given", "chosen"]
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One finished trial."""

    trial: int
    x: float
    y: float
    kind: Kind
    beyond: bool
    title: str


@dataclass(frozen=True, kw_only=True)
class Label:
    """Words in the drawing; `style` is "major", "limit", or "minor": those give way on a narrow screen."""

    x: float
    y: float
    anchor: Literal["start", "middle", "end"]
    words: str
    style: Literal["major", "minor", "limit"] = "minor"


@dataclass(frozen=True, kw_only=True)
class Plot:
    """All that the template draws. `floor` is the lower end of the axis; with a `band`, deeper drops lie below it."""

    dots: tuple[Dot, ...]
    labels: tuple[Label, ...]
    across: tuple[tuple[float, str], ...]
    down: tuple[tuple[float, str], ...]
    front: str
    limit_y: float
    floor: float
    band: bool
    batch: int


def pareto_plot(report: Report) -> Plot | None:
    """The plot of every finished trial that has a speed-up, or None where there is none."""
    rows = [row for row in facts.rows(report) if row.speedup and row.drop is not None]
    if not rows:
        return None
    share = text.is_share(report.score_name)
    drops = [row.drop or 0.0 for row in rows]
    limit, deepest = report.limit.max_drop, _deepest(drops, report.limit.max_drop)
    band = any(drop > deepest for drop in drops)
    floor = BOTTOM - BAND if band else BOTTOM
    low, high = min(0.0, *drops, limit), max(deepest, limit)
    span = (high - low) or 1.0
    across = _log_scale([row.speedup or 1.0 for row in rows])

    def down(drop: float) -> float:
        if drop > deepest:
            return BOTTOM - BAND / 2
        return round(TOP + 30 + (drop - low) / span * (floor - TOP - 46), 1)

    dots = sorted((_dot(report, row, across(row.speedup or 1.0), down(row.drop or 0.0), deepest) for row in rows), key=_depth)
    return Plot(
        dots=tuple(dots),
        labels=tuple(_labels(dots, _captions(report, down(limit), across(1.0), deepest if band else None))),
        across=tuple((across(tick), f"{tick:g}×") for tick in _spaced(across)),
        down=tuple((down(tick), _tick(tick, share)) for tick in _steps(low, high)),
        front=" ".join(f"{d.x},{d.y}" for d in sorted(dots, key=lambda d: d.x) if _on_front(report, d) and not d.beyond),
        limit_y=down(limit),
        floor=floor,
        band=band,
        batch=facts.ranking_batch(report),
    )


def _deepest(drops: list[float], limit: float) -> float:
    """The largest drop that is drawn to scale: one wreck must not flatten everything that matters."""
    if limit <= 0:
        return max(drops)
    return max(1.5 * limit, *(drop for drop in drops if drop <= 3 * limit), -math.inf)


class _log_scale:  # noqa: N801 - used like a function
    """Places a speed-up on the logarithmic axis."""

    def __init__(self, speedups: list[float]) -> None:
        self.low = math.log(min(0.92, *speedups) * 0.9)
        self.high = math.log(max(1.1, *speedups) * 1.16)

    def __call__(self, speedup: float) -> float:
        return round(LEFT + (math.log(speedup) - self.low) / (self.high - self.low) * (RIGHT - LEFT), 1)


def _spaced(across: _log_scale) -> list[float]:
    """Round ticks, 1 among them, at least 58 units apart."""
    powers = range(math.floor(across.low / math.log(10)), math.ceil(across.high / math.log(10)) + 1)
    ticks = [m * 10.0**p for p in powers for m in (1, 2, 5, 3, 7, 1.5)]
    placed = [1.0]
    for tick in sorted(ticks, key=lambda t: (t != 1.0, _roundness(t), t)):
        inside = LEFT <= across(tick) <= RIGHT
        if inside and all(abs(across(tick) - across(other)) >= 58 for other in placed):
            placed.append(tick)
    return sorted(placed)


def _roundness(tick: float) -> int:
    mantissa = tick / 10.0 ** math.floor(math.log10(tick) + 1e-9)
    return next((i for i, m in enumerate((1, 2, 5, 3, 7)) if abs(mantissa - m) < 1e-6), 9)


def _steps(low: float, high: float) -> list[float]:
    """Four to seven round ticks from `low` to `high`."""
    if high <= low:
        return [low]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _tick(drop: float, share: bool) -> str:
    return text.significant(drop * 100 if share else drop, 3)


def _dot(report: Report, row: facts.Row, x: float, y: float, deepest: float) -> Dot:
    share = text.is_share(report.score_name)
    title = f"trial {row.trial.number}: {row.trial.words}\n{text.ratio(row.speedup or 0)}, drop {text.drop(row.drop, share=share)}"
    return Dot(trial=row.trial.number, x=x, y=y, kind=_kind(report, row), beyond=(row.drop or 0) > deepest, title=title)


def _kind(report: Report, row: facts.Row) -> Kind:
    baseline = {name: report.baselines[name].trial for name in (facts.AS_GIVEN, facts.BEST_PLAIN) if name in report.baselines}
    if row.chosen:
        return "chosen"
    if row.trial.number == baseline.get(facts.AS_GIVEN):
        return "given"
    if row.trial.number == baseline.get(facts.BEST_PLAIN):
        return "plain"
    return "front" if row.front else "other"


def _depth(dot: Dot) -> tuple[int, int]:
    return (("other", "front", "plain", "given", "chosen").index(dot.kind), dot.trial)


def _on_front(report: Report, dot: Dot) -> bool:
    return any(point.trial == dot.trial for point in report.pareto)


def _captions(report: Report, limit_y: float, one_x: float, deepest: float | None) -> list[list[Label]]:
    """The places where the limit, and the band below the axis, may be named, best first."""
    share = text.is_share(report.score_name)

    def ends(y: float, words: str, style: Literal["limit", "minor"]) -> list[Label]:
        left = Label(x=one_x + 8, y=y, anchor="start", words=words, style=style)
        return [left, Label(x=RIGHT - 8, y=y, anchor="end", words=words, style=style)]

    limit = f"limit: {text.drop(report.limit.max_drop, share=share)}"
    captions = [[*ends(limit_y - 7, limit, "limit"), *ends(limit_y + 16, limit, "limit")]]
    if deepest is not None:
        captions.append(ends(BOTTOM - BAND / 2 + 5, f"more than {text.drop(deepest, share=share)}", "minor"))
    return captions


def _labels(dots: list[Dot], captions: list[list[Label]]) -> Iterable[Label]:
    """Captions, then names beside the dots that matter, the chosen one first.

    A label that finds no free place is left to its tooltip; the limit and the chosen one are always named.
    """
    taken: list[Box] = [(d.x - RADIUS, d.y - RADIUS, d.x + RADIUS, d.y + RADIUS) for d in dots]
    named: list[list[Label]] = [*captions]
    for dot in reversed(dots):
        names: dict[Kind, str] = {
            "chosen": "chosen",
            "given": facts.AS_GIVEN,
            "plain": facts.BEST_PLAIN,
            "front": f"#{dot.trial}",
            "other": "",
        }
        if names[dot.kind]:
            named.append(_places(dot, names[dot.kind]))
    for places in named:
        inside = [label for label in places if _inside(_box(label))]
        free = (label for label in inside if not any(_overlap(_box(label), other) for other in taken))
        label = next(free, inside[0] if inside and inside[0].style != "minor" else None)
        if label is not None:
            taken.append(_box(label))
            yield label


def _places(dot: Dot, words: str) -> list[Label]:
    """Right, above, below and left of the dot."""
    gap, style = RADIUS + 5, "major" if dot.kind == "chosen" else "minor"
    around = (
        (dot.x + gap, dot.y + 4.5, "start"),
        (dot.x, dot.y - gap, "middle"),
        (dot.x, dot.y + gap + 9, "middle"),
        (dot.x - gap, dot.y + 4.5, "end"),
    )
    return [Label(x=round(x, 1), y=round(y, 1), anchor=a, words=words, style=style) for x, y, a in around]  # type: ignore[arg-type]


def _inside(box: Box) -> bool:
    return box[0] >= LEFT and box[1] >= TOP and box[2] <= RIGHT and box[3] <= BOTTOM


def _box(label: Label) -> Box:
    width = LETTER * len(label.words)
    left = label.x - {"start": 0.0, "middle": 0.5, "end": 1.0}[label.anchor] * width
    return (left, label.y - 11, left + width, label.y + 4)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
