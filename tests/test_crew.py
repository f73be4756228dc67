"""Building ahead: the guesses, the helpers that follow them, and that a search comes out the same however many help."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import madeup
from hasten.core.errors import BackendMissing, ChildFailed, HastenError, Unsupported, UsageError, WorkerLost
from hasten.core.recipe import Recipe
from hasten.search.crew import Crew, foresee
from hasten.search.outpost import Hands, Outpost
from hasten.search.propose import propose
from hasten.search.workshop import Halting
from methods import Mend, Quick, Quicker, Round, Shrink
from test_propose import CATALOGUE, SETTINGS, SPACES, _trial, usual

PRUNED, ROUNDED, MENDED = Recipe((Shrink(),), Quick()), Recipe((Round(),), Quick()), Recipe((Mend(),), Quick())


class Fake:
    """A helper whose work is a function; it ends early when it is stopped."""

    def __init__(self, work: Callable[[Recipe], None] = lambda recipe: None) -> None:
        self.work = work
        self.built: list[Recipe] = []
        self.happened: list[str] = []
        self.stopped = threading.Event()

    def build(self, recipe: Recipe, progress: Any = None) -> None:
        self.built.append(recipe)
        progress(0.5, "half way")
        self.work(recipe)
        if self.stopped.is_set():
            self.stopped.clear()
            raise ChildFailed("the process died of SIGKILL")

    def pause(self) -> None:
        self.happened.append("pause")

    def resume(self) -> None:
        self.happened.append("resume")

    def stop(self) -> None:
        self.stopped.set()

    def close(self) -> None:
        self.happened.append("close")


@pytest.fixture
def crew_of() -> Any:
    crews: list[Crew] = []

    def hired(*helpers: Fake) -> Crew:
        crews.append(Crew(helpers))
        return crews[-1]

    yield hired
    for crew in crews:
        crew.close()


def begin() -> Any:
    return propose(CATALOGUE, SPACES, SETTINGS)


def test_the_first_guess_is_what_the_dialogue_asks_for_and_most_others_come_true() -> None:
    dialogue, said, expected, right = begin(), [], None, 0
    recipe = next(dialogue)
    while True:
        guesses = foresee(begin, said, 3)
        assert guesses[0] == recipe
        assert len(set(guesses)) == len(guesses) <= 3
        right += expected is not None and recipe in expected
        expected = guesses[1:]
        said.append(_trial(len(said), recipe, usual))
        try:
            recipe = dialogue.send(said[-1])
        except StopIteration:
            break
    assert foresee(begin, said, 3) == []
    assert right >= 0.6 * (len(said) - 1)


def test_a_helper_builds_what_is_expected_and_the_search_waits_for_it(crew_of: Any) -> None:
    heard: list[tuple[float, str]] = []
    go = threading.Event()
    helper = Fake(lambda recipe: go.wait(10) and None)  # type: ignore[func-returns-value]
    crew = crew_of(helper)
    crew.expect([Recipe((), Quick()), PRUNED, ROUNDED])
    threading.Timer(0.5, go.set).start()
    crew.wait(PRUNED, lambda share, words: heard.append((share, words)))
    crew.wait(ROUNDED)
    crew.wait(PRUNED)
    crew.wait(Recipe((), Quick()))
    assert helper.built == [PRUNED, ROUNDED]
    assert heard
    assert set(heard) == {(0.5, "half way")}


def test_recipes_that_differ_only_behind_what_is_built_are_built_once(crew_of: Any) -> None:
    helper = Fake()
    crew = crew_of(helper)
    for engine in (Quick(), Quick(threads=1), Quicker()):
        crew.wait(Recipe((Shrink(),), engine))
        crew.wait(Recipe((Round(),), engine))  # depends on the engine's profile
    assert helper.built == [PRUNED, ROUNDED, Recipe((Round(),), Quicker())]


@pytest.mark.parametrize("error", [Unsupported("no such layer"), ChildFailed("died"), KeyError("w")])
def test_what_goes_wrong_there_goes_wrong_here_and_only_once(crew_of: Any, error: Exception) -> None:
    def work(recipe: Recipe) -> None:
        if recipe == PRUNED:
            raise error

    helper = Fake(work)
    crew = crew_of(helper)
    for _ in range(2):
        with pytest.raises(type(error) if isinstance(error, HastenError) else ChildFailed, match=str(error).strip("'")):
            crew.wait(PRUNED)
    crew.wait(ROUNDED)
    assert helper.built == [PRUNED, ROUNDED]


def test_a_helper_with_a_wrong_guess_is_taken_off_it(crew_of: Any) -> None:
    helper = Fake()
    helper.work = lambda recipe: recipe == PRUNED and helper.stopped.wait(10) and None  # type: ignore
    crew = crew_of(helper)
    crew.expect([PRUNED])
    while not helper.built:
        time.sleep(0.01)
    crew.expect([ROUNDED])
    start = time.monotonic()
    crew.wait(ROUNDED)
    assert time.monotonic() - start < 8
    assert helper.built == [PRUNED, ROUNDED]
    helper.work = lambda recipe: None
    crew.wait(PRUNED)  # and is built after all when it is asked for
    assert helper.built[-1] == PRUNED


def test_a_lost_worker_costs_its_work_alone(crew_of: Any) -> None:
    def lost(recipe: Recipe) -> None:
        raise WorkerLost("the node went away")

    helper = Fake()
    helper.work = lambda recipe: lost(recipe) if len(helper.built) == 1 else None
    crew = crew_of(helper)
    crew.wait(PRUNED)
    assert helper.built == [PRUNED, PRUNED]
    helper.work = lost
    with pytest.raises(WorkerLost, match="went away"):
        crew.wait(ROUNDED)
    assert helper.built[2:] == [ROUNDED, ROUNDED]


def test_without_a_helper_left_the_search_goes_on_alone(crew_of: Any) -> None:
    def gone(recipe: Recipe) -> None:
        raise BackendMissing("no node has a processor free")

    helper = Fake(gone)
    crew = crew_of(helper)
    crew.wait(PRUNED)
    crew.wait(ROUNDED)
    assert helper.built == [PRUNED]


def test_everybody_rests_while_something_is_timed(crew_of: Any) -> None:
    helpers = Fake(), Fake()
    crew = crew_of(*helpers)
    with pytest.raises(RuntimeError), crew.rest():
        assert [h.happened for h in helpers] == [["pause"]] * 2
        raise RuntimeError
    assert [h.happened for h in helpers] == [["pause", "resume"]] * 2


def test_workers_are_at_least_one() -> None:
    with pytest.raises(UsageError, match="workers must be at least 1, got 0"):
        Hands(workers=0)
    assert Hands(workers=1).hire(Path(), loss="classes", seed=0) is None


@pytest.mark.parametrize("workers", [2, 3])
def test_a_search_comes_out_the_same_however_many_help(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for count in (1, workers):
        run = tmp_path / str(count)
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / f"state{count}"))
        madeup.prepare(run)
        madeup.search(run, hands=Hands(workers=count))
        found[count] = madeup.remembered(run)
        built = {name for name in found[count]["folders"] if name.startswith("cache/")}
        found[count]["folders"] = {name: told for name, told in found[count]["folders"].items() if name not in built}
    assert found[1] == found[workers]


class Elsewhere(madeup._Inside):
    """A child of another machine: it sees a folder of its own alone, and the machine goes away at its third building."""

    def __init__(self, place: Path) -> None:
        self.place, self.calls = str(place), 0

    def call(self, function: str, /, *arrays: Any, **values: Any) -> Any:
        self.calls += function.endswith("_build")
        if self.calls == 3:
            raise WorkerLost("the node went away")
        assert "run" not in values or values["run"] == self.place
        return super().call(function, *arrays, **values)


class Away(Hands):
    """Two outposts; every start is a new machine."""

    def hire(self, run: Path, *, loss: Any, seed: int) -> Crew:
        self_made = itertools.count()

        def start() -> Any:
            return Elsewhere(run.parent / f"machine{next(self_made)}")

        return Crew([Outpost(run, start, loss=loss, seed=seed) for _ in range(2)])


def test_a_search_comes_out_the_same_where_machines_help_and_go_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name, hands in (("here", Hands()), ("away", Away())):
        run = tmp_path / name / "run"
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / name))
        madeup.prepare(run)
        madeup.search(run, hands=hands)
        found[name] = madeup.remembered(run)
        entries = {k: v for k, v in found[name]["folders"].items() if k.startswith("cache/")}
        found[name]["folders"] = {k: v for k, v in found[name]["folders"].items() if k not in entries}
        found[name]["cache"] = {k: v for k, v in entries.items() if name == "here" or k in found["here"]["cache"]}
    assert found["here"] == found["away"]  # the weights as well; away, wrong guesses lie in the cache besides
    machines = sorted((tmp_path / "away").glob("machine*"))
    assert len(machines) >= 3
    assert not (machines[0] / "views" / "select").exists()


def test_waiting_has_a_deadline(crew_of: Any) -> None:
    helper = Fake()
    helper.work = lambda recipe: helper.stopped.wait(10) and None  # type: ignore[func-returns-value]
    crew = crew_of(helper)
    with pytest.raises(ChildFailed, match="no answer within 0 s, stopped"):
        crew.wait(PRUNED, deadline_s=0.3)
    helper.work = lambda recipe: None
    crew.wait(ROUNDED)
    assert helper.built == [PRUNED, ROUNDED]


def test_whoever_hears_the_progress_may_end_the_work(crew_of: Any) -> None:
    helper = Fake()
    helper.work = lambda recipe: helper.stopped.wait(10) and None  # type: ignore[func-returns-value]
    crew = crew_of(helper)

    def heard(share: float, words: str) -> None:
        raise ChildFailed(f"{words}: too slow")

    with pytest.raises(ChildFailed, match="half way: too slow"):
        crew.wait(PRUNED, heard)
    helper.work = lambda recipe: None
    crew.wait(ROUNDED)
    assert helper.built == [PRUNED, ROUNDED]


def test_a_process_that_is_being_started_is_stopped_as_soon_as_it_is_there() -> None:
    stopped = threading.Event()
    helper = Halting()
    helper._starting.acquire()  # as `_call` holds it while the child comes up
    stopping = threading.Thread(target=helper.stop)
    stopping.start()
    helper._child = SimpleNamespace(stop=stopped.set)
    helper._starting.release()
    stopping.join(10)
    assert stopped.is_set()
