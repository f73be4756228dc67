"""Training curves as one page that stands alone: the loss, the learning rate and the gradient over the optimizer's steps."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

WIDTH, HEIGHT = 680, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 664, 14, 206
MOST = 400  # points of a line: means of neighbours beyond
COLOURS = ("#2a6fb0", "#c8553d", "#3a8a5f", "#8a5fb0", "#b08a2a", "#4a4a4a", "#b02a7b", "#2ab0a5")


class Point(Protocol):
    """One step of a training, as `train.records.Record` has it."""

    step: int
    steps: int
    batch: int
    loss: float
    rate: float
    norm: float
    validation: float | None


def page(runs: Mapping[str, Sequence[Any]], facts: Mapping[str, Any]) -> str:
    """The whole HTML document.

    Args:
        runs: the records of each training under its name.
        facts: what is told beside the pictures, by name.
    """
    asked = "; ".join(_told(name, records) for name, records in runs.items())
    rows = "".join(f"<tr><th>{_safe(name)}</th><td>{_safe(_flat(value))}</td></tr>" for name, value in facts.items())
    drawings = "".join(
        f"<h2>{words}</h2>{svg({run: [(r.step, getattr(r, name)) for r in records] for run, records in runs.items()}, log=log)}"
        for name, words, log in (
            ("loss", "Loss of each step", True),
            ("validation", "Loss on the validation data", True),
            ("rate", "Learning rate", False),
            ("norm", "Norm of the gradient", True),
        )
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>hasten training</title>'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem}"
        "th{text-align:left;padding-right:1rem;font-weight:500}svg{width:100%;height:auto}text{font-size:12px}</style></head>"
        f"<body><h1>Training curves</h1><p>{_safe(asked)}</p>{drawings}<table>{rows}</table></body></html>\n"
    )


def svg(lines: Mapping[str, Sequence[tuple[float, float | None]]], *, log: bool = True) -> str:
    """A picture of named lines; what is missing or not finite is left out, on a logarithmic axis also what is not above 0.

    >>> svg({"a": [(1, 1.0), (2, 0.1)]}).startswith("<svg")
    True
    """
    kept = {
        name: _thinned([(x, y) for x, y in line if y is not None and math.isfinite(y) and (y > 0 or not log)])
        for name, line in lines.items()
    }
    kept = {name: line for name, line in kept.items() if line}
    if not kept:
        return "<p>Nothing was looked at.</p>"
    xs, ys = ([p[i] for line in kept.values() for p in line] for i in (0, 1))
    scale = math.log10 if log else float
    low, high = scale(min(ys)), scale(max(ys))
    span, reach = (high - low) or 1.0, (max(xs) - min(xs)) or 1.0

    def place(x: float, y: float) -> str:
        across = LEFT + (x - min(xs)) / reach * (RIGHT - LEFT)
        return f"{across:.1f},{BOTTOM - (scale(y) - low) / span * (BOTTOM - TOP):.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" xmlns="http://www.w3.org/2000/svg">']
    parts.append(f'<path d="M{LEFT},{TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="#999"/>')
    for share in (0, 0.5, 1):
        level = low + share * span
        value = 10**level if log else level
        parts.append(f'<text x="{LEFT - 6}" y="{BOTTOM - share * (BOTTOM - TOP) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    parts.append(f'<text x="{LEFT}" y="{BOTTOM + 16}">step {min(xs):g}</text>')
    parts.append(f'<text x="{RIGHT}" y="{BOTTOM + 16}" text-anchor="end">step {max(xs):g}</text>')
    for number, (name, line) in enumerate(kept.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(place(x, y) for x, y in line)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if len(kept) > 1:
            parts.append(f'<text x="{RIGHT}" y="{TOP + 14 * number + 8}" text-anchor="end" fill="{colour}">{_safe(name)}</text>')
    return "".join([*parts, "</svg>"])


def _told(name: str, records: Sequence[Any]) -> str:
    """What every figure of a training must be read with."""
    last = records[-1]
    rate = max(r.rate for r in records)
    return f"{name}: global batch {last.batch}, learning rate {rate:.3g} at its highest, a schedule of {last.steps} optimizer steps"


def _thinned(line: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(line) / MOST)
    if size <= 1:
        return line
    pieces = [line[i : i + size] for i in range(0, len(line), size)]
    return [(p[-1][0], sum(y for _, y in p) / len(p)) for p in pieces]


def _flat(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return "; ".join(str(v) for v in value) or "none"
    return "none" if value in (None, "") else str(value)


def _safe(words: object) -> str:
    return html.escape(str(words))
