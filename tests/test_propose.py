"""The proposals: a function of the trials alone, cheap before dear, blind to names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from hasten.core.errors import UsageError
from hasten.core.recipe import Recipe
from hasten.core.report import Latency, Limit, Measurement, Trial
from hasten.search.board import insert
from hasten.search.catalogue import Catalogue, Settings
from hasten.search.propose import propose
from methods import Cast, Gentle, Mend, Quick, Quicker, Ready, Round, Shrink, Slow

CATALOGUE = Catalogue(as_given=Slow(), engines=(Quick(), Quicker()), steps=(Shrink, Mend, Round))
SPACES = {kind: kind.space(None) for kind in CATALOGUE.steps}  # type: ignore[arg-type]
SETTINGS = Settings(limit=Limit(max_drop=0.01))
Model = Callable[[Recipe], tuple[float, float]]


def run(model: Model, settings: Settings = SETTINGS, spaces: dict = SPACES) -> list[Recipe]:  # type: ignore[type-arg]
    """Talks to `propose` with made-up trials: `model` gives (latency in ms, score drop), or raises."""
    dialogue = propose(CATALOGUE, spaces, settings)
    asked: list[Recipe] = []
    recipe = next(dialogue)
    while True:
        assert recipe not in asked, "the same recipe was proposed twice"
        asked.append(recipe)
        try:
            recipe = dialogue.send(_trial(len(asked), recipe, model))
        except StopIteration:
            return asked


def test_what_a_cap_asks_for_is_of_use() -> None:
    capped = replace(SETTINGS, limit=Limit(max_drop=0.01, size_bytes=1))
    assert (SETTINGS.aims, capped.aims) == ({"speed"}, {"speed", "size"})
    packs = type("Packs", (Round,), {"aims": frozenset({"size"})})
    tried = [
        any(type(step) is packs for recipe in run(lambda _: (1.0, 0.0), settings, {packs: {}}) for step in recipe.steps)
        for settings in (SETTINGS, capped)
    ]
    assert tried == [False, True]


def _trial(number: int, recipe: Recipe, model: Model) -> Trial:
    told = {"number": number, "recipe": recipe.to_json(), "words": str(recipe)}
    try:
        ms, drop = model(recipe)
    except RuntimeError as why:
        return Trial(**told, state="failed", reason=str(why))  # type: ignore[arg-type]
    latency = tuple(Latency(batch=b, p50_ms=ms, p95_ms=ms, calls=1, launches=1, first_call_ms=ms) for b in (1, 32))
    measured = Measurement(
        score=1 - drop, score_drop=drop, flips=None, max_difference=0, latency=latency, size_bytes=1, peak_memory_bytes=1
    )
    return Trial(**told, state="finished", measurement=measured)  # type: ignore[arg-type]


def usual(recipe: Recipe) -> tuple[float, float]:
    """Integers help the quicker engine most; shrinking halves the time and costs 3 points, mending gives them back."""
    ms = {"Slow": 10.0, "Quick": 4.0, "Quicker": 5.0}[type(recipe.engine).__name__]
    kinds = [type(step) for step in recipe.steps]
    if Round in kinds:
        ms *= 0.8 if type(recipe.engine) is Quick else 0.4
    drop = 0.001 if Round in kinds else 0.0
    if Shrink in kinds:
        ms, drop = ms / 2, drop + (0.001 if Mend in kinds else 0.03)
    return ms, drop


def test_the_network_as_given_comes_first_and_every_engine_is_raced() -> None:
    asked = run(usual)
    assert asked[0] == Recipe((), Slow())
    assert asked[1:3] == [Recipe((), Quick()), Recipe((), Quicker())]


def test_the_race_is_run_though_the_time_is_over() -> None:
    dialogue = propose(CATALOGUE, SPACES, replace(SETTINGS, time_limit_s=54.0))
    asked = [next(dialogue)]
    with pytest.raises(StopIteration):
        while True:
            asked.append(dialogue.send(replace(_trial(len(asked), asked[-1], usual), seconds=100.0)))
    assert asked == [Recipe((), engine) for engine in (Slow(), Quick(), Quicker())]


def test_integers_are_tried_before_a_structure_though_the_race_used_up_what_may_come_first() -> None:
    settings = replace(SETTINGS, time_limit_s=100.0, finals_s=0.0)  # of 100 s the race takes 45, which is above FIRST
    dialogue = propose(CATALOGUE, SPACES, settings)
    asked = [next(dialogue)]
    for _ in range(4):
        asked.append(dialogue.send(replace(_trial(len(asked), asked[-1], usual), seconds=15.0)))
    assert asked[3] == Recipe((Round(),), Quick())
    assert [type(step) for step in asked[4].steps] == [Shrink]


def test_it_finds_the_combination_and_mends_it() -> None:
    asked = run(usual)
    within = [r for r in asked if usual(r)[1] <= 0.01]
    best = min(within, key=lambda r: usual(r)[0])
    assert [type(s) for s in best.steps] == [Shrink, Mend, Round]
    assert type(best.engine) is Quicker
    assert len(asked) <= 40


def test_what_loses_beyond_hope_is_mended_on_the_spot_and_built_upon() -> None:
    """As structured pruning does: half the time, and no use before it is trained."""

    def model(recipe: Recipe) -> tuple[float, float]:
        ms, drop = usual(recipe)
        alone = any(isinstance(s, Shrink) for s in recipe.steps) and not any(isinstance(s, Mend) for s in recipe.steps)
        return ms, 0.7 if alone else drop

    asked = run(model)
    best = min((r for r in asked if model(r)[1] <= 0.01), key=lambda r: model(r)[0])
    assert [type(s) for s in best.steps] == [Shrink, Mend, Round]
    assert sum(r.steps == (Shrink(),) for r in asked) == 1  # hopeless in one engine is hopeless in all
    assert len(asked) <= 40


def test_a_step_takes_the_place_of_another_that_it_cannot_follow() -> None:
    """Two number formats exclude each other; the better one wins although the other was there first."""

    def model(recipe: Recipe) -> tuple[float, float]:
        kinds = [type(step) for step in recipe.steps]
        if Cast in kinds and Round in kinds:
            raise RuntimeError("in integers already")
        ms, drop = usual(recipe)
        return ms * (0.9 if Cast in kinds else 1.0), drop

    asked = run(model, spaces={kind: kind.space(None) for kind in (Cast, Round)})  # type: ignore[arg-type]
    assert Recipe((Cast(),), Quicker()) in asked
    assert Recipe((Round(),), Quicker()) in asked


def test_what_depends_on_the_engine_is_tried_in_each() -> None:
    """Integers that are hopeless in one engine may be fine in the next."""

    def model(recipe: Recipe) -> tuple[float, float]:
        ms, drop = usual(recipe)
        rounded = any(isinstance(s, Round) for s in recipe.steps)
        return ms, 0.7 if rounded and type(recipe.engine) is Quick else drop

    asked = run(model, spaces={Round: Round.space(None)})  # type: ignore[arg-type]
    best = min((r for r in asked if model(r)[1] <= 0.01), key=lambda r: model(r)[0])
    assert type(best.engine) is Quicker
    assert Round() in best.steps


def test_where_mending_does_not_help_a_milder_setting_is_tried() -> None:
    def model(recipe: Recipe) -> tuple[float, float]:
        amount = max([0.0, *(s.amount for s in recipe.steps if isinstance(s, Shrink))])
        return 10.0 - 5 * bool(amount), {0.0: 0.0, 0.5: 0.7, 0.75: 0.0}[amount]

    asked = run(model)
    best = min((r for r in asked if model(r)[1] <= 0.01), key=lambda r: model(r)[0])
    assert Shrink(amount=0.75) in best.steps


def test_nothing_is_mended_that_lost_nothing() -> None:
    asked = run(lambda recipe: (usual(recipe)[0], 0.0))
    assert not any(isinstance(step, Mend) for recipe in asked for step in recipe.steps)


def rounding_loses(most: float) -> Model:
    """Integers are twice as fast and lose `most`; a third in floats, or a training for them, brings it back."""

    def model(recipe: Recipe) -> tuple[float, float]:
        ms = {"Slow": 10.0, "Quick": 4.0, "Quicker": 5.0}[type(recipe.engine).__name__]
        rounded = next((s for s in recipe.steps if isinstance(s, Round)), None)
        if rounded is None:
            return ms, 0.0
        floats = getattr(rounded, "floats", 0.0)
        ready = any(isinstance(s, Ready) for s in recipe.steps)
        return ms * (0.5 + floats), 0.001 if floats > 0.2 or ready else most

    return model


def test_a_gentler_step_is_tried_where_the_strong_one_loses_too_much_and_only_there() -> None:
    spaces = {kind: kind.space(None) for kind in (Round, Gentle)}  # type: ignore[arg-type]
    asked = run(rounding_loses(0.05), spaces=spaces)
    assert Recipe((Gentle(floats=0.3),), Quick()) in asked
    assert not any(isinstance(s, Gentle) for r in run(rounding_loses(0.001), spaces=spaces) for s in r.steps)


def test_what_rounding_lost_is_won_back_by_a_training_that_knows_of_it_and_not_by_one_that_does_not() -> None:
    spaces = {kind: kind.space(None) for kind in (Round, Mend, Ready)}  # type: ignore[arg-type]
    asked = run(rounding_loses(0.05), spaces=spaces)
    assert Recipe((Ready(), Round()), Quick()) in asked
    assert not any(type(s) is Mend for r in asked for s in r.steps)
    assert not any(isinstance(s, Ready) for r in run(rounding_loses(0.5), spaces=spaces) for s in r.steps)  # beyond all hope


def test_nothing_is_extended_where_nothing_helps() -> None:
    asked = run(lambda recipe: (1.0, 0.0))
    assert all(len(recipe.steps) <= 1 for recipe in asked)


def test_a_failing_engine_is_left_behind_and_the_search_goes_on() -> None:
    def broken(recipe: Recipe) -> tuple[float, float]:
        if type(recipe.engine) is Quicker:
            raise RuntimeError("no such backend")
        return usual(recipe)

    asked = run(broken)
    assert sum(type(r.engine) is Quicker for r in asked) == 1
    assert any(r.steps for r in asked)


def test_an_engine_far_behind_meets_no_step() -> None:
    asked = run(lambda recipe: (100.0, 0.0) if type(recipe.engine) is Quicker else usual(recipe))
    assert not any(r.steps for r in asked if type(r.engine) is Quicker)


def test_the_same_trials_give_the_same_proposals() -> None:
    assert run(usual) == run(usual)


def test_steps_that_cannot_treat_the_network_are_not_proposed() -> None:
    asked = run(usual, spaces={Round: Round.space(None)})  # type: ignore[arg-type]
    assert {type(step) for r in asked for step in r.steps} == {Round}


def test_insert_keeps_the_order_of_stages() -> None:
    assert insert(Recipe((Round(),), Quick()), Shrink()) == Recipe((Shrink(), Round()), Quick())
    assert insert(Recipe((Shrink(),), Slow()), Round()) is None


def test_settings_are_checked() -> None:
    with pytest.raises(UsageError, match="at least 1, got 0"):
        Settings(limit=Limit(), batch=0)
    with pytest.raises(UsageError, match="must hold the batch size 8"):
        Settings(limit=Limit(), batch=8)
    with pytest.raises(UsageError, match="trials must be at least 1"):
        Settings(limit=Limit(), trials=0)


def test_a_relative_limit_settles_on_the_original_score() -> None:
    settings = Settings(limit=Limit(max_drop=0.02), relative_drop=0.02).settled(0.5)
    assert settings.limit.max_drop == pytest.approx(0.01)
    assert settings.relative_drop is None
