"""What goes wrong in a trial costs that trial alone, and a run of a made-up search is a function of its seed and its timings."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

import madeup
from hasten import verbs
from hasten.core import folder
from hasten.core.errors import RunLocked, StorageError
from hasten.core.network import Network
from hasten.core.recipe import Context, Recipe, Stage
from hasten.core.report import Trial
from hasten.core.store import Store
from hasten.search import conclude, export, finals, prover, run
from hasten.search.bench import Bench
from hasten.search.catalogue import Settings
from hasten.search.workshop import Workshop
from methods import Mend, Quick


@dataclass(frozen=True, kw_only=True)
class Bad(madeup._Step):
    stage: ClassVar[Stage] = Stage.STRUCTURE
    how: str

    def apply(self, network: Network, context: Context) -> Network:
        if self.how == "raise":
            raise RuntimeError("tensors of sizes 3 and 4")
        if self.how == "crash":
            os.abort()
        if self.how == "hang":
            time.sleep(600)
        return network.with_body(bytearray(1 << 50))  # more than any machine has


@dataclass(frozen=True, kw_only=True)
class Odd(madeup.Given):
    """An engine whose outputs are no numbers, or of another shape."""

    outputs: str

    def pack(self, network: Network, folder: Path) -> None:
        made = {"nan": "np.full((len(x), 2), np.nan)", "shape": "np.zeros((len(x), 3))"}[self.outputs]
        (folder / "load.py").write_text(f"import numpy as np\n\ndef load(folder):\n    return lambda x: ({made},)\n")


@contextmanager
def opened(run: Path, score: Any = None) -> Iterator[Bench]:
    """A bench in a prepared folder, on whose first place the network as given has been tried."""
    store = Store(run / verbs.STORE)
    try:
        given = madeup.job(run, store, madeup.SETTINGS)
        with_score = given.score if score is None else score
        workshop = Workshop(run, loss="classes", seed=0, deadline_s=300)
        try:
            yield Bench(run, store, given.views.select, with_score, madeup.SETTINGS, workshop)
        finally:
            workshop.close()
    finally:
        store.close()


@pytest.mark.long(share=1)
def test_what_goes_wrong_costs_one_trial(tmp_path: Path) -> None:
    madeup.prepare(tmp_path, select=20, prove=20)
    good = [Recipe((), madeup.Given()), *(Recipe((madeup.Shape(amount=n),), madeup.Given()) for n in (1, 2))]
    with opened(tmp_path) as bench:
        assert bench.attempt(good[0]).state == "finished"
        reasons = {}
        for how in ("raise", "crash", "memory"):
            reasons[how] = bench.attempt(Recipe((Bad(how=how),), madeup.Given())).reason
        assert bench.attempt(good[1]).state == "finished"
        with bench.workshop.within(2):
            assert bench.workshop.deadline_s <= 2
            reasons["hang"] = bench.attempt(Recipe((Bad(how="hang"),), madeup.Given())).reason
        for outputs in ("nan", "shape"):
            reasons[outputs] = bench.attempt(Recipe((), Odd(outputs=outputs))).reason
        assert bench.attempt(good[2]).state == "finished"
    assert reasons == {
        "raise": "RuntimeError: tensors of sizes 3 and 4",
        "crash": reasons["crash"],
        "memory": "MemoryError: no message",
        "hang": "no answer within 2 s, stopped",
        "nan": "the outputs hold NaN or infinity where the original's are finite",
        "shape": "outputs must have the shapes [(20, 2)], got [(20, 3)]",
    }
    assert "died of SIGABRT" in reasons["crash"]


def test_a_score_that_is_no_number_costs_one_trial(tmp_path: Path) -> None:
    values = iter([0.9, float("inf"), float("nan"), 0.8])
    score = SimpleNamespace(name="s", target="labels", per_example=lambda *_: None, value=lambda *_: next(values))
    madeup.prepare(tmp_path, select=20, prove=20)
    with opened(tmp_path, score) as bench, madeup.stand_ins(bench.store):
        assert bench.attempt(Recipe((), madeup.Given())).state == "failed"  # the baseline's own score comes first: 0.9, then inf
        found = [bench.attempt(Recipe((madeup.Shape(amount=n),), madeup.Fast())) for n in (1, 2)]
    assert [t.reason for t in found] == ["the score must be a finite number, got nan", None]


def test_the_same_seed_and_timings_give_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same recipes in the same order, the same weights and packages, the same scores, the same result."""
    found = []
    for at, seed in enumerate((0, 0, 1)):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / f"state{at}"))
        madeup.prepare(tmp_path / str(at))
        madeup.search(tmp_path / str(at), replace(madeup.SETTINGS, seed=seed))
        found.append(madeup.remembered(tmp_path / str(at)))
    assert len(found[0]["trials"]) >= 12
    assert sum(name.startswith("packages/") for name in found[0]["folders"]) == len(found[0]["trials"])
    assert found[0] == found[1]
    assert found[0]["folders"] != found[2]["folders"]


