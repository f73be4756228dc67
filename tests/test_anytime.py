"""What lies on disk while a search runs, what Ctrl-C gives, what can be picked afterwards, and the time that the end may take."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import madeup
import sample_reports
from hasten import cli, verbs
from hasten.core import folder
from hasten.core.errors import ChildFailed, Interrupted, UsageError
from hasten.core.report import Limit, Report
from hasten.core.store import Store
from hasten.measure import timing
from hasten.search import anytime, export, finals
from hasten.search import run as search
from hasten.search.catalogue import Settings
from hasten.search.clock import Clock
from hasten.search.watch import Event
from sample_reports import trial


class Facts(dict[str, Any]):
    """A store of facts alone."""

    fact = dict.get
    remember = dict.__setitem__

    def trials(self) -> list[Any]:
        return TRIALS


def lossless(number: int, engine: str, ms: float) -> Any:
    made = trial(number, engine, p50=ms)
    return replace(made, recipe={"steps": [], "engine": {"name": f"hasten.engines.{engine}"}})


def int8(number: int, ms: float, drop: float) -> Any:
    made = trial(number, "OnnxRuntime", p50=ms, drop=drop)
    return replace(made, recipe={"steps": [{"name": "hasten.compress.QuantizeStatic"}], "engine": {"name": "hasten.engines.OnnxRuntime"}})


TRIALS = [
    lossless(0, "Eager", 9.0),
    int8(1, 5.0, 0.0),
    lossless(2, "OnnxRuntime", 4.0),
    int8(3, 3.0, 0.5),
    int8(4, 2.0, 0.001),
    int8(5, 1.99, 0.001),
    lossless(6, "OpenVINO", 6.0),
    int8(7, 1.0, 0.002),
]  # fmt: skip


def test_what_is_on_disk_is_there_from_the_first_trial_and_only_gets_better(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put: list[tuple[str, int, bool]] = []
    shipped: list[bool] = []

    def package(*a: Any, name: str, proved: bool, ship: bool) -> None:
        put.append((name, a[2].number, proved))
        shipped.append(ship)

    monkeypatch.setattr(export, "package", package)
    bench, facts = SimpleNamespace(settings=Settings(limit=Limit(), batches=(1,))), Facts()
    job: Any = SimpleNamespace(store=facts, folder=tmp_path, watch=SimpleNamespace(best=None))
    best = anytime.Best(job, bench)  # type: ignore[arg-type]
    (tmp_path / "best-so-far").mkdir()
    for one in TRIALS:
        best.see(one)
        if one.number == 2:  # what needs no proof is faster than what does
            assert job.watch.best == "2.2× OnnxRuntime"
            assert not (tmp_path / "best-so-far").exists()
    safe, lossy = ("artifact", True), ("best-so-far", False)
    assert [((name, proved), n) for name, n, proved in put] == [(safe, 0), (lossy, 1), (safe, 2), (lossy, 4), (lossy, 7)]
    assert job.watch.best == "9.0× OnnxRuntime (not proved yet)"
    assert all(shipped)
    hurried = SimpleNamespace(settings=replace(bench.settings, time_limit_s=60.0))
    anytime.Best(SimpleNamespace(store=Facts(), folder=tmp_path, watch=job.watch), hurried).see(TRIALS[0])  # type: ignore[arg-type]
    assert not shipped[-1]  # exporting the original may take a quarter of a minute
    put.clear()
    again = anytime.Best(job, bench)  # type: ignore[arg-type]  # after a kill the same trials pass by again
    for one in TRIALS:
        again.see(one)
    assert not put


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    run = tmp_path_factory.mktemp("anytime") / "run"
    madeup.prepare(run, select=2_000, prove=3_000)
    return run, madeup.search(run)


def again(run: Path, pick: str) -> Report:
    store = Store(run / verbs.STORE)
    try:
        with madeup.stand_ins(store):
            return verbs._told(run, madeup.job(run, store, madeup.SETTINGS), pick)
    finally:
        store.close()


def test_picking_costs_nothing_and_changes_the_artifact(finished: tuple[Path, Report]) -> None:
    run, report = finished
    assert len(report.offers) >= 3
    assert report.chosen == report.offers[0]
    other = report.offers[1]
    picked = again(run, str(other.trial))
    assert picked.chosen == other
    assert picked.trials == report.trials
    assert len(picked.openings) == 1
    assert json.loads((run / "artifact" / "recipe.json").read_text())["steps"] == other.recipe["steps"]
    assert folder.intact(run / "artifact")
    assert again(run, "fastest").chosen == report.chosen
    with pytest.raises(UsageError, match="pick must be fastest, smallest, balanced or one of the certified trials"):
        again(run, "999")


def test_a_pick_is_checked_before_anything_is_searched() -> None:
    with pytest.raises(UsageError, match="pick must be fastest, smallest, balanced or the number of a trial, got 'fastst'"):
        verbs.Options(pick="fastst")
    assert [verbs.Options(pick=word).pick for word in ("smallest", "12")] == ["smallest", "12"]


def test_nothing_unproved_is_left_behind(finished: tuple[Path, Report]) -> None:
    assert not (finished[0] / "best-so-far").exists()
    assert (finished[0] / "artifact" / "README.md").read_text().count("NOT PROVED") == 0


def test_ctrl_c_gives_the_report_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verbs, "_job", interrupted)
    with pytest.raises(Interrupted) as why:
        verbs.optimize(torch.nn.Linear(2, 2), np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32), run=tmp_path / "run")
    assert why.value.report.state == "interrupted"  # type: ignore[attr-defined]
    assert "the same command goes on" in why.value.report.sentence  # type: ignore[attr-defined]


def test_the_command_line_prints_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "best-so-far").mkdir()

    def interrupted(*_: object, **__: object) -> None:
        raise Interrupted(replace(sample_reports.ALL["kept"], state="interrupted", artifact=str(tmp_path / "artifact")))

    monkeypatch.setattr(verbs, "optimize", interrupted)
    (tmp_path / "model.pt2").touch()
    with pytest.raises(SystemExit) as code:
        cli.main(["optimize", str(tmp_path / "model.pt2"), "--data", str(tmp_path / "model.pt2")])
    told = capsys.readouterr()
    assert code.value.code == 130
    assert "the same command goes on from here" in told.err
    assert f"not proved yet, is in {tmp_path / 'best-so-far'}" in told.err.replace("\n", "")
    assert "OnnxRuntime" in told.out


def test_the_clock_counts_what_killed_processes_took() -> None:
    assert Clock(limit_s=100, elapsed_s=lambda: 30, before_s=50).left_s() == 20
    assert Clock(limit_s=None, elapsed_s=lambda: 30).left_s() == float("inf")


@pytest.mark.parametrize(("left_s", "hurry_s"), [(float("inf"), float("inf")), (15.0, 15.0), (-3.0, 0.0)])
def test_the_final_timing_is_told_what_is_left(monkeypatch: pytest.MonkeyPatch, left_s: float, hurry_s: float) -> None:
    asked: list[timing.Protocol] = []

    def race(contestants: Any, *_: Any, protocol: timing.Protocol, **__: Any) -> timing.Timing:
        asked.append(protocol)
        times = np.ones((2, len(contestants), 1))
        calls = {(i, 0): np.ones(2) for i in range(len(contestants))}
        return timing.Timing(
            batches=(1,), medians_ms=times, calls_ms=calls, first_call_ms=times[0], peak_memory_bytes=(1,) * len(contestants)
        )

    monkeypatch.setattr(timing, "race", race)
    bench: Any = SimpleNamespace(contestant=lambda t: t, select=SimpleNamespace(inputs=()), settings=Settings(limit=Limit(), batches=(1,)))
    found = finals.final_timing(bench, TRIALS[0], TRIALS[2], [TRIALS[4], TRIALS[2]], left_s)
    assert asked == [replace(timing.FULL, hurry_s=hurry_s)]
    assert set(found.latency) == {0, 2, 4}


def test_a_killed_process_has_used_its_time(tmp_path: Path) -> None:
    run, kept = tmp_path / "run", []

    def look(event: Event) -> None:
        if event.trial or event.stage in ("heat", "proof", "timing"):
            store = Store(run / verbs.STORE, writable=False)
            kept.append(store.fact("seconds"))
            store.close()

    madeup.prepare(run)
    madeup.search(run, watcher=look)
    assert len(kept) > 12
    assert kept[0] > 0
    assert kept == sorted(kept)


def without(finished: Path, run: Path, fact: str) -> Path:
    """A copy of a finished run, as if it had been killed before it wrote this down."""
    shutil.copytree(finished, run)
    store = Store(run / verbs.STORE)
    with store._db:
        store._db.execute("DELETE FROM facts WHERE name = ?", (fact,))
    store.close()
    return run


def test_what_time_decided_stays_decided(finished: tuple[Path, Report], tmp_path: Path) -> None:
    """A run that was killed before its last stage has less time when it goes on: the same candidates come out."""
    run = without(finished[0], tmp_path / "run", "final")
    again = madeup.search(run, replace(madeup.SETTINGS, time_limit_s=0.001))
    assert [o.trial for o in again.offers] == [o.trial for o in finished[1].offers]


@contextmanager
def broken(monkeypatch: pytest.MonkeyPatch, fails: Callable[[set[int], int], bool]) -> Iterator[None]:
    """Contestants of these numbers, asked for so many examples (0: timed), die where `fails` says so."""
    real = madeup.stand_ins

    @contextmanager
    def inside(store: Store) -> Iterator[None]:
        with real(store), monkeypatch.context() as patch:
            race, outputs = timing.race, finals._outputs

            def raced(contestants: Any, *words: Any, **more: Any) -> timing.Timing:
                if fails({int(c.folder.name) for c in contestants}, 0):
                    raise ChildFailed("gone")
                return race(contestants, *words, **more)

            def answered(bench: Any, trial: Any, view: Any) -> Any:
                if fails({trial.number}, len(view)):
                    raise ChildFailed("gone")
                return outputs(bench, trial, view)

            patch.setattr(timing, "race", raced)
            patch.setattr(finals, "_outputs", answered)
            yield

    monkeypatch.setattr(madeup, "stand_ins", inside)
    yield


@pytest.mark.parametrize("when", ["always", "on prove", "after the proof", "all at once", "the plain engine"])
def test_a_candidate_that_dies_at_the_end_costs_itself(
    finished: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    first, plain = finished[1].chosen, finished[1].baselines["best plain engine"].trial
    assert first
    dies: dict[str, Callable[[set[int], int], bool]] = {
        "always": lambda who, rows: first.trial in who,
        "on prove": lambda who, rows: first.trial in who and rows > 1,
        "after the proof": lambda who, rows: first.trial in who and rows <= 1,
        "all at once": lambda who, rows: len(who) > 3,
        "the plain engine": lambda who, rows: plain in who,
    }
    run = tmp_path / "run"
    madeup.prepare(run, select=2_000, prove=3_000)
    with broken(monkeypatch, dies[when]):
        found = madeup.search(run)
    assert found.state == "finished"
    assert found.chosen
    offered = [o.trial for o in found.offers]
    assert len(offered) >= 2
    assert (first.trial in offered) == (when in ("all at once", "the plain engine"))
    assert (plain in offered) == (when != "the plain engine")
    told = [note for note in found.notes if "failed on *prove*" in note and note.endswith(": gone")]
    assert bool(told) == (when in ("always", "on prove", "the plain engine"))


def test_the_smallest_is_proved_behind_all_others(finished: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tested = {c.trial for c in finished[1].certificates}
    other = next(t.number for t in finished[1].trials if t.measurement and t.number not in tested)
    monkeypatch.setattr(finals, "smallest", lambda trials, rivals, settings: [t for t in trials if t.number == other][:1])
    run = tmp_path / "run"
    madeup.prepare(run, select=2_000, prove=3_000)
    found = madeup.search(run)
    assert [c.trial for c in found.certificates][-1] == other


def test_a_heat_that_would_take_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    raced: list[int] = []
    monkeypatch.setattr(timing, "race", lambda contestants, *_, **__: raced.append(len(contestants)) or 1 / 0)
    told: dict[str, Any] = {}
    bench: Any = SimpleNamespace(settings=Settings(limit=Limit(), batches=(1,)), contestant=lambda t: t, select=SimpleNamespace(inputs=()))
    bench.store = SimpleNamespace(once=lambda name, run: told.setdefault(name, run()))
    bench.left_s = lambda: 4 * 3 * sum(finals.round_s(t, (1,)) for t in TRIALS[:3]) - 0.1
    hot = finals.heat(bench, TRIALS[:3])
    assert {n: m.at(1).p50_ms for n, m in hot.items()} == {0: 9.0, 1: 5.0, 2: 4.0}
    bench.left_s = lambda: 4 * 3 * sum(finals.round_s(t, (1,)) for t in TRIALS[1:4]) + 0.1
    with pytest.raises(ZeroDivisionError):
        finals.heat(bench, TRIALS[1:4])
    assert raced == [3]


def test_what_a_kill_left_at_the_very_end_is_swept(finished: tuple[Path, Report], tmp_path: Path) -> None:
    """The run has its result already: it is only reported, and yet nothing half written stays."""
    run = without(finished[0], tmp_path / "run", "learnt")
    store = Store(run / verbs.STORE)
    guesses = search._kept_at(madeup.job(run, store, madeup.SETTINGS))
    store.close()
    left = [run / ".report.json.1.part", guesses.with_name(f".{guesses.name}.1.part")]
    for file in left:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("half")
    assert madeup.search(run).chosen == finished[1].chosen
    assert not any(file.exists() for file in left)
    assert guesses.exists()


def test_a_run_that_has_its_result_has_nothing_unproved_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def remember(store: Store, name: str, value: object) -> None:
        real(store, name, value)
        if name == "final":
            raise Killed

    real, run = Store.remember, tmp_path / "run"
    madeup.prepare(run, select=2_000, prove=3_000)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Store, "remember", remember)
        madeup.search(run)
    assert not (run / "best-so-far").exists()
    assert madeup.search(run).chosen
