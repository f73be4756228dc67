"""Trying recipes: made in the workshop, run in a worker, scored on *select*, timed for ranking, written down.

What goes wrong in a trial costs that trial alone: its reason is stored and the search goes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hasten.core import folder
from hasten.core.data import Array, View
from hasten.core.errors import ChildFailed, HastenError, RunLocked, StorageError
from hasten.core.network import Arrays
from hasten.core.recipe import Recipe
from hasten.core.report import Latency, Measurement, Trial
from hasten.core.runner import Runner
from hasten.core.score import Score
from hasten.core.store import Store
from hasten.measure import distances, energy, timing
from hasten.search import portions
from hasten.search.catalogue import Settings
from hasten.search.pace import Pace, trains
from hasten.search.workshop import Workshop

DEADLINE_S = 600.0  # of loading a network, and of each answer, which is up to 64 examples


@dataclass(frozen=True, kw_only=True, eq=False)
class Baseline:
    """What the network as given answers on *select*, and what its score is held against."""

    outputs: Arrays
    target: Array
    values: Array | None
    score: float


class Bench:
    """Tries recipes for one run.

    Args:
        run: the run folder.
        store: where trials are written down.
        select: the view that every choice looks at.
        score: what must not be lost.
        settings: batch sizes.
        workshop: makes packages.

    The first recipe that is tried must be the network as given: its outputs are what the others are held against.
    """

    def __init__(self, run: Path, store: Store, select: View, score: Score, settings: Settings, workshop: Workshop) -> None:
        self.run = run
        self.store = store
        self.select = select
        self.score = score
        self.settings = settings
        self.workshop = workshop
        self.left_s: Callable[[], float] = lambda: math.inf  # until the time limit
        if fitted := store.fact("fitted"):
            self.select, self.settings = portions.taken(select, settings, fitted)
        self.baseline = self._recall()

    def package(self, number: int) -> Path:
        """Where the package of a trial lies."""
        return self.run / "packages" / str(number)

    def contestant(self, trial: Trial) -> timing.Contestant:
        """The trial's package, ready to be launched."""
        return timing.Contestant(folder=self.package(trial.number), fixed_batch=self.facts(trial.number)["fixed_batch"])

    def facts(self, number: int) -> dict[str, Any]:
        """Parameters, MACs and the fixed batch of a trial's network."""
        found: dict[str, Any] = self.store.fact(f"network {number}") or {}
        return found

    def attempt(self, recipe: Recipe, progress: Callable[[float, str], None] | None = None) -> Trial:
        """The trial of this recipe: remembered, or run now. Only a full disk, a lost lock or Ctrl-C gets out of here."""
        trial = self.store.begin(recipe)
        if trial.state != "running":
            return trial
        start = time.perf_counter()
        pace = Pace(progress, deadline_s=self.workshop.deadline_s if any(map(trains, recipe.steps)) else math.inf)
        try:
            measurement = self._measure(recipe, trial.number, pace)
        except (StorageError, RunLocked):
            raise
        except (HastenError, OSError, MemoryError, ValueError) as why:
            if isinstance(why, OSError):
                with folder.storage(self.run):
                    raise
            reason = str(why) or type(why).__name__
            self.store.fail(trial.number, reason, seconds=time.perf_counter() - start, pace_s=pace.whole_s)
        else:
            self.store.finish(trial.number, measurement, seconds=time.perf_counter() - start, pace_s=pace.whole_s)
        return self.store.begin(recipe)

    def _measure(self, recipe: Recipe, number: int, progress: Callable[[float, str], None]) -> Measurement:
        if why := recipe.engine.available():
            raise ChildFailed(why)
        package = self.package(number)
        facts = self.workshop.make(recipe, package, progress)
        self.store.remember(f"network {number}", facts)
        with Runner(package, fixed_batch=facts["fixed_batch"], deadline_s=DEADLINE_S, ends=self.workshop.ends) as runner:
            if self.store.fact("fitted") is None:
                self._keep(portions.fit(runner, self.settings, self.select, self.score, facts["fixed_batch"]))
            outputs = runner.outputs(self.select.inputs)
            if self.baseline is None:
                baseline = self._establish(outputs)
                with folder.new_folder(self.run / "outputs" / "original") as fresh:
                    View(inputs=outputs).save(fresh)
                self.baseline = baseline
            with self.workshop.quiet():
                latency = timing.quick(runner, self.select.inputs, self.settings.batches)
                spent = self._energy(runner) if self.settings.counts_energy else None
            found = self._compare(outputs, latency, package, runner.peak_memory_bytes(), facts)
            return replace(found, energy_mj=spent)

    def _keep(self, fitted: dict[str, Any]) -> None:
        self.store.remember("fitted", fitted)
        self.select, self.settings = portions.taken(self.select, self.settings, fitted)

    def _energy(self, runner: Runner) -> float:
        piece = tuple(a[: self.settings.batch] for a in self.select.inputs)
        return energy.energy_mj(lambda calls: runner.time(piece, calls=calls))

    def _recall(self) -> Baseline | None:
        """The baseline that an earlier process of this run wrote down."""
        place = self.run / "outputs" / "original"
        if not folder.intact(place):
            return None
        return self._establish(tuple(np.asarray(a) for a in View.load(place).inputs))

    def _establish(self, outputs: Arrays) -> Baseline:
        target = self.select.labels if self.score.target == "labels" else outputs[0]
        if target is None:
            raise ChildFailed(f"the score {self.score.name} needs labels, and the data has none")
        values = self.score.per_example(outputs, target)
        return Baseline(outputs=outputs, target=target, values=values, score=finite(self.score.value(outputs, target)))

    def _compare(self, outputs: Arrays, latency: tuple[Latency, ...], package: Path, peak: int, facts: dict[str, Any]) -> Measurement:
        base = self.baseline
        assert base is not None
        check_alike(base.outputs, outputs)
        values = self.score.per_example(outputs, base.target)
        score = finite(self.score.value(outputs, base.target) if values is None else float(values.mean()))
        flips = None if values is None or base.values is None else float(np.mean(values != base.values))
        return Measurement(
            score=score,
            score_drop=base.score - score,
            flips=flips,
            max_difference=difference(base.outputs, outputs),
            latency=latency,
            size_bytes=folder.size_bytes(package),
            peak_memory_bytes=peak,
            parameters=facts["parameters"],
            macs=facts["macs"],
            distance=distance(base.outputs, outputs),
        )