def test_a_run_that_goes_on_after_its_ablation_has_the_contenders_that_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the ablation tried is no contender, also where the run was broken off behind it."""
    madeup.prepare(tmp_path / "run")
    given: list[list[int]] = []
    real = finals.contenders

    def contenders(trials: list[Trial], settings: Settings) -> list[Trial]:
        given.append([t.number for t in trials])
        return real(trials, settings)

    def full(*_: object, **__: object) -> None:
        raise StorageError("cannot write: the disk is full")

    monkeypatch.setattr(finals, "contenders", contenders)
    with monkeypatch.context() as broken, pytest.raises(StorageError):
        broken.setattr(prover, "freeze", full)
        madeup.search(tmp_path / "run", told=False)
    report = madeup.search(tmp_path / "run", told=False)
    assert len(report.trials) > len(given[0])
    assert given == [given[0]] * 2


def test_what_is_not_trained_gets_a_third_of_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is kept back for the end is a quarter of the limit and two and a half proofs, however long the first trial took to begin.

    The result is packed without hurry, though the time is over.
    """
    given: list[tuple[float, float, float]] = []
    packing: list[float] = []
    real, package = Bench.attempt, export.package

    def attempt(self: Bench, recipe: Recipe, progress: Any = None) -> Trial:
        given.append((self.workshop.deadline_s, self.settings.reserve_s, self.settings.search_s))
        return real(self, recipe, progress)

    def pack(run: Path, bench: Bench, *others: Any, **named: Any) -> None:
        packing.append(bench.workshop.deadline_s)
        package(run, bench, *others, **named)

    monkeypatch.setattr(Bench, "attempt", attempt)
    monkeypatch.setattr(export, "package", pack)
    madeup.prepare(tmp_path)
    madeup.search(tmp_path, replace(madeup.SETTINGS, time_limit_s=200.0), told=False)
    assert min(packing) > 1000
    first, *others = given[:10]
    assert first[0] > 1000
    for deadline_s, reserve_s, search_s in others:
        assert reserve_s == pytest.approx(50 + 2.5 * 600 * 0.01)  # 600 examples to prove with, at 10 ms each
        assert 20 < deadline_s <= search_s / 3


def test_what_ordinary_trials_took_is_allowed_near_the_end() -> None:
    untrained, trained = Recipe((), Quick()), Recipe((Mend(),), Quick())
    told: dict[str, Any] = {"words": "", "state": "finished", "measurement": object()}
    said = [Trial(number=at, recipe=r.to_json(), seconds=s, **told) for at, (r, s) in enumerate([(untrained, 4.0), (trained, 60.0)])]
    assert run._allowed(untrained, said, 90.0) == 30.0
    assert run._allowed(untrained, said, 12.0) == 8.0
    assert run._allowed(untrained, said, 6.0) == 6.0
    assert run._allowed(untrained, said, 1.0) == 5.0
    assert run._allowed(trained, said, 90.0) == 90.0


def test_every_plain_engine_is_raced_though_the_time_is_over(tmp_path: Path) -> None:
    madeup.prepare(tmp_path)
    report = madeup.search(tmp_path, replace(madeup.SETTINGS, time_limit_s=0.01), told=False)
    plain = [t for t in report.trials if not t.recipe["steps"]]
    assert len(plain) == 1 + len(madeup.CATALOGUE.engines)


