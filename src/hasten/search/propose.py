"""Which recipe to try next. Knows steps and engines by their class facts and fields alone.

Cheap before dear: (1) race the engines on the unchanged network; (2) put each step that keeps the structure in front of each engine,
a gentler one where it loses too much, and tune the fastest engines on the unchanged network; (3) change the structure, which needs a
training each time (`shape.py`); (4) tune the fields of what came out best; (5) where score was lost, try the steps that aim at it.
Before (3) no more than `FIRST` of the time is used; only what pays most in (2), each lossy step as usual in the fastest engine, may
take `SURE`, so that a run of a minute tries integers before it asks what a training could do.
It is a generator: it yields a recipe and is sent the trial, so its choices are a function of the trials alone and a resumed
run repeats them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from hasten.core.recipe import Engine, Recipe, Space, Stage, Step
from hasten.search.board import GAIN, LAST_HOPE, Board, Dialogue, insert
from hasten.search.catalogue import Catalogue, Settings
from hasten.search.shape import shape

SLOW = 2.5  # an engine that costs this many times the best one on the unchanged network is left behind
TRIES = 3  # settings of one step, where the usual one loses too much
REPAIR = 0.25  # share of the limit that a recipe must lose before steps that aim at the score are tried
FIRST = 0.4  # share of the time for what comes before changes of the structure
SURE = 0.7  # share of the time for each lossy step, once


def propose(
    catalogue: Catalogue,
    spaces: Mapping[type[Step], Space],
    settings: Settings,
    guesses: Mapping[type[Step], Step] | None = None,
) -> Dialogue:
    """Yields recipes worth a trial and is sent each one's trial; ends when nothing more seems to pay or the time is used up.

    Args:
        catalogue: the methods.
        spaces: what each kind of step may vary on this network; a kind that cannot treat it is not there.
        settings: what the user asked for.
        guesses: settings to begin with, by kind of step, in the place of the usual ones.
    """
    useful = {kind: space for kind, space in spaces.items() if kind.aims == {"score"} or kind.aims & settings.aims}
    menders = {kind: space for kind, space in useful.items() if kind.aims == {"score"}}
    shaping = {kind: space for kind, space in useful.items() if kind.stage == Stage.STRUCTURE and not kind.lossless and kind not in menders}
    gentler = {kind: space for kind, space in useful.items() if _instead_of(kind) in useful}
    share = FIRST if shaping and menders and catalogue.trainings else 1.0
    board = Board(settings=settings, share=share, guesses=guesses or {})
    engines = (catalogue.as_given, *(e for e in catalogue.engines if e != catalogue.as_given))
    yield from board.ask([Recipe((), engine) for engine in engines], whatever=True)
    plain = board.ranked([Recipe((), engine) for engine in engines])
    leaders = [recipe for recipe in plain if board.cost(recipe) <= SLOW * board.cost(plain[0])]
    best = {recipe.engine: recipe for recipe in leaders}
    # What loses something pays most and comes first. Integers change which engine is fastest, so every leader meets them.
    keeping = [kind for kind in useful if kind not in menders and kind not in shaping and kind not in gentler]
    keeping.sort(key=lambda kind: (kind.lossless, kind.stage, kind.__name__))
    board.share = max(share, SURE)
    for kind in keeping if leaders else ():
        yield from board.ask([r for r in [insert(leaders[0], board.usual(kind))] if r and not kind.lossless])
    board.share = share
    for kind in keeping:
        yield from _extend(board, _settings(board, kind, spaces[kind]), best)
    for kind, space in gentler.items():
        yield from _spare(board, kind, _settings(board, kind, space))
    for recipe in leaders[:2] if catalogue.tune else ():
        yield from _tune(board, recipe, recipe.engine, recipe.engine.space())
    board.share = 1.0
    least = min(map(board.cost, best.values()), default=0.0)
    near = [recipe for recipe in best.values() if board.cost(recipe) <= SLOW * least]
    behind = {kind: space for kind, space in menders.items() if not kind.reads_profile}
    yield from shape(board, shaping, behind, near, catalogue.trainings)
    if catalogue.tune:
        yield from _polish(board, spaces, menders)
    if catalogue.trainings:
        yield from _repair(board, menders)


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


def _polish(board: Board, spaces: Mapping[type[Step], Space], menders: Mapping[type[Step], Space]) -> Dialogue:
    """Fields of the last steps and of the engines of what came out best; what lies before a training stays, for it is dear."""
    changed = [r for r in board.ranked(list(board.trials)) if r.steps and board.hopeful(r)]
    for recipe in changed[:2]:
        trained = max((i for i, s in enumerate(recipe.steps) if type(s) in menders), default=-1)
        for step in recipe.steps[trained + 1 :]:
            yield from _tune(board, recipe, step, spaces[type(step)])
    for recipe in _distinct(board, changed):
        yield from _tune(board, recipe, recipe.engine, recipe.engine.space())


def _tune(board: Board, recipe: Recipe, part: Step | Engine, space: Space) -> Dialogue:
    """One field of one part at a time, going on from the best value that loses no more score than the limit allows."""
    best, current = recipe, part
    for name, values in space.items():
        for value in values:
            if value == getattr(part, name):
                continue
            changed = dataclasses.replace(current, **{name: value})  # type: ignore[type-var]
            candidate = replace_part(best, current, changed)
            yield from board.ask([candidate])
            if board.better(candidate, best) and board.hopeful(candidate):
                best, current = candidate, changed


def _settings(board: Board, kind: type[Step], space: Space) -> list[Step]:
    """The first few settings of a step, the usual one first."""
    return [board.usual(kind), *variations(board.usual(kind), space)][:TRIES]


def _instead_of(kind: type[Step]) -> type[Step] | None:
    return getattr(kind, "instead_of", None)


def _spare(board: Board, kind: type[Step], steps: Sequence[Step]) -> Dialogue:
    """A gentler kind in the place of the one that is faster than all that a proof is expected of, and loses too much for one."""
    for recipe in board.ranked(list(board.trials)):
        strong = next((s for s in recipe.steps if type(s) is _instead_of(kind)), None)
        if strong is None:
            continue
        for step in steps:
            safe = min((r for r in board.trials if board.promising(r)), key=board.cost, default=None)
            candidate = replace_part(recipe, strong, step)
            if candidate in board.trials or (safe and not board.better(recipe, safe)):
                break
            yield from board.ask([candidate])
            if board.promising(candidate):
                break


def _extend(board: Board, steps: Sequence[Step], best: dict[Any, Recipe]) -> Dialogue:
    """The step in the best recipe of each engine; where it pays, later steps build on it. `steps`: its settings, the usual first.

    What is lossless most engines do for themselves when they load a network, so it meets the two best only.
    """
    for engine, recipe in list(best.items())[: 2 if steps[0].lossless else None]:
        for base in _bases(recipe, steps[0]):
            made = yield from _first_hopeful(board, base, recipe, steps)
            if made is not None and board.better(made, recipe):
                best[engine] = made
                break


def _bases(recipe: Recipe, step: Step) -> Iterator[Recipe]:
    """What a step is put into: the recipe, and the recipe without the lossy steps whose place it would take."""
    yield recipe
    others = tuple(s for s in recipe.steps if s.stage != step.stage or s.lossless)
    if not step.lossless and others != recipe.steps:
        yield Recipe(others, recipe.engine)


def _first_hopeful(board: Board, base: Recipe, before: Recipe, steps: Sequence[Step]) -> Generator[Recipe, Any, Recipe | None]:
    """The base with the first of the settings that gives hope or is no faster; None where all lose the score beyond hope."""
    for step in steps:
        candidate = insert(base, step)
        if candidate is None:
            return None
        if board.known_hopeless(candidate):
            continue
        yield from board.ask([candidate])
        if board.hopeful(candidate) or not board.better(candidate, before):
            return candidate
    return None


def _trained(board: Board, recipe: Recipe, step: Step, space: Space) -> Recipe | None:
    """The recipe with a training in its place, of as many epochs as there is time for and at most the usual."""
    lengths = sorted((e for e in space.get("epochs", ()) if e <= step.epochs), reverse=True)  # type: ignore[attr-defined]
    found = [insert(recipe, dataclasses.replace(step, epochs=e)) for e in lengths] or [insert(recipe, step)]  # type: ignore[type-var]
    return next((r for r in found if r is None or board.left_s() > board.training_s(r)), None)


def _mends(kind: type[Step], lost: Step) -> bool:
    """Whether a training wins back what a step loses: behind it any, in front of it one that knows what follows."""
    return kind.reads_profile == (lost.stage > kind.stage)


def _repair(board: Board, menders: Mapping[type[Step], Space]) -> Dialogue:
    """Steps that aim at the score in front of what lost some; a recipe that was trained already has had its chance."""
    limit = board.settings.limit.max_drop
    # Only what would beat every recipe that loses next to nothing is worth a training.
    safe = min((board.cost(r) for r in board.trials if board.drop(r) <= REPAIR * limit), default=float("inf"))
    untrained = [r for r in board.ranked(list(board.trials)) if not any(type(s) in menders for s in r.steps)]
    reach = [r for r in untrained if board.hopeful(r, LAST_HOPE) and board.cost(r) * GAIN < safe]
    for recipe in [r for r in reach if board.drop(r) > REPAIR * limit][:2]:
        for kind, space in menders.items():
            able = any(_mends(kind, step) for step in recipe.steps if not step.lossless)
            first = _trained(board, recipe, kind(), space) if able else None
            if first is None:
                continue
            yield from board.ask([first])
            if board.drop(first) > REPAIR * limit:
                yield from board.ask([r for p in variations(kind(), space) if (r := insert(recipe, p))])


def _distinct(board: Board, changed: Sequence[Recipe]) -> list[Recipe]:
    """The best changed recipe of each of the two best engines."""
    first: dict[type[Any], Recipe] = {}
    for recipe in board.ranked(changed):
        first.setdefault(type(recipe.engine), recipe)
    return list(first.values())[:2]
