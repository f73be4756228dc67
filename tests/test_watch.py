"""The time left, on made-up searches whose every second is known; and how it is told."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from hasten.core.recipe import Recipe
from hasten.live import Live
from hasten.measure import timing
from hasten.search import watch
from hasten.search.crew import to_come
from hasten.search.propose import propose
from hasten.search.watch import Event, Watch
from methods import Mend, Quicker, Round, Shrink
from test_propose import CATALOGUE, SETTINGS, SPACES, _trial, usual

Seconds = Callable[[Recipe], float]


def even(recipe: Recipe) -> float:
    return 2.0


def measured(recipe: Recipe) -> float:
    """As on a demonstration: the first engine imports torch, another one compiles, number formats take a little more."""
    if not recipe.steps:
        return 14.0 if type(recipe.engine) is Quicker else 1.5
    return 1.5 + 0.5 * len(recipe.steps)


def trained(recipe: Recipe) -> float:
    return 2.0 + 20.0 * (Mend in map(type, recipe.steps))


def costly(recipe: Recipe) -> tuple[float, float]:
    ms, drop = usual(recipe)
    return ms, 3 * drop


def useless(recipe: Recipe) -> tuple[float, float]:
    return 5.0, 0.0


def refused(recipe: Recipe) -> tuple[float, float]:
    if {Round, Shrink} & set(map(type, recipe.steps)):
        raise RuntimeError("cannot treat this network")
    return usual(recipe)


def told(model: Callable[[Recipe], tuple[float, float]], seconds: Seconds, finals: dict[str, float]) -> list[tuple[float, float]]:
    """(elapsed, time left that was told) at each event of a search with these durations."""
    now, heard = 0.0, []

    def listen(event: Event) -> None:
        if event.left_s is not None:
            heard.append((event.elapsed_s, event.left_s))

    def begin():  # type: ignore[no-untyped-def]
        return propose(CATALOGUE, SPACES, SETTINGS)

    watching = Watch(watcher=listen, clock=lambda: now, expected_trials=2 * 2 * (1 + len(SPACES)) + 4)
    watching.stage("search", "")
    dialogue, said = begin(), []
    recipe: Recipe | None = next(dialogue)
    while recipe:
        now += seconds(recipe)
        said.append(replace(_trial(len(said), recipe, model), seconds=seconds(recipe)))
        watching.coming = to_come(begin, said)
        watching.ended(said[-1], seconds(recipe))
        try:
            recipe = dialogue.send(said[-1])
        except StopIteration:
            recipe = None
    for stage, lasts in finals.items():
        watching.stage(stage, "")
        for part in range(10):
            now += lasts / 10
            watching.progress((part + 1) / 10, "")
    heard.append((now, 0.0))
    return heard


def test_the_forecast_knows_where_the_protocol_ends() -> None:
    assert watch.FINALS["timing"][1] == timing.FULL.longest_s


@pytest.mark.parametrize(("ends_s", "left"), [(100.0, 70.0), (20.0, 0.0)])
def test_no_more_is_left_than_the_time_limit(ends_s: float, left: float) -> None:
    heard: list[Event] = []
    now = 0.0
    watching = Watch(watcher=heard.append, clock=lambda: now, expected_trials=1000, ends_s=ends_s)
    watching.stage("search", "")
    now = 30.0
    watching.ended(_trial(0, Recipe((), Quicker()), usual), 30.0)
    assert heard[-1].left_s == left


FINALS = {"heat": 25.0, "ablation": 25.0, "proof": 5.0, "timing": 80.0}


@pytest.mark.parametrize("seconds", [even, measured, trained])
@pytest.mark.parametrize("model", [usual, costly, useless, refused])
def test_after_a_fifth_the_time_left_is_known_to_a_third(model: Callable[[Recipe], tuple[float, float]], seconds: Seconds) -> None:
    heard = told(model, seconds, FINALS)
    total = heard[-1][0]
    errors = [abs(left - (total - now)) / total for now, left in heard if now >= total / 5]
    assert max(errors) <= 0.3
    assert heard[-2][1] == 0


def test_without_a_search_the_pace_of_the_stage_tells() -> None:
    now, heard = 0.0, []
    watching = Watch(watcher=heard.append, clock=lambda: now)
    watching.stage("race", "timing")
    now = 10.0
    watching.progress(0.25, "round 1")
    assert [event.left_s for event in heard] == [None, 30.0]


EVENTS = [
    Event(stage="search", words="Quick", elapsed_s=1.26, left_s=61.24, best="2.0× Quick", trial=_trial(3, Recipe((), Quicker()), usual)),
    Event(stage="search", words="packing", elapsed_s=2.0, left_s=None),
    Event(stage="proof", words="opening the proof data", elapsed_s=65.0, left_s=20.0),
]


def test_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with Live(stream) as live:
        for event in EVENTS:
            live(event)
    assert stream.getvalue().splitlines() == [
        "search 0:01, about 1:01 left · Quick · best 2.0× Quick",
        "proof 1:05, about 0:20 left · opening the proof data",
    ]


def test_events_for_programs() -> None:
    stream = io.StringIO()
    with Live(stream, as_json=True) as live:
        for event in EVENTS:
            live(event)
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["stage"], first["elapsed_s"], first["left_s"], first["best"]) == ("search", 1.3, 61.2, "2.0× Quick")
    assert first["trial"]["number"] == 3
    assert second == {
        "stage": "proof",
        "words": "opening the proof data",
        "elapsed_s": 65.0,
        "left_s": 20.0,
        "best": None,
        "trial": None,
    }