def test_candidates_go_before_prove_in_the_order_of_their_risk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = {}
    for way in ("usual", "turned"):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / f"state-{way}"))
        if way == "turned":
            monkeypatch.setattr(conclude, "risks", lambda trials, settings: {t.number: -float(t.number) for t in trials})
        madeup.prepare(tmp_path / way)
        madeup.search(tmp_path / way, told=False)
        store = Store(tmp_path / way / verbs.STORE, writable=False)
        frozen[way] = store.fact("frozen")
        store.close()
    assert len(frozen["usual"]) > 1
    assert frozen["turned"] == sorted(frozen["turned"], reverse=True) != frozen["usual"]


@pytest.mark.long(share=1)
def test_the_parent_does_not_grow(tmp_path: Path) -> None:
    amounts = itertools.product((1, 2, 3), (1, 2, 3), (1, 2, 3), range(8))
    recipes = [
        Recipe((madeup.Shape(amount=a), madeup.Balance(amount=b), madeup.Numbers(amount=c)), madeup.Fast(threads=t))
        for a, b, c, t in amounts
    ]
    madeup.prepare(tmp_path, select=100, prove=20)
    with opened(tmp_path) as bench, madeup.stand_ins(bench.store):
        bench.attempt(Recipe((), madeup.Given()))
        for recipe in recipes[:10]:
            bench.attempt(recipe)
        before = _resident()
        for recipe in recipes[10:210]:
            assert bench.attempt(recipe).state == "finished"
        assert _resident() - before < 50e6


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_held_folder_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    lock = folder.Lock(tmp_path / "run")
    try:
        with pytest.raises(RunLocked, match=f"in use by process {os.getpid()} on .*; wait for it or choose another"):
            verbs.optimize("no such model.pt2", "no such data.npz", run=tmp_path / "run")
    finally:
        lock.release()
    folder.refuse_if_held(tmp_path / "run")
    folder.refuse_if_held(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_numpy_and_shutil_say_in_their_own_words_that_the_disk_is_full(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the disk is full"), folder.new_folder(tmp_path / "a"):
        raise OSError("1000 requested and 12 written")
    with pytest.raises(StorageError, match="the disk is full"), folder.new_folder(tmp_path / "a"):
        raise shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")])
    with pytest.raises(OSError, match="other"), folder.new_folder(tmp_path / "a"):
        raise OSError("other")


def test_what_a_killed_process_left_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / "cache" / ".k.part" / "network").mkdir(parents=True)
    (tmp_path / ".report.json.12.part").write_text("{")
    (tmp_path / "cache" / "k").mkdir()
    folder.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["cache", "k"]


def test_a_beginning_that_another_process_makes_is_waited_for(tmp_path: Path) -> None:
    """Locks of one file belong to processes: only one of two can hold the byte of an entry."""
    import subprocess
    import sys

    from hasten.search.workshop import alone

    script = "import sys; from pathlib import Path; from hasten.search.workshop import alone\nwith alone(Path(sys.argv[1]), 'ab' * 16): print('in')"
    with alone(tmp_path, "ab" * 16):
        other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(3)
        with alone(tmp_path, "cd" * 16):
            pass
        with pytest.raises(subprocess.TimeoutExpired):  # closing any descriptor of the file would give up this lock as well
            other.wait(1)
    assert other.communicate(timeout=120)[0] == b"in\n"


def test_parcels_arrive_whole_or_not_at_all(tmp_path: Path) -> None:
    from hasten.distributed import parcels

    with folder.new_folder(tmp_path / "a") as fresh:
        (fresh / "deep").mkdir()
        (fresh / "deep" / "x.bin").write_bytes(b"\x00\x01")
        (fresh / "empty").write_bytes(b"")
    parcel = parcels.read(place=str(tmp_path / "a"))
    parcels.write(*parcel.arrays, place=str(tmp_path / "b"), names=parcel.value)
    assert folder.intact(tmp_path / "b")
    assert (tmp_path / "b" / "deep" / "x.bin").read_bytes() == b"\x00\x01"
    changed = [np.array([1, 2], np.uint8) if name == "deep/x.bin" else a for name, a in zip(parcel.value, parcel.arrays, strict=True)]
    with pytest.raises(StorageError, match="not what its manifest says"):
        parcels.write(*changed, place=str(tmp_path / "c"), names=parcel.value)
    with pytest.raises(StorageError, match=r"got 1 with names like \['../x'\]"):
        parcels.write(np.zeros(1, np.uint8), place=str(tmp_path / "c"), names=["../x"])
    assert not (tmp_path / "c").exists()
    assert parcels.read(place=str(tmp_path / "nowhere")).value == []
