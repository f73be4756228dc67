"""Which recipe to try next. Knows steps and engines by their class facts and fields alone.

Cheap before dear: (1) race the engines on the unchanged network and tune the fastest; (2) put each step in front of each
engine, in the order of the stages, with a step that aims at the score behind it where it loses too much alone; (3) tune the
fields of what came out best; (4) where score was lost, try the steps that aim at it.
It is a generator: it yields a recipe and is sent the trial, so its choices are a function of the trials alone and a resumed
run repeats them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hasten.core.errors import UsageError
from hasten.core.recipe import Engine, Recipe, Space, Step
from hasten.core.report import Trial
from hasten.search.catalogue import Catalogue, Settings

Dialogue = Generator[Recipe, Trial, None]

SLOW = 4.0  # an engine this many times slower than the fastest on the unchanged network is left behind
GAIN = 1.02  # a change must bring this much to be called faster
TRIES = 3  # settings of one step, where the usual one loses too much
REPAIR = 0.25  # share of the limit that a recipe must lose before steps that aim at the score are tried


@dataclass(kw_only=True)
class _Board:
    """The finished trials so far, by recipe."""

    settings: Settings
    trials: dict[Recipe, Trial] = field(default_factory=dict)

    def ms(self, recipe: Recipe) -> float:
        """Latency at the user's batch size, infinite if there is none."""
        trial = self.trials.get(recipe)
        return trial.measurement.at(self.settings.batch).p50_ms if trial and trial.measurement else float("inf")

    def drop(self, recipe: Recipe) -> float:
        """Score drop on *select*, infinite if there is none."""
        trial = self.trials.get(recipe)
        return trial.measurement.score_drop if trial and trial.measurement else float("inf")

    def ranked(self, recipes: Sequence[Recipe]) -> list[Recipe]:
        """Those that ran, the fastest first."""
        return sorted((r for r in recipes if self.ms(r) < float("inf")), key=self.ms)

    def known_hopeless(self, recipe: Recipe) -> bool:
        """Whether the same steps have lost the score beyond hope in another engine, and do not depend on the engine."""
        if any(step.reads_profile for step in recipe.steps):
            return False
        return any(r.steps == recipe.steps and self.ms(r) < float("inf") and not self.hopeful(r) for r in self.trials)

    def hopeful(self, recipe: Recipe) -> bool:
        """Whether its score is not far beyond the limit."""
        return self.drop(recipe) <= 4 * self.settings.limit.max_drop + 1e-9


def propose(catalogue: Catalogue, spaces: Mapping[type[Step], Space], settings: Settings) -> Dialogue:
    """Yields recipes worth a trial and is sent each one's trial; ends when nothing more seems to pay.

    Args:
        catalogue: the methods.
        spaces: what each kind of step may vary on this network; a kind that cannot treat it is not there.
        settings: what the user asked for.
    """
    board = _Board(settings=settings)
    engines = (catalogue.as_given, *(e for e in catalogue.engines if e != catalogue.as_given))
    yield from _try(board, [Recipe((), engine) for engine in engines])
    plain = board.ranked([Recipe((), engine) for engine in engines])
    leaders = [recipe for recipe in plain if board.ms(recipe) <= SLOW * board.ms(plain[0])]
    best = {type(recipe.engine): recipe for recipe in leaders}
    for recipe in leaders[:2]:
        yield from _tune(board, recipe, recipe.engine, recipe.engine.space())
    # Integers change which engine is fastest, so every leader meets every step.
    menders = [kind for kind in spaces if kind.aims == {"score"}]
    for kind in sorted(spaces, key=lambda kind: (kind.stage, kind.__name__)):
        if kind not in menders:
            yield from _extend(board, [kind(), *variations(kind(), spaces[kind])][:TRIES], best, menders)
    changed = [r for r in board.ranked(list(board.trials)) if r.steps and board.hopeful(r)]
    for recipe in changed[:2]:
        for step in (s for s in recipe.steps if type(s) not in menders):
            yield from _tune(board, recipe, step, spaces[type(step)])
    for recipe in _distinct(board, changed):
        yield from _tune(board, recipe, recipe.engine, recipe.engine.space())
    yield from _repair(board, menders, spaces)


def insert(recipe: Recipe, step: Step) -> Recipe | None:
    """The recipe with `step` at the place of its stage, or None where the order of forms forbids it."""
    before = tuple(s for s in recipe.steps if s.stage <= step.stage)
    try:
        return Recipe((*before, step, *recipe.steps[len(before) :]), recipe.engine)
    except UsageError:
        return None


def replace_part(recipe: Recipe, part: Step | Engine, new: Step | Engine) -> Recipe:
    """The recipe with one part exchanged."""
    steps: tuple[Any, ...] = tuple(new if s == part else s for s in recipe.steps)
    engine: Any = new if recipe.engine == part else recipe.engine
    return Recipe(steps, engine)


