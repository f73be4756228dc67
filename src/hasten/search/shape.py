"""Changing the structure, which pays most and needs a training each time; so trainings are what is saved.

(1) Probe: each setting without a training. A network runs as fast untrained, so what a setting buys is measured before anything
is paid for it; kinds that buy nothing here are left. (2) Climb: a short training at the usual setting, then at harder or milder
ones; the next kind is put on top of what came through. (3) Promote: long trainings, the hardest shape that came through first,
then the halves of what is left between the hardest that keeps the limit and the mildest that does not. (4) Finish: what keeps
the limit meets the number formats and engines that came out best on the unchanged network.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hasten.core.recipe import Recipe, Space, Stage, Step
from hasten.search.board import LAST_HOPE, Board, Dialogue, insert

Shape = tuple[Step, ...]
LENIENT = 2.5  # times the limit that a short training may lose: a long one brings more back
SHORT, SHORTS = 0.06, 0.4  # shares of the time: for one short training, and for all of them of what is left
LONG, ALL = 0.45, 0.85  # shares of what is left: for a long training with another behind it, and for the only one
_LEAST_EXAMPLES = 3_000  # that a short training sees
_FINEST = 1 / 16  # of a field's range: settings closer than this are not told apart


@dataclass(kw_only=True)
class _Mending:
    """The training behind a change of structure: its settings so far, and how many of each length are still allowed.

    `epochs`, where a step's space has it, is by convention how long the step works.
    """

    step: Any
    space: Space
    shorts: int
    longs: int
    tuned: bool = False
    begun: bool = False
    brief: float | None = None

    def short(self, board: Board) -> Any:
        """The step with the fewest epochs that its space names, or where time is short half of them, or as many as take enough examples."""
        if self.brief is None:
            self.brief = self._briefest(board)
        return self._lasting(self.brief)

    def long(self, board: Board) -> Any:
        """The step with the most epochs that its space names, or as many as leave time for another one, or as many as there is time for."""
        fewest, most = min(self._choices()), max(self._choices())
        fitting = self._fitting(board, most, LONG * board.left_s())
        if fitting < 2 * fewest:
            fitting = self._fitting(board, most, ALL * board.left_s())
        return self._lasting(max(fitting, self.brief or 0.0))

    def learnt(self, board: Board, *, ended: bool) -> bool:
        """Fits the short trainings to the time that the first one really takes; whether that calls for another first one."""
        before, self.brief = self.brief, self._briefest(board)
        each_s = self.brief * board.epoch_s() + board.beside_s()
        if 0 < each_s < math.inf and board.left_s() < math.inf:
            self.shorts = min(self.shorts, max(1, int(SHORTS * board.left_s() / each_s)))
        return before is not None and (self.brief >= 2 * before or (self.brief < before and not ended))

    def _briefest(self, board: Board) -> float:
        fewest, examples = min(self._choices()), board.settings.train_examples
        least = min(fewest / 2, max(0.25, _LEAST_EXAMPLES / examples)) if examples else fewest / 2
        return max(least, self._fitting(board, fewest, SHORT * board.settings.search_s))

    def _choices(self) -> tuple[float, ...]:
        return self.space.get("epochs") or (getattr(self.step, "epochs", 1.0),)

    def _fitting(self, board: Board, wanted: float, seconds: float) -> float:
        pass_s = board.epoch_s()
        affordable = max(0.0, seconds - board.beside_s()) / pass_s if pass_s > 0 else math.inf
        return wanted if affordable >= wanted else max(0.25, math.floor(4 * affordable) / 4)

    def _lasting(self, epochs: float) -> Any:
        if "epochs" not in self.space:
            return self.step
        kind = type(self.space["epochs"][0])
        return dataclasses.replace(self.step, epochs=max(kind(epochs), kind(1)) if kind is int else kind(epochs))


@dataclass(kw_only=True)
class _Line:
    """Shapes by what they cost untrained, and their drop after a short training; which came through, and the bounds of the long ones."""

    costs: dict[Shape, float] = field(default_factory=dict)
    drops: dict[Shape, float] = field(default_factory=dict)
    passed: set[Shape] = field(default_factory=set)
    kept: Shape | None = None
    lost: Shape | None = None

    def next(self) -> Shape | None:
        """What deserves the next long training: the hardest that came through between the bounds, else the middle of them; where
        nothing is kept yet, the next milder one."""
        low = self.costs[self.kept] if self.kept else math.inf
        high = self.costs[self.lost] if self.lost else 0.0
        between = [s for s in self.passed if high < self.costs[s] < low]
        if between:
            return min(between, key=lambda s: self.costs[s])
        if self.kept is None:
            milder = [s for s, cost in self.costs.items() if self.lost and cost > high]
            return min(milder, key=lambda s: self.costs[s], default=None)
        harder = sorted((s for s, cost in self.costs.items() if cost < low), key=lambda s: -self.costs[s])
        halves = (middle(self.kept, s) for s in ([self.lost] if self.lost else harder))
        return next((half for half in halves if half), None)


def shape(
    board: Board, spaces: Mapping[type[Step], Space], menders: Mapping[type[Step], Space], best: Sequence[Recipe], most: int
) -> Dialogue:
    """Tries kinds of steps that change the structure, each with a training behind it.

    Args:
        board: the trials so far.
        spaces: of the kinds that change the structure and lose score.
        menders: of the kinds that win score back; the first that trains is used, the others on what came out best.
        best: the best recipe of each engine without such a step; their engines and what follows a training are used.
        most: trainings of either length.
    """
    trainers = [kind for kind in menders if kind.stage == Stage.TRAIN]
    grounds = board.ranked([r for r in board.trials if not r.steps and r.lossless])
    if not (spaces and trainers and grounds and most):
        return
    ground = grounds[0]
    ladders = yield from _probed(board, ground, spaces)
    mending = _Mending(
        step=board.usual(trainers[0]), space=menders[trainers[0]], shorts=most, longs=most, tuned=trainers[0] in board.guesses
    )
    line = _Line()
    base: Shape = ()
    line.costs = {(rung,): board.cost(_recipe(ground, (rung,), None)) for ladder in ladders for rung in ladder}
    for ladder in ladders:
        base = yield from _climb(board, ground, base, ladder, mending, line)
    if line.drops and not line.passed:
        best_short = min(line.drops, key=lambda s: line.drops[s])
        if line.drops[best_short] <= LAST_HOPE * board.settings.limit.max_drop:
            line.passed.add(best_short)
    while mending.longs and (chosen := line.next()) is not None:
        mending.longs -= 1
        untrained = _recipe(ground, chosen, None)
        yield from board.ask([untrained])
        line.costs.setdefault(chosen, board.cost(untrained))
        recipe = untrained if board.promising(untrained) else _recipe(ground, chosen, mending.long(board))
        yield from board.ask([recipe])
        line.passed.discard(chosen)
        if board.promising(recipe):
            line.kept = chosen
            yield from _finish(board, recipe, best)
        else:
            line.lost = chosen
    if line.kept:
        yield from _others(board, line.kept, ground, mending, trainers[1:], best)


def middle(one: Shape, other: Shape) -> Shape | None:
    """Half-way between two shapes that differ in one float of one step; None where they differ otherwise or hardly at all."""
    if [type(s) for s in one] != [type(s) for s in other]:
        return None
    different = [(i, f.name) for i, s in enumerate(one) for f in dataclasses.fields(s) if getattr(s, f.name) != getattr(other[i], f.name)]  # type: ignore[arg-type]
    if len(different) != 1:
        return None
    at, name = different[0]
    a, b = getattr(one[at], name), getattr(other[at], name)
    if not (isinstance(a, float) and isinstance(b, float)) or abs(a - b) < _FINEST:
        return None
    half = dataclasses.replace(one[at], **{name: round((a + b) / 2, 4)})  # type: ignore[type-var]
    return (*one[:at], half, *one[at + 1 :])


def _probed(board: Board, ground: Recipe, spaces: Mapping[type[Step], Space]) -> Generator[Recipe, Any, list[list[Step]]]:
    """For each kind that pays here its settings that do, from mild to hard; the kind that buys most comes first."""
    found: list[tuple[float, list[Step]]] = []
    for kind, space in sorted(spaces.items(), key=lambda item: item[0].__name__):
        steps = _settings(kind, space)
        recipes = {step: r for step in steps if (r := insert(ground, step)) is not None}
        yield from board.ask(list(recipes.values()))
        ran = [s for s in steps if s in recipes and board.cost(recipes[s]) < math.inf]
        if ran and board.cost(recipes[ran[0]]) < board.cost(recipes[ran[-1]]):
            ran.reverse()  # by the ends, as neighbours may be too alike to tell
        rungs = [s for s in ran if board.better(recipes[s], ground)]
        if rungs:
            found.append((min(board.cost(recipes[s]) for s in rungs), rungs))
    return [rungs for _, rungs in sorted(found, key=lambda pair: pair[0])]


def _settings(kind: type[Step], space: Space) -> list[Step]:
    """The kind with each value of its first field of numbers, in their order; other fields as usual."""
    for name, values in space.items():
        if len(values) > 1 and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
            return [kind(**{name: value}) for value in sorted(values)]
    return [kind()]


def _climb(
    board: Board, ground: Recipe, base: Shape, rungs: Sequence[Step], mending: _Mending, line: _Line
) -> Generator[Recipe, Any, Shape]:
    """The hardest rung on top of `base` that a short training brings back into reach; `base` where none is."""
    at = 0 if base else _nearest(rungs, board.usual(type(rungs[0])))
    low, high = -1, len(rungs)
    while low < at < high and mending.shorts:
        candidate = (*base, rungs[at])
        if (yield from _comes_through(board, ground, candidate, mending, line)):
            low, at = at, at + 1
        else:
            high, at = at, at - 1
    return (*base, rungs[low]) if low >= 0 else base


def _nearest(rungs: Sequence[Step], usual: Step) -> int:
    """The rung that is most like the usual step; the one in the middle where none is like it at all."""
    varied = [f.name for f in dataclasses.fields(usual) if len({str(getattr(r, f.name)) for r in rungs}) > 1]  # type: ignore[arg-type]
    away = [sum(abs(getattr(r, name) - getattr(usual, name)) for name in varied) for r in rungs]
    return away.index(min(away)) if varied else len(rungs) // 2


def _comes_through(board: Board, ground: Recipe, candidate: Shape, mending: _Mending, line: _Line) -> Generator[Recipe, Any, bool]:
    """Whether a short training leaves hope. The first one that does not do settles the training's other settings."""
    untrained = _recipe(ground, candidate, None)
    yield from board.ask([untrained])
    line.costs[candidate] = board.cost(untrained)
    if not board.better(untrained, ground):
        return False
    if board.promising(untrained):
        line.passed.add(candidate)
        return True
    mending.shorts -= 1
    recipe = _recipe(ground, candidate, mending.short(board))
    yield from board.ask([recipe])
    if not mending.begun:
        mending.begun = True
        if mending.learnt(board, ended=board.cost(recipe) < math.inf):
            recipe = _recipe(ground, candidate, mending.short(board))
            yield from board.ask([recipe])
    line.drops[candidate] = board.drop(recipe)
    if not mending.tuned and not board.promising(recipe):
        yield from _settle(board, ground, candidate, mending)
        recipe = _recipe(ground, candidate, mending.short(board))
        line.drops[candidate] = board.drop(recipe)
    if board.hopeful(recipe, LENIENT):
        line.passed.add(candidate)
        return True
    return False