def finite(score: float) -> float:
    """The score. Raises ChildFailed where it is no number: outputs that are finite can still overflow a square."""
    if not math.isfinite(score):
        raise ChildFailed(f"the score must be a finite number, got {score}")
    return score


def check_alike(expected: Arrays, got: Arrays) -> None:
    """Raises ChildFailed where outputs differ in number or shape, or where numbers are no numbers any more."""
    before, after = [a.shape for a in expected], [a.shape for a in got]
    if before != after:
        raise ChildFailed(f"outputs must have the shapes {before}, got {after}")
    for old, new in zip(expected, got, strict=True):
        if not np.isfinite(new[np.isfinite(old)]).all():
            raise ChildFailed("the outputs hold NaN or infinity where the original's are finite")


def difference(expected: Arrays, got: Arrays) -> float:
    """The largest |got − expected| over all outputs, each divided by its largest |expected|; infinite where not the same are finite."""
    worst = 0.0
    for old, new in zip(expected, got, strict=True):
        farthest, largest = distances.extremes(old, new)
        worst = max(worst, farthest / (largest or 1.0))
    return worst


def distance(expected: Arrays, got: Arrays) -> float:
    """Root mean square of got − expected as a share of that of expected; of several outputs the largest."""
    worst = 0.0
    for old, new in zip(expected, got, strict=True):
        scale = float(np.sqrt(np.mean(np.square(old, dtype=np.float64)))) if old.size else 0.0
        if scale and math.isfinite(scale):
            worst = max(worst, float(np.sqrt(np.mean(np.square(new.astype(np.float64) - old)))) / scale)
    return worst