def variations(part: Step | Engine, space: Space) -> Iterator[Any]:
    """The part with one field changed at a time."""
    for name, values in space.items():
        for value in values:
            if value != getattr(part, name):
                yield dataclasses.replace(part, **{name: value})  # type: ignore[type-var]


def _try(board: _Board, recipes: Sequence[Recipe]) -> Dialogue:
    for recipe in recipes:
        if recipe not in board.trials:
            board.trials[recipe] = yield recipe


def _tune(board: _Board, recipe: Recipe, part: Step | Engine, space: Space) -> Dialogue:
    """One field of one part at a time, going on from the fastest value that loses no more score than the limit allows."""
    best, current = recipe, part
    for name, values in space.items():
        for value in values:
            if value == getattr(part, name):
                continue
            changed = dataclasses.replace(current, **{name: value})  # type: ignore[type-var]
            candidate = replace_part(best, current, changed)
            yield from _try(board, [candidate])
            if board.ms(candidate) * GAIN < board.ms(best) and board.hopeful(candidate):
                best, current = candidate, changed


def _extend(board: _Board, steps: Sequence[Step], best: dict[type[Any], Recipe], menders: Sequence[type[Step]]) -> Dialogue:
    """The step in the best recipe of each engine; where it pays, later steps build on it. `steps`: its settings, the usual first."""
    for engine, recipe in list(best.items()):
        for base in _bases(recipe, steps[0], menders):
            made = yield from _first_hopeful(board, base, recipe, steps, menders)
            if made is not None and board.ms(made) * GAIN < board.ms(recipe):
                best[engine] = made
                break


def _bases(recipe: Recipe, step: Step, menders: Sequence[type[Step]]) -> Iterator[Recipe]:
    """What a step is put into: the recipe, and the recipe without the lossy steps whose place it would take."""
    yield recipe
    others = tuple(s for s in recipe.steps if s.stage != step.stage or s.lossless or type(s) in menders)
    if not step.lossless and others != recipe.steps:
        yield Recipe(others, recipe.engine)


def _first_hopeful(
    board: _Board, base: Recipe, before: Recipe, steps: Sequence[Step], menders: Sequence[type[Step]]
) -> Generator[Recipe, Trial, Recipe | None]:
    """The base with the first of the settings that does not lose the score beyond mending, or None."""
    for candidate in (insert(base, step) for step in steps):
        if candidate is None:
            return None
        made = yield from _mended(board, candidate, before, menders)
        if made is not None:
            return made
    return None


def _mended(board: _Board, candidate: Recipe, before: Recipe, menders: Sequence[type[Step]]) -> Generator[Recipe, Trial, Recipe | None]:
    """The candidate where its score gives hope or its speed gives none; else with the first mender that brings hope; else None."""
    if not board.known_hopeless(candidate):
        yield from _try(board, [candidate])
        if board.hopeful(candidate) or not board.ms(candidate) * GAIN < board.ms(before):
            return candidate
    for kind in menders:
        longer = None if kind in {type(step) for step in candidate.steps} else insert(candidate, kind())
        if longer is not None:
            yield from _try(board, [longer])
            if board.hopeful(longer):
                return longer
    return None


def _repair(board: _Board, kinds: Sequence[type[Step]], spaces: Mapping[type[Step], Space]) -> Dialogue:
    limit = board.settings.limit.max_drop
    # Only what would beat every recipe that loses next to nothing is worth a training.
    safe = min((board.ms(r) for r in board.trials if board.drop(r) <= REPAIR * limit), default=float("inf"))
    ranked = board.ranked(list(board.trials))
    lossy = [r for r in ranked if board.drop(r) > REPAIR * limit and board.ms(r) * GAIN < safe]
    for recipe in lossy[:2]:
        for kind in kinds:
            if any(type(step) is kind for step in recipe.steps):
                yield from _tuned_in_place(board, recipe, kind, spaces[kind])
                continue
            first = insert(recipe, kind())
            if first is None:
                continue
            yield from _try(board, [first])
            if board.drop(first) > REPAIR * limit:
                yield from _try(board, [r for p in variations(kind(), spaces[kind]) if (r := insert(recipe, p))])


def _tuned_in_place(board: _Board, recipe: Recipe, kind: type[Step], space: Space) -> Dialogue:
    for step in [s for s in recipe.steps if type(s) is kind]:
        yield from _try(board, [replace_part(recipe, step, other) for other in variations(step, space)])


def _distinct(board: _Board, changed: Sequence[Recipe]) -> list[Recipe]:
    """The fastest changed recipe of each of the two fastest engines."""
    first: dict[type[Any], Recipe] = {}
    for recipe in board.ranked(changed):
        first.setdefault(type(recipe.engine), recipe)
    return list(first.values())[:2]
