"""How the time of a search grows with the layers of the network, the trials in its store, and the examples.

Layers: a stack of pairs of Linear and a ReLU is prepared once: what each step may vary is surveyed, it is lowered, folded and packed
for ONNX Runtime, in the child process as in a search. Trials: a store is filled with made-up trials, then what a search does with it
per trial and at the end is timed. Examples: scoring, comparing and proving with NumPy alone. The exponent is the slope in a log-log plot
over the last step of a row: 1 is linear.

    python benchmarks/search_scaling.py [--quick] [--json] [--save]
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import machine
import numpy as np
import torch

import madeup
from hasten.compress import FoldBatchNorm, FoldLinear, QuantizeStatic
from hasten.core import folder
from hasten.core.network import Network
from hasten.core.recipe import Recipe
from hasten.core.report import Limit, Measurement
from hasten.core.store import Store
from hasten.engines import OnnxRuntime
from hasten.load import saved
from hasten.report.html import page
from hasten.search import crew, finals, prover, summary
from hasten.search.catalogue import Settings
from hasten.search.propose import propose
from hasten.search.workshop import ORIGINAL, Workshop

WIDTH = 16
Row = dict[str, float]


@contextmanager
def clocked(row: Row, name: str) -> Iterator[None]:
    """Puts the seconds of the block into the row."""
    start = time.perf_counter()
    yield
    row[name] = time.perf_counter() - start


def with_layers(layers: int, place: Path) -> Row:
    """Seconds of each part of the first trials of a network with so many Linear layers."""
    torch.manual_seed(0)
    pair = [torch.nn.Linear, torch.nn.Linear]  # which folds into one
    stack = [part for _ in range(layers // 2) for part in (*(kind(WIDTH, WIDTH) for kind in pair), torch.nn.ReLU())]
    network = Network(kind="module", body=torch.nn.Sequential(*stack).eval(), example=(np.zeros((2, WIDTH), np.float32),))
    with folder.new_folder(place / ORIGINAL) as fresh:
        saved.save(network, fresh / "network")
    data = np.random.default_rng(0).standard_normal((64, WIDTH)).astype(np.float32)
    for name in ("train", "calibrate"):
        madeup.View(inputs=(data,), labels=np.zeros(len(data), np.int64)).save(place / "views" / name)
    row: Row = {}
    workshop = Workshop(place, loss="classes", seed=0)
    try:
        workshop.survey([FoldBatchNorm])  # starts the child
        with clocked(row, "survey"):
            workshop.survey([FoldBatchNorm, FoldLinear, QuantizeStatic])
        with clocked(row, "lower and pack"):
            workshop.make(Recipe((), OnnxRuntime()), place / "packages" / "0")
        with clocked(row, "fold and pack"):
            workshop.make(Recipe((FoldLinear(),), OnnxRuntime()), place / "packages" / "1")
        with clocked(row, "quantize and pack"):
            workshop.make(Recipe((QuantizeStatic(),), OnnxRuntime()), place / "packages" / "2")
    finally:
        workshop.close()
    return row


def recipes() -> Iterator[Recipe]:
    """Made-up recipes, endlessly."""
    for number in itertools.count(1):
        yield Recipe((madeup.Shape(amount=number),), madeup.Fast())


def with_trials(count: int, place: Path) -> Row:
    """Seconds of what a search does with a store of so many trials."""
    rng = np.random.default_rng(0)
    store, row = Store(place / "run.sqlite"), Row()
    store.remember("settings", {"limit": Limit().to_json(), "batch": 1, "batches": [1], "seed": 0})
    made, dialogue_trials = recipes(), []
    with clocked(row, "all begun and finished"):
        for _ in range(count):
            trial = store.begin(next(made))
            measured = measurement(float(rng.lognormal()), float(rng.uniform(0, 0.02)))
            store.finish(trial.number, measured, seconds=1.0)
            dialogue_trials.append(replace(trial, state="finished", measurement=measured))
    with clocked(row, "read"):
        trials = store.trials()
    with clocked(row, "contenders"):
        finals.contenders(trials, Settings(limit=Limit(), batches=(1,)))
    with clocked(row, "report"):
        found = summary.report(place, store)
    with clocked(row, "page"):
        page(found)
    with clocked(row, "foreseen"):
        crew.to_come(lambda: propose(madeup.CATALOGUE, {}, madeup.SETTINGS), dialogue_trials[:3])
    store.close()
    return row


def measurement(ms: float, drop: float) -> Measurement:
    """A made-up one."""
    return Measurement(
        score=0.9 - drop,
        score_drop=drop,
        flips=0.0,
        max_difference=0.0,
        latency=(madeup._latency(ms, 1),),
        size_bytes=1,
        peak_memory_bytes=1,
    )


def with_examples(count: int, place: Path) -> Row:
    """Seconds of a whole made-up search with so many examples to select and to prove, and of a proof alone."""
    row: Row = {}
    madeup.prepare(place, select=count, prove=count)
    with clocked(row, "whole search"):
        madeup.search(place, told=False)
    base, target = np.random.default_rng(0).random((count, 2)), np.zeros(count, np.int64)
    other = np.where(np.random.default_rng(1).random((count, 1)) < 0.01, base[:, ::-1], base)
    with clocked(row, "proof"):
        prover.certify((base,), target, [(1, (other,), False)], score=madeup.Accuracy(), limit=Limit(), seed=0)
    return row


TABLES: dict[str, tuple[Callable[[int, Path], Row], tuple[int, ...], tuple[int, ...]]] = {
    "layers": (with_layers, (10, 100, 1000), (10, 30)),
    "trials": (with_trials, (10, 100, 1000, 10_000), (10, 100, 1000)),
    "examples": (with_examples, (100, 1000, 10_000, 100_000), (100, 1000, 10_000)),
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times each table, each row in a folder of its own."""
    found: dict[str, Any] = {"tables": {}}
    for name, (work, full, quick) in TABLES.items():
        if options.only and name not in options.only:
            continue
        rows = {}
        for count in quick if options.quick else full:
            with tempfile.TemporaryDirectory() as place:
                rows[count] = {what: round(seconds, 5) for what, seconds in work(count, Path(place)).items()}
        found["tables"][name] = {"rows": rows, "exponents": exponents(rows)}
        options.keep(found)
    return found


def exponents(rows: dict[int, Row]) -> Row:
    """The slopes over the last step, of what takes long enough to have one (10 ms)."""
    (few, before), (many, after) = list(rows.items())[-2:]
    return {
        what: round(math.log(after[what] / before[what]) / math.log(many / few), 2)
        for what in after
        if before[what] > 0 and after[what] > 0.01
    }


def show(found: dict[str, Any]) -> None:
    """A table for each."""
    for name, table in found["tables"].items():
        what = list(next(iter(table["rows"].values())))
        print(f"\n{name:>10} " + " ".join(f"{w:>22}" for w in what))
        for count, row in table["rows"].items():
            print(f"{count:>10} " + " ".join(f"{row[w]:>20.4f} s" for w in what))
        print(f"{'exponent':>10} " + " ".join(f"{table['exponents'].get(w, float('nan')):>22}" for w in what))


def more(parser: argparse.ArgumentParser) -> None:
    """Parses which tables."""
    parser.add_argument("--only", action="append", choices=list(TABLES))


if __name__ == "__main__":
    machine.run("search_scaling", measure, show, more)