def _settle(board: Board, ground: Recipe, candidate: Shape, mending: _Mending) -> Dialogue:
    """Varies the training but for its length: each field's next higher values while the drop shrinks, else the next lower."""
    mending.tuned = True
    for name, values in mending.space.items():
        ordered = sorted(values) if all(isinstance(v, (int, float)) for v in values) else list(values)
        if name == "epochs" or getattr(mending.step, name) not in ordered:
            continue
        start = ordered.index(getattr(mending.step, name))
        for way in (ordered[start + 1 :], ordered[:start][::-1]):
            moved = yield from _along(board, ground, candidate, mending, name, way)
            if moved:
                break


def _along(
    board: Board, ground: Recipe, candidate: Shape, mending: _Mending, name: str, way: Sequence[Any]
) -> Generator[Recipe, Any, bool]:
    moved = False
    for value in way:
        if not mending.shorts:
            break
        before, given = _recipe(ground, candidate, mending.short(board)), mending.step
        mending.step = dataclasses.replace(given, **{name: value})
        changed = _recipe(ground, candidate, mending.short(board))
        mending.shorts -= 1
        yield from board.ask([changed])
        if not board.drop(changed) < board.drop(before):
            mending.step = given
            break
        moved = True
    return moved


def _finish(board: Board, trained: Recipe, best: Sequence[Recipe]) -> Dialogue:
    """What was trained, with each engine, and with what follows a training in the best recipe of that engine."""
    for recipe in best:
        behind = tuple(s for s in recipe.steps if s.stage > Stage.TRAIN)
        endings = [(*trained.steps, *behind), trained.steps] if behind else [trained.steps]
        yield from board.ask([Recipe(steps, recipe.engine) for steps in endings])


def _others(
    board: Board, kept: Shape, ground: Recipe, mending: _Mending, trainers: Sequence[type[Step]], best: Sequence[Recipe]
) -> Dialogue:
    """The other ways to train, on the hardest shape that keeps the limit."""
    length = getattr(mending.long(board), "epochs", None)
    for kind in trainers:
        step: Any = kind()
        if length is not None and hasattr(step, "epochs"):
            step = dataclasses.replace(step, epochs=length)
        recipe = _recipe(ground, kept, step)
        yield from board.ask([recipe])
        if board.promising(recipe):
            yield from _finish(board, recipe, best)


def _recipe(ground: Recipe, shape_: Shape, mender: Step | None) -> Recipe:
    return Recipe((*shape_, *(() if mender is None else (mender,))), ground.engine)
