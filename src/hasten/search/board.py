"""What a dialogue knows: the trials so far, what they cost, what they promise, and how much time is left.

Everything here is a function of the trials, their times included, so that a resumed run finds the same.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from hasten.core.errors import UsageError
from hasten.core.recipe import Recipe, Step
from hasten.core.report import Trial
from hasten.search.catalogue import Settings
from hasten.search.pace import trains

Dialogue = Generator[Recipe, Trial, None]

GAIN = 1.02  # a change must bring this much to be called better
HOPE = 4.0  # times the limit: what is beyond is not mended by other settings
LAST_HOPE = 10.0  # times the limit: what is beyond is not mended by a long training either
_STEP = 4.0  # a step of training takes as long as so many runs forwards: forwards, backwards, and the original's answer
_BATCH = 32


@dataclass(kw_only=True)
class Board:
    """The trials so far, by recipe.

    Args:
        settings: what the user asked for.
        share: of the time for trials that may be used up to now.
        guesses: settings to begin with, by kind of step.
    """

    settings: Settings
    share: float = 1.0
    guesses: Mapping[type[Step], Step] = field(default_factory=dict)
    trials: dict[Recipe, Trial] = field(default_factory=dict)

    def ask(self, recipes: Sequence[Recipe], *, whatever: bool = False) -> Dialogue:
        """Has recipes tried that were not, while there is time for them, or `whatever` the time."""
        for recipe in recipes:
            if recipe not in self.trials and (whatever or self.left_s() > self.training_s(recipe)):
                self.trials[recipe] = yield recipe

    def usual(self, kind: type[Step]) -> Any:
        """The step to begin with."""
        return self.guesses.get(kind) or kind()

    def cost(self, recipe: Recipe) -> float:
        """What is to become small; infinite if it was not measured."""
        trial = self.trials.get(recipe)
        return self.settings.objective.cost(trial.measurement) if trial and trial.measurement else math.inf

    def drop(self, recipe: Recipe) -> float:
        """Score drop on *select*, infinite if there is none."""
        trial = self.trials.get(recipe)
        return trial.measurement.score_drop if trial and trial.measurement else math.inf

    def better(self, recipe: Recipe, than: Recipe) -> bool:
        """Whether it costs clearly less."""
        return self.cost(recipe) * GAIN < self.cost(than)

    def ranked(self, recipes: Sequence[Recipe]) -> list[Recipe]:
        """Those that ran, the lowest cost first."""
        return sorted((r for r in recipes if self.cost(r) < math.inf), key=self.cost)

    def hopeful(self, recipe: Recipe, times: float = HOPE) -> bool:
        """Whether its score drop is at most so many times the limit."""
        return self.drop(recipe) <= times * self.settings.limit.max_drop + 1e-9

    def known_hopeless(self, recipe: Recipe) -> bool:
        """Whether the same steps have lost the score beyond hope in another engine, and do not depend on the engine."""
        if any(step.reads_profile for step in recipe.steps):
            return False
        return any(r.steps == recipe.steps and self.cost(r) < math.inf and not self.hopeful(r) for r in self.trials)

    def promising(self, recipe: Recipe) -> bool:
        """Whether a proof is to be expected."""
        trial = self.trials.get(recipe)
        return bool(trial and trial.measurement and self.settings.promising(trial.measurement))

    def left_s(self) -> float:
        """Seconds of trials that may still be spent now."""
        return self.share * self.settings.search_s - sum(t.seconds for t in self.trials.values())

    def training_s(self, recipe: Recipe) -> float:
        """How long a trial with its training will probably take; 0 where there is none or its outcome is kept."""
        trained = _trained(recipe.steps)
        if not trained or any(r.steps[: len(trained)] == trained for r in self.trials):
            return 0.0
        return _epochs(trained) * self.epoch_s() + self.beside_s()

    def beside_s(self) -> float:
        """Seconds of a trial beside its training: what those with steps and without a training usually took."""
        return median([t.seconds for r, t in self.trials.items() if r.steps and not _trained(r.steps) and t.measurement] or [0.0])

    def epoch_s(self) -> float:
        """Seconds of a pass over the training data: what the last trainings took beyond a trial without them, else told by the time of
        the network as given."""
        seen: set[tuple[Step, ...]] = set()
        passes: list[float] = []
        usual = median([t.seconds for t in self.trials.values()] or [0.0])
        for recipe, trial in self.trials.items():
            trained = _trained(recipe.steps)
            if trained and trained not in seen and trial.pace_s:
                passes.append(trial.pace_s / _epochs(trained))
            elif trained and trained not in seen and trial.measurement:
                untrained = self.trials.get(Recipe(tuple(s for s in recipe.steps if not trains(s)), recipe.engine))
                beside = usual if untrained is None else untrained.seconds
                passes.append(max(trial.seconds - beside, 0.1 * trial.seconds) / _epochs(trained))
            seen.add(trained)
        if passes:
            return max(passes[-2:])
        first = next((t.measurement for t in self.trials.values() if t.measurement), None)
        if first is None:
            return 0.0
        entry = min(first.latency, key=lambda e: abs(e.batch - _BATCH))
        return _STEP * self.settings.train_examples * entry.p50_ms / entry.batch / 1e3


def insert(recipe: Recipe, step: Step) -> Recipe | None:
    """The recipe with `step` at the place of its stage, or None where the order of forms forbids it."""
    before = tuple(s for s in recipe.steps if s.stage <= step.stage)
    try:
        return Recipe((*before, step, *recipe.steps[len(before) :]), recipe.engine)
    except UsageError:
        return None


def _trained(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The steps up to the last one that trains."""
    last = max((i for i, step in enumerate(steps) if trains(step)), default=-1)
    return steps[: last + 1]


def _epochs(steps: tuple[Step, ...]) -> float:
    return sum(float(getattr(step, "epochs", 0.0)) for step in steps if trains(step))
