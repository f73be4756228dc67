"""Where the time goes, in the terminal and as one page: a bar for each layer, filled as far as it reaches the roofline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from hasten.report import tables, text
from hasten.report.html import asset, templates
from hasten.report.tables import Bar, Line, Table, Tone

MOST = 24  # layers in the terminal; the page and the JSON have them all
_BLOCKS = " ▏▎▍▌▋▊▉█"
_BAR = 16  # characters
_TONES: dict[str, Tone] = {"likely": "good", "perhaps": "plain", "hardly": "bad"}
_STYLES = {"likely": "bold green", "perhaps": "yellow", "hardly": "dim"}
_HEADINGS = ("layer", "type", "output", "parameters", "MACs", "time", "share", "of the roofline")


def show(found: Mapping[str, Any], console: Console) -> None:
    """Prints what `hasten.inspecting.inspect` found."""
    found = text.printable(dict(found))
    console.print()
    console.print(Text(headline(found), style="bold"))
    for note in _notes(found):
        console.print(Padding(Text(note), (0, 0, 0, 2)))
    if found["times"] is None:
        return
    _print_layers(console, found["times"])
    console.print()
    console.print(Text("What is likely to pay", style="bold"))
    for hint in found["hints"]:
        saves = f", at most {hint['saves']:.0%} of the time" if hint["saves"] else ""
        words = Text.assemble((f"{hint['pays']:8}", _STYLES[hint["pays"]]), f"{hint['method']}{saves}: {hint['why']}")
        console.print(Padding(words, (0, 0, 0, 2)))


def page(found: Mapping[str, Any]) -> str:
    """The same as one HTML document without scripts, with every layer."""
    found = text.printable(dict(found))
    times = found["times"]
    rows = [] if times is None else times["layers"]
    return (
        templates()
        .get_template("layers.html.j2")
        .render(
            title=found["model"],
            sentence=headline(found),
            notes=_notes(found),
            style=Markup(asset("page.css")),
            layers=_table(rows, times) if rows else None,
            hints=[hint | {"tone": _TONES[hint["pays"]]} for hint in found["hints"]],
            environment=Table(
                name="Environment",
                headings=("what", "value"),
                lines=tuple(Line(cells=(key, tables.flat(value))) for key, value in found["environment"].items()),
            ),
        )
    )


def headline(found: Mapping[str, Any]) -> str:
    """One sentence: the size, and the time where it is known."""
    size = f"{found['model']}: {text.many(found['parameters'])} parameters, {text.many(found['macs'])} multiply-accumulates per example"
    times = found["times"]
    if times is None:
        return size
    threads = f"{times['threads']} thread{'s' if times['threads'] > 1 else ''}"
    return f"{size}; {text.milliseconds(times['call_ms'])} per call at batch {times['batch']} in ONNX Runtime on {threads}"


def _notes(found: Mapping[str, Any]) -> list[str]:
    shapes = [f"{name} {i['dtype']} {tuple(i['shape'])}" for name in ("inputs", "outputs") for i in found[name]]
    notes = ["; ".join(shapes), *found["notes"]]
    if made := found["metadata"]:
        said = f"{made.get('words')}; {made.get('sentence') or 'nothing proved'}"
        notes.append(f"says of itself: written by hasten {made.get('hasten')}: {said}")
    if found["times"] is None:
        return [*notes, f"no times: {found['reason']}"]
    times = found["times"]
    top = times["ceiling"]
    cost = text.significant(1e3 * times["profiler_ms"], 2)
    peaks = [text.many(round(top[f"{kind}_macs_per_s"])) for kind in ("float", "integer")]
    notes.append(
        f"medians of {times['calls']:,} calls; the profiler's {cost} µs per layer are taken off; ceilings here: {peaks[0]} float32 and "
        f"{peaks[1]} 8-bit multiply-accumulates and {text.size(round(top['bytes_per_s']))} per second"
    )
    if any((row["roofline"] or 0) > 1.05 for row in times["layers"]):
        notes.append(
            "a layer above its roofline: bound by memory, its arrays lie in the cache, which is faster than the memory that was measured; "
            "bound by computing, the machine was busy while the ceilings were measured: measure again"
        )
    return notes


def _print_layers(console: Console, times: Mapping[str, Any]) -> None:
    rows = times["layers"]
    longest = sorted(range(len(rows)), key=lambda i: -rows[i]["ms"])[:MOST]
    kept = [rows[i] for i in sorted(longest)]
    narrow = console.width < 110
    drawn = RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 1))
    columns = [i for i in range(len(_HEADINGS)) if not (narrow and i in (2, 3, 4))]
    for i in columns:
        drawn.add_column(Text(_HEADINGS[i]), justify="left" if i < 3 else "right", no_wrap=i > 0, overflow="fold")
    drawn.add_column(Text("time"), no_wrap=True)
    most = max((row["share"] for row in rows), default=1.0)
    for row in kept:
        cells = _cells(row)
        drawn.add_row(*(Text(cells[i], overflow="fold") for i in columns), _bar(row["share"] / most))
    console.print(Padding(drawn, (1, 0, 0, 1)))
    hidden = [row for i, row in enumerate(rows) if i not in longest]
    if hidden:
        console.print(f"  {len(hidden)} more layers take {math.fsum(r['share'] for r in hidden):.0%}; --json and --html have them")
    if times["rest_ms"] > 0:
        console.print(f"  between the layers: {times['rest_ms'] / times['call_ms']:.0%}")


def _bar(share: float) -> Text:
    """A bar of eighths of a character."""
    eighths = max(1, round(share * _BAR * 8)) if share > 0 else 0
    return Text(_BLOCKS[8] * (eighths // 8) + _BLOCKS[eighths % 8].strip(), style="cyan")


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    fused = f" + {len(row['nodes']) - 1}" if len(row["nodes"]) > 1 else ""
    bound = "" if row["roofline"] is None or not (row["macs"] or row["moved_bytes"]) else f"{row['roofline']:.0%} {row['bound']}"
    return (
        row["module"] or row["name"],
        row["kind"] + fused + (" int8" if row["integers"] else ""),
        "×".join(map(str, row["shape"])),
        text.many(row["parameters"]) if row["parameters"] else "",
        text.many(row["macs"]) if row["macs"] else "",
        text.milliseconds(row["ms"]),
        f"{row['share']:.1%}",
        bound or text.ABSENT,
    )


def _table(rows: Sequence[Mapping[str, Any]], times: Mapping[str, Any]) -> Table:
    most = max(row["share"] for row in rows)
    lines = [
        Line(
            cells=_cells(row),
            bar=Bar(
                start=0,
                length=round(100 * row["share"] / most, 1),
                tone="plain",
                tick=None if row["floor_ms"] is None else round(100 * min(row["floor_ms"] / times["call_ms"], row["share"]) / most, 1),
            ),
        )
        for row in rows
    ]
    rest = times["rest_ms"] / times["call_ms"]
    if rest > 0:
        lines.append(Line(cells=("between the layers", "", "", "", "", text.milliseconds(times["rest_ms"]), f"{rest:.1%}", "")))
    return Table(name="Layers", headings=_HEADINGS, lines=tuple(lines), figures=frozenset((3, 4, 5, 6, 7)), bar="time, tick: roofline")
