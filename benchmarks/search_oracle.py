"""The share of the oracle: what the search finds in a tenth of the time of an exhaustive one.

    python benchmarks/search_oracle.py [--quick] [--json] [--save] [--network NAME]

On a small space (eleven shares of units, three learning rates, three lengths of training, integers or not, two engines) every recipe is
tried once, and the best of those that the search itself would call promising is the oracle. Then the search, `normal` effort with the
same methods and a tenth of that time for its trials, does without that knowledge. The two results are timed in the same rounds of fresh
launches. `--quick` takes an eighth of an epoch of training for the network, and a space of eight recipes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import reference_networks

import hasten
from hasten import presets, verbs
from hasten.compress import PruneStructure, QuantizeStatic
from hasten.core.recipe import Recipe
from hasten.core.report import Trial
from hasten.core.store import Store
from hasten.engines import Eager, OnnxRuntime, OpenVINO
from hasten.measure import timing
from hasten.search import finals, run
from hasten.search.bench import Bench
from hasten.search.catalogue import Catalogue
from hasten.search.watch import nobody
from hasten.search.workshop import Workshop
from hasten.train import FineTune

ENGINES = (OnnxRuntime(), OpenVINO())
CATALOGUE = Catalogue(as_given=Eager(), engines=ENGINES, steps=(PruneStructure, FineTune, QuantizeStatic), tune=False)
RATIOS = (None, *(sixteenths / 16 for sixteenths in range(4, 15)))  # as fine as the search tells them apart
RATES, EPOCHS = (1e-3, 3e-3, 1e-2), (2.0, 6.0, 15.0)
SHARE, WITHIN = 0.10, 0.05


def space(quick: bool) -> list[Recipe]:
    """Every recipe, those that share a training side by side."""
    ratios, rates, epochs = ((None, 0.5), (3e-3,), (0.5, 1.0)) if quick else (RATIOS, RATES, EPOCHS)
    found = []
    for ratio in ratios:
        shapes = [()] if ratio is None else [
            (PruneStructure(ratio=ratio), FineTune(learning_rate=rate, epochs=n)) for rate, n in itertools.product(rates, epochs)
        ]  # fmt: skip
        for shape, numbers, engine in itertools.product(shapes, ((), (QuantizeStatic(),)), ENGINES):
            found.append(Recipe((*shape, *numbers), engine))
    return found


def exhaustive(module: Any, data: Any, place: Path, quick: bool) -> tuple[Path, Trial, float, int]:
    """The package of the best promising recipe, its trial, the seconds of all trials, and their number."""
    place.mkdir()
    options = hasten.Options(trials=1)
    given = verbs._Given.of(module, data.train, data.held_out, options)
    store = Store(place / verbs.STORE)
    try:
        job = verbs._job(place, store, given, options.limit(0.01), options, False, nobody)
        with Workshop(place, loss=job.loss, seed=0) as workshop:
            bench = Bench(place, store, job.views.select, job.score, job.settings, workshop)
            job = run._settle(job, bench)
            recipes = space(quick)
            for at, recipe in enumerate(recipes):
                trial = bench.attempt(recipe)
                print(f"{at + 1} of {len(recipes)}: {trial.words}, {trial.reason or ''}", file=sys.stderr, flush=True)
            tried = store.trials()
            likely = [t for t in tried if t.measurement and job.settings.promising(t.measurement)]
            likely.sort(key=lambda t: job.settings.objective.cost(t.measurement))  # type: ignore[arg-type]
            hot = finals.heat(bench, likely[:6])
            best = min(likely[:6], key=lambda t: job.settings.objective.cost(hot[t.number]))
            return bench.package(best.number), best, sum(t.seconds for t in tried), len(tried)
    finally:
        store.close()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The exhaustive search, then the other one."""
    wanted = next(r for r in reference_networks.REFERENCES if r.name == options.network)
    if options.quick:
        wanted = replace(wanted, settings=replace(wanted.settings, epochs=1 / 8))
    module, data, _ = reference_networks.reference(wanted)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        package, oracle, all_s, count = exhaustive(module, data, place / "all", options.quick)
        budget_s = SHARE * all_s
        presets.default = lambda *_, **__: CATALOGUE
        start = time.monotonic()
        limit_s = budget_s + min(100.0, budget_s)  # what follows the trials gets at least so much
        report = hasten.optimize(module, data.train, data.held_out, run=place / "run", options=hasten.Options(time_limit=limit_s))
        seconds = time.monotonic() - start
        assert report.chosen
        folders = (place / "run" / "packages" / str(report.chosen.trial), package, place / "all" / "packages" / "0")
        protocol = timing.Protocol(fewest=2, most=2, block_ms=10, blocks=2) if options.quick else timing.FULL
        timed = timing.race([timing.Contestant(folder=f) for f in folders], data.held_out.inputs, [1], protocol=protocol)
    ours, theirs = timed.speedup(2, 0)[0].to_json(), timed.speedup(2, 1)[0].to_json()
    return {
        "network": wanted.name,
        "oracle": {"recipe": oracle.words, "speedup": theirs, "trials": count, "trial_seconds": all_s},
        "search": {
            "recipe": report.chosen.words,
            "speedup": ours,
            "verdict": report.verdict,
            "trials": len(report.trials),
            "trial_seconds": sum(t.seconds for t in report.trials),
            "seconds": seconds,
        },
        "share_of_time": sum(t.seconds for t in report.trials) / all_s,
        "share_of_speedup": ours["value"] / theirs["value"],
        "within": ours["value"] >= (1 - WITHIN) * theirs["value"],
    }


def show(found: dict[str, Any]) -> None:
    """Two lines and the verdict."""
    for who in ("oracle", "search"):
        told = found[who]
        speed = f"{told['speedup']['value']:.2f}× ({told['speedup']['low']:.2f}–{told['speedup']['high']:.2f})"
        print(f"{who:7} {speed} over eager, {told['trials']} trials in {told['trial_seconds']:.0f} s: {told['recipe']}")
    print(f"{found['share_of_speedup']:.1%} of the best speed-up in {found['share_of_time']:.1%} of the time of all trials")


if __name__ == "__main__":
    names = [r.name for r in reference_networks.REFERENCES]
    machine.run("search_oracle", measure, show, lambda p: p.add_argument("--network", choices=names, default="small_cnn-mnist5k"))
