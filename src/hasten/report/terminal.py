"""The report in a terminal, from 60 columns on."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from hasten.core.report import Report
from hasten.report import facts, tables, text
from hasten.report.sentence import verdict_sentence

MOST_TRIALS = 40
COLOURS = {"good": "bold green", "bad": "bold red", "plain": "bold"}
STYLES = {"chosen": "bold green", "failed": "dim", "running": "dim", "reused": "yellow"}


def show(report: Report, console: Console) -> None:
    """Prints the report. Strings of the user are printed as they are, never read as markup or control codes."""
    report = text.printable(report)
    badge = facts.badge(report)
    console.print()
    console.print(Text.assemble((badge, COLOURS[facts.tone(report)]), "  ", report.sentence or verdict_sentence(report)))
    _table(console, tables.comparison(report))
    _asked(console, report)
    _table(console, _shortened(tables.trials(report)), without=(4,))
    _table(console, tables.ledger(report))
    _table(console, tables.findings(report))
    _table(console, tables.classes(report))
    _table(console, tables.offers(report))
    _table(console, tables.certificates(report), without=(5, 6) if console.width < 100 else ())
    if facts.reused(report):
        _table(console, tables.openings(report))
    if report.notes:
        _heading(console, "Notes")
        for note in report.notes:
            console.print(Padding(Text(text.clean(note, 600)), (0, 0, 0, 2)))
    if report.artifact:
        _heading(console, "Result")
        console.print(Padding(Text(report.artifact, overflow="fold"), (0, 0, 0, 2)))


def _heading(console: Console, words: str) -> None:
    console.print()
    console.print(Text(words, style="bold"))


def _asked(console: Console, report: Report) -> None:
    caps = text.caps(report.limit, facts.headline_batch(report))
    if caps:
        console.print(Text(f"Asked for: {text.listed(caps)}."))
    if report.closest_miss:
        console.print(Text(f"Closest miss: {report.closest_miss}"))


def _shortened(table: tables.Table) -> tables.Table:
    """The trials that matter and as many of the others as there is room for; says how many are left out."""
    kept = {i for i, line in enumerate(table.lines) if line.mark in ("chosen", "front")}
    kept |= set(list(range(len(table.lines)))[: max(0, MOST_TRIALS - len(kept))])
    missing = len(table.lines) - len(kept)
    if missing <= 0:
        return table
    name = f"{table.name} ({missing:,} more are in the page and in report.json)"
    return tables.Table(name=name, headings=table.headings, lines=tuple(table.lines[i] for i in sorted(kept)), figures=table.figures)


def _table(console: Console, table: tables.Table, *, without: tuple[int, ...] = ()) -> None:
    if not table.lines:
        return
    _heading(console, table.name)
    columns = [i for i in range(len(table.headings)) if i not in without]
    drawn = RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 1))
    for i in columns:
        figure, heading = i in table.figures, table.headings[i]
        drawn.add_column(
            Text(heading, overflow="fold"),
            justify="right" if figure else "left",
            overflow="fold",
            no_wrap=figure,
            min_width=28 if heading == "recipe" and console.width >= 80 else None,
        )
    for line in table.lines:
        cells = [Text(text.clean(line.cells[i], 300), overflow="fold") for i in columns]
        drawn.add_row(*cells, style=STYLES.get(line.mark))
    console.print(Padding(drawn, (0, 0, 0, 1)))
