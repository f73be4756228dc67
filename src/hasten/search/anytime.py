"""What lies on disk while a search runs: a result that is safe to use, and the best one so far; either is only ever replaced by a
better one."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from hasten.core.recipe import Recipe
from hasten.core.report import Trial
from hasten.search import export
from hasten.search.bench import Bench
from hasten.search.board import GAIN
from hasten.search.prover import EQUAL_TOLERANCE

if TYPE_CHECKING:
    from hasten.search.run import Job

SAFE, BEST = "artifact", "best-so-far"


class Best:
    """Keeps `artifact/`, the unchanged network in the best engine so far, and `best-so-far/`, the best that a proof is expected of."""

    def __init__(self, job: Job, bench: Bench) -> None:
        self._job, self._bench = job, bench
        numbers: dict[str, int] = job.store.fact("kept") or {}
        trials = {t.number: t for t in job.store.trials()} if numbers else {}
        self._kept = {name: trials[number] for name, number in numbers.items()}
        self._original: Trial | None = None

    def see(self, trial: Trial) -> None:
        """Looks at a trial that has ended, the network as given first; copies its package where it is the best now."""
        self._original = self._original or trial
        if not trial.measurement:
            return
        if trial.number == self._original.number or is_plain(trial):
            self._offer(SAFE, trial)
        elif self._bench.settings.promising(trial.measurement):
            self._offer(BEST, trial)
        self._job.watch.best = self._words()

    def _offer(self, name: str, trial: Trial) -> None:
        cost = self._bench.settings.objective.cost
        rivals = [t.measurement for k, t in self._kept.items() if k in (SAFE, name) and t.measurement]
        assert self._original
        assert trial.measurement
        if any(cost(trial.measurement) * GAIN >= cost(m) for m in rivals):
            return
        ship = self._bench.settings.time_limit_s is None  # exporting takes long, and it is seldom the result
        export.package(self._job.folder, self._bench, trial, self._original, name=name, proved=name == SAFE, ship=ship)
        self._kept[name] = trial
        best = self._kept.get(BEST)
        beaten = name == SAFE and best and best.measurement and cost(trial.measurement) <= cost(best.measurement)
        if beaten:
            del self._kept[BEST]  # what need not be proved is faster
        self._job.store.remember("kept", {k: t.number for k, t in self._kept.items()})
        if beaten:
            shutil.rmtree(self._job.folder / BEST, ignore_errors=True)

    def _words(self) -> str:
        best = self._kept.get(BEST, self._kept[SAFE])
        batch = self._bench.settings.batch
        assert best.measurement
        assert self._original
        assert self._original.measurement
        speed = self._original.measurement.at(batch).p50_ms / best.measurement.at(batch).p50_ms
        return f"{speed:.1f}× {best.words}{' (not proved yet)' if BEST in self._kept else ''}"


def is_plain(trial: Trial) -> bool:
    """Whether a trial is the unchanged network in a lossless engine whose answers bear that out."""
    recipe = Recipe.from_json(trial.recipe)
    ran = trial.measurement is not None and trial.measurement.max_difference <= EQUAL_TOLERANCE
    return ran and not recipe.steps and recipe.lossless
