"""How often does the whole search end in a wrong `kept`?

Where promise_coverage.py tests freezing and proving alone, here the real search runs on made-up methods (tests/madeup.py): it races,
extends, tunes, ablates, freezes, proves and chooses as always, on data drawn anew for each search. Every method loses a tenth more than
the limit, each setting on examples of its own, so whatever comes out lossy and `kept` is wrong; at 95 % confidence that may happen in
5 % of the searches. Beside it the same with methods that lose a tenth of the limit: how often the search then finds something.

    python benchmarks/search_coverage.py [--quick] [--json] [--save]
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import machine

import madeup
from hasten.core.recipe import Recipe
from hasten.core.report import Limit, Report
from hasten.measure.statistics import clopper_pearson_upper

LIMIT = 0.02
CASES = {"all beyond the limit by a tenth": 1.1, "all at a tenth of the limit": 0.1}
SELECT, PROVE = 400, 1200


def planted_at(drop: float) -> Any:
    """`madeup.planted` with one cost for every method and setting, such that one step alone loses `drop` of the accuracy."""
    column = madeup.planted
    return lambda step: (column(step)[0], drop / (2 * madeup.RIGHT - 1))


def wrong(found: Report) -> bool:
    """Whether the result is called kept and is a lossy recipe."""
    return found.verdict == "kept" and found.chosen is not None and bool(Recipe.from_json(found.chosen.recipe).steps)


def share_kept(factor: float, searches: int, place: Path, seed: int) -> dict[str, Any]:
    """The share of searches whose result is lossy and `kept`, where each method loses `factor` times the limit."""
    settings = replace(madeup.SETTINGS, limit=Limit(max_drop=LIMIT), trials=None)
    kept = trials = 0
    with mock.patch.object(madeup, "planted", planted_at(factor * LIMIT)):
        for search in range(searches):
            run = place / "run"
            madeup.prepare(run, select=SELECT, prove=PROVE, draw=seed + search)
            found = madeup.search(run, settings, told=False)
            trials += len(found.trials)
            kept += wrong(found)
            shutil.rmtree(place)
    return {
        "searches": searches,
        "kept": kept,
        "share": kept / searches,
        "upper": clopper_pearson_upper(kept, searches, confidence=0.95),
        "lower": 1 - clopper_pearson_upper(searches - kept, searches, confidence=0.95),
        "trials_per_search": trials / searches,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the searches."""
    fast = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=fast if fast.is_dir() else None) as name:
        place = Path(name) / "search"
        rows = {}
        for case, factor in CASES.items():
            searches = (40 if options.quick else 1000) if factor > 1 else (20 if options.quick else 200)
            rows[case] = share_kept(factor, searches, place, seed=options.seed)
    first = rows["all beyond the limit by a tenth"]
    passed = first["lower"] <= 0.05 if options.quick else first["share"] <= 0.05 and first["upper"] <= 0.065
    return {"limit": LIMIT, "select": SELECT, "prove": PROVE, "rows": rows, "passed": passed}


def show(found: dict[str, Any]) -> None:
    """The shares with their 95 % bounds."""
    print(f"limit {found['limit']}, {found['select']} examples select, {found['prove']} prove; result lossy and `kept`:")
    for case, row in found["rows"].items():
        bounds = f"one-sided 95 % bounds {row['lower']:.1%} and {row['upper']:.1%}"
        print(f"{case:34} {row['kept']:4} of {row['searches']:4} searches, {row['share']:.1%} ({bounds})")
    print("ok" if found["passed"] else "MISS: a wrong `kept` in more than 5 %")


if __name__ == "__main__":
    machine.run("search_coverage", measure, show, lambda parser: parser.add_argument("--seed", type=int, default=0))
