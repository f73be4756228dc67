"""How the search changes the structure: on made-up trials, where the best answer is known and every training counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Recipe, Space, Stage
from hasten.core.report import Latency, Limit, Measurement, Trial
from hasten.search import shape as shape_room
from hasten.search.board import Board
from hasten.search.catalogue import Catalogue, Settings
from hasten.search.propose import propose
from hasten.search.shape import middle
from methods import Quick, Quicker, Round, Slow


@dataclass(frozen=True, kw_only=True)
class Thin:
    takes: ClassVar[Kind] = "module"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    lossless: ClassVar[bool] = False
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed", "size"})
    reads_profile: ClassVar[bool] = False
    ratio: float = 0.5
    scope: str = "layer"

    def apply(self, network: Network, context: Context) -> Network:
        return network

    @classmethod
    def space(cls, network: Network | None) -> Space:
        return {"scope": ("layer", "global"), "ratio": (0.5, 0.25, 0.75)}


@dataclass(frozen=True, kw_only=True)
class Cut(Thin):
    blocks: int = 1

    @classmethod
    def space(cls, network: Network | None) -> Space:
        return {"blocks": (1, 2, 3)}


@dataclass(frozen=True, kw_only=True)
class Train(Thin):
    stage: ClassVar[Stage] = Stage.TRAIN
    aims: ClassVar[frozenset[Aim]] = frozenset({"score"})
    epochs: float = 6.0
    learning_rate: float = 1e-3

    @classmethod
    def space(cls, network: Network | None) -> Space:
        return {"learning_rate": (1e-3, 3e-4, 3e-3), "epochs": (6.0, 2.0, 15.0)}


Model = Callable[[Recipe], tuple[float, float, float]]
CATALOGUE = Catalogue(as_given=Slow(), engines=(Quick(), Quicker()), steps=(Thin, Cut, Train, Round), tune=False, trainings=5)
SPACES: dict[Any, Space] = {kind: kind.space(None) for kind in CATALOGUE.steps}  # type: ignore[attr-defined]
SETTINGS = Settings(limit=Limit(max_drop=0.01), prove_examples=5_000, train_examples=10_000)


def run(model: Model, settings: Settings = SETTINGS, guesses: dict[Any, Any] | None = None) -> list[Trial]:
    """The trials of a whole search; `model` gives latency in ms, score drop and seconds."""
    dialogue, said = propose(CATALOGUE, SPACES, settings, guesses), []
    cached: set[str] = set()
    try:
        recipe = next(dialogue)
        while True:
            ms, drop, seconds = model(recipe)
            trained = str([s for s in recipe.steps if not isinstance(s, Round)])
            seconds, cached = (2.0 if trained in cached else seconds), cached | {trained}
            latency = tuple(Latency(batch=b, p50_ms=ms, p95_ms=ms, calls=1, launches=1, first_call_ms=ms) for b in (1, 32))
            measured = Measurement(
                score=1 - drop, score_drop=drop, flips=abs(drop), max_difference=0, latency=latency, size_bytes=1, peak_memory_bytes=1
            )
            told = {"number": len(said), "recipe": recipe.to_json(), "words": str(recipe)}
            said.append(Trial(**told, state="finished", measurement=measured, seconds=seconds))
            recipe = dialogue.send(said[-1])
    except StopIteration:
        return said


def steps(trial: Trial) -> dict[str, Any]:
    return {type(s).__name__: s for s in Recipe.from_json(trial.recipe).steps}


def trainings(trials: list[Trial]) -> list[Trial]:
    """The trials that really train: what stands behind a training comes from the cache."""
    seen: dict[str, Trial] = {}
    for t in trials:
        names = [str(s) for s in Recipe.from_json(t.recipe).steps if not isinstance(s, Round)]
        if "Train" in steps(t):
            seen.setdefault(str(names), t)
    return list(seen.values())


def best(trials: list[Trial], settings: Settings = SETTINGS) -> Trial:
    return min(
        (t for t in trials if t.measurement and settings.promising(t.measurement)), key=lambda t: settings.objective.cost(t.measurement)
    )


def world(bears: float = 0.62, *, rate: float = 3e-3, pass_s: float = 10.0, blocks: int = 0) -> Model:
    """A network that bears so large a ratio after a long training at the right rate, and so many blocks."""

    def model(recipe: Recipe) -> tuple[float, float, float]:
        kinds = {type(s): s for s in recipe.steps}
        ms, drop, seconds = {"Slow": 20.0, "Quick": 8.0, "Quicker": 10.0}[type(recipe.engine).__name__], 0.0, 2.0
        thin, cut, train = kinds.get(Thin), kinds.get(Cut), kinds.get(Train)
        ratio, gone = (thin.ratio if thin else 0.0), (cut.blocks if cut else 0)  # type: ignore[attr-defined]
        ms *= (1 - ratio) * (1 - 0.15 * gone)
        if Round in kinds:
            ms, drop = ms * (0.5 if isinstance(recipe.engine, Quicker) else 0.9), 0.001
        if ratio or gone:
            beyond = max(0.0, ratio - bears) * 0.4 + 0.1 * max(0, gone - blocks)
            off = 0.0 if train and train.learning_rate == rate else 0.01  # type: ignore[attr-defined]
            drop += 0.6 if train is None else 0.002 + beyond + off + 0.02 / train.epochs  # type: ignore[attr-defined]
        if train:
            seconds += pass_s * train.epochs  # type: ignore[attr-defined]
        return ms, drop, seconds

    return model


def test_the_largest_ratio_that_keeps_the_limit_is_found_and_rounded() -> None:
    trials = run(world())
    found = steps(best(trials))
    assert 0.5 <= found["Thin"].ratio <= 0.65
    assert found["Train"] == replace(Train(), learning_rate=3e-3, epochs=15.0)
    assert "Round" in found
    assert len(trainings(trials)) <= 2 * CATALOGUE.trainings


@pytest.mark.parametrize("bears", [0.3, 0.45, 0.7, 0.9])
def test_wherever_the_edge_lies_it_is_met_from_below(bears: float) -> None:
    found = steps(best(run(world(bears)))).get("Thin")
    assert found is not None
    assert min(bears, 0.75) - 0.07 <= found.ratio <= min(bears, 0.75) + 0.02


def test_kinds_are_combined_where_both_pay() -> None:
    assert {"Thin", "Cut", "Train", "Round"} <= set(steps(best(run(world(0.8, blocks=2)))))
    assert "Cut" not in steps(best(run(world(0.8, blocks=0))))


def test_what_buys_nothing_is_never_trained() -> None:
    def model(recipe: Recipe) -> tuple[float, float, float]:
        ms, drop, seconds = world()(recipe)
        return (8.0 if any(type(s) in (Thin, Cut) for s in recipe.steps) else ms), drop, seconds

    assert not trainings(run(model))


def test_a_network_that_bears_nothing_costs_few_trainings() -> None:
    trials = run(world(bears=-1.0))
    assert not any(t.words.count("epochs=15") for t in trials)
    assert len(trainings(trials)) <= CATALOGUE.trainings
    assert set(steps(best(trials))) <= {"Round"}


@pytest.mark.parametrize("limit_s", [120.0, 300.0, 600.0, 3600.0])
@pytest.mark.parametrize("pass_s", [1.0, 30.0, 400.0])
def test_the_time_for_trials_is_kept_and_used(limit_s: float, pass_s: float) -> None:
    settings = replace(SETTINGS, time_limit_s=limit_s)
    trials = run(world(pass_s=pass_s), settings)
    spent = sum(t.seconds for t in trials)
    forecast = 10_000 * 20.0 / 32 * 4 / 1e3  # of a pass, by the network as given; the first training shows what it really takes
    assert spent <= settings.search_s + 2.0 + 2 * max(0.0, pass_s - forecast)
    if pass_s * 8 < settings.search_s:
        assert "Thin" in steps(best(trials, settings))
    assert steps(best(trials, settings))


def test_the_same_trials_give_the_same_proposals() -> None:
    settings = replace(SETTINGS, time_limit_s=300.0)
    assert [t.recipe for t in run(world(), settings)] == [t.recipe for t in run(world(), settings)]


def test_middle() -> None:
    assert middle((Thin(ratio=0.5),), (Thin(ratio=0.75),)) == (Thin(ratio=0.625),)
    assert middle((Thin(ratio=0.5),), (Thin(ratio=0.53),)) is None
    assert middle((Thin(ratio=0.5),), (Thin(ratio=0.75, scope="global"),)) is None
    assert middle((Thin(),), (Thin(), Cut())) is None
    assert middle((Cut(blocks=1),), (Cut(blocks=2),)) is None


def test_a_pass_takes_what_the_last_training_took_by_its_pace_or_beyond_the_untrained_trial() -> None:
    thin, half = Recipe((Thin(),), Quick()), Recipe((Thin(), Train(epochs=0.5)), Quick())
    measured = run(world())[0].measurement
    board = Board(settings=SETTINGS)

    def seen(recipe: Recipe, seconds: float, **more: Any) -> None:
        number = len(board.trials)
        board.trials[recipe] = Trial(
            number=number, recipe=recipe.to_json(), words="", **{"state": "finished", "measurement": measured, "seconds": seconds, **more}
        )

    seen(Recipe((), Quick()), 1.0)
    seen(thin, 5.0)
    seen(half, 9.0)
    assert board.epoch_s() == pytest.approx(8.0)  # (9 − 5) / 0.5
    seen(half, 9.0, pace_s=3.0)
    assert board.epoch_s() == pytest.approx(6.0)
    assert board.beside_s() == 5.0  # export, launch, timing and answers, as in the untrained trial
    assert board.training_s(Recipe((Thin(), Train(epochs=2.0)), Quick())) == pytest.approx(2 * 6.0 + 5.0)
    mending = shape_room._Mending(step=Train(), space={"epochs": (1.0, 8.0)}, shorts=9, longs=1)
    assert mending._fitting(board, 8.0, 5.0 + 2 * 6.0) == 2.0  # the trial's other 5 s are no training
    seen(half, 9.0, pace_s=300.0, state="failed", measurement=None)  # stopped, and yet its pace is known
    assert board.epoch_s() == pytest.approx(600.0)


def test_a_first_training_that_was_too_long_is_made_shorter() -> None:
    """The forecast is far too low; what is learnt from the training that was stopped leads to one that fits."""
    settings = replace(SETTINGS, time_limit_s=300.0, train_examples=100_000)
    dialogue, told = propose(CATALOGUE, SPACES, settings, {Train: Train()}), list[tuple[float, bool, str]]()
    recipe = next(dialogue)
    for number in range(60):
        epochs = sum(s.epochs for s in recipe.steps if isinstance(s, Train))
        late = epochs * 100 > 80
        latency = tuple(Latency(batch=b, p50_ms=ms, p95_ms=ms, calls=1, launches=1, first_call_ms=ms) for b, ms in ((1, 1.0), (32, 0.02)))
        latency = tuple(replace(e, p50_ms=e.p50_ms / (2 if recipe.steps else 1)) for e in latency)
        shaped = any(type(s) in (Thin, Cut) for s in recipe.steps)
        drop = 0.5 if shaped and not epochs else 0.0
        measured = Measurement(
            score=1 - drop, score_drop=drop, flips=drop, max_difference=0, latency=latency, size_bytes=1, peak_memory_bytes=1
        )
        if epochs:
            told.append((epochs, late, str([s for s in recipe.steps if type(s) in (Thin, Cut)])))
        trial = Trial(
            number=number, recipe=recipe.to_json(), words="", state="failed" if late else "finished",
            measurement=None if late else measured, seconds=6.0 if late else 2.0 + 100 * epochs, pace_s=100 * epochs or None,
        )  # fmt: skip
        try:
            recipe = dialogue.send(trial)
        except StopIteration:
            break
    assert told[0][1]
    assert told[1][0] < told[0][0]
    assert not told[1][1]
    assert told[1][2] == told[0][2]  # the same shape again
