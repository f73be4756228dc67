"""The main job, end to end on a small real problem: the verdicts, the seal, never worse, caps, resuming after kills."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import hasten
import problems
from hasten import presets, verbs
from hasten.core import folder
from hasten.core.data import View
from hasten.core.errors import ModelRefused, RunLocked, StorageError, UsageError
from hasten.core.report import Report
from hasten.core.store import Store
from hasten.engines import Eager, OnnxRuntime
from hasten.load import files
from hasten.load.lower import lower
from hasten.search import finals, ledger
from hasten.search.catalogue import Catalogue
from hasten.verbs import Options

pytestmark = pytest.mark.usefixtures("_cut_short")
FEW = Options(trials=8)


@pytest.fixture(autouse=True)
def _cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.measure import timing

    for module, name in ((presets, "default"), (timing, "FULL"), (timing, "RANKING")):
        monkeypatch.setattr(module, name, getattr(module, name))
    problems.cut_short()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return problems.write_files(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def finished(inputs: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """One finished run; do not write on it."""
    problems.cut_short()
    ledger.ledger_file().unlink(missing_ok=True)  # other tests may have opened the same data
    run = tmp_path_factory.mktemp("finished") / "run"
    return run, verbs.optimize(*inputs, max_drop=0.05, run=run, options=FEW)


def load_artifact(report: Report):  # type: ignore[no-untyped-def]
    assert report.artifact
    return runpy.run_path(str(Path(report.artifact) / "load.py"))["load"](report.artifact)


def test_the_main_job(finished: tuple[Path, Report]) -> None:
    run, report = finished
    assert report.state == "finished"
    assert report.exit_code == 0
    assert report.chosen
    assert report.verdict in ("equal", "kept")
    assert report.provenance == "held out"
    assert report.score_name == "accuracy"
    assert report.sentence
    assert {"as given", "best plain engine"} == set(report.baselines)
    assert [i.batch for i in report.chosen.speedup] == [1, 32]
    assert report.chosen.score_drop.upper <= 0.05
    assert [c.trial for c in report.certificates][:1] == [0]
    assert len(report.openings) == 1
    assert report.chosen.trial in {t.number for t in report.trials}
    assert all(t.state == "finished" for t in report.trials)
    assert folder.intact(run / "artifact")


def test_the_artifact_runs_without_hasten_and_scores_what_the_report_says(finished: tuple[Path, Report]) -> None:
    run, report = finished
    artifact = run / "artifact"
    script = (
        "import sys; sys.modules['hasten'] = None\n"
        "import numpy as np, runpy\n"
        f"network = runpy.run_path({str(artifact / 'load.py')!r})['load']({str(artifact)!r})\n"
        f"data = np.load({str(run.parent / 'prove.npz')!r})\n"
        "print(np.mean(network(data['x'])[0].argmax(1) == data['y']))\n"
    )
    held_out = problems.data().held_out
    np.savez(run.parent / "prove.npz", x=held_out.inputs[0], y=held_out.labels)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert report.chosen
    assert float(done.stdout) == pytest.approx(report.chosen.score)
    names = {f.name for f in artifact.iterdir()}
    assert {"load.py", "recipe.json", "report.json", "README.md", "manifest.json"} <= names
    assert Report.from_json(json.loads((artifact / "report.json").read_text())).chosen == report.chosen


def test_the_report_tells_the_same_from_disk(finished: tuple[Path, Report]) -> None:
    run, report = finished
    again = hasten.load_report(run)
    assert again.chosen == report.chosen
    assert again.sentence == report.sentence
    assert Report.from_json(json.loads((run / "report.json").read_text())).sentence == report.sentence
    assert (run / "report.html").read_text().startswith("<!")


def test_the_same_call_again_tries_nothing(finished: tuple[Path, Report], inputs: tuple[Path, Path, Path]) -> None:
    run, report = finished
    again = verbs.optimize(*inputs, max_drop=0.05, run=run, options=FEW)
    assert again.chosen == report.chosen
    assert len(again.openings) == 1


def test_another_call_on_the_same_folder_is_refused(finished: tuple[Path, Report], inputs: tuple[Path, Path, Path]) -> None:
    run, _ = finished
    with pytest.raises(UsageError, match="another limit, seed; choose a new --run folder"):
        verbs.optimize(*inputs, max_drop=0.04, run=run, options=Options(trials=8, seed=1))


def test_a_held_folder_is_refused_at_once(finished: tuple[Path, Report], inputs: tuple[Path, Path, Path]) -> None:
    run, _ = finished
    lock = folder.Lock(run)
    start = time.monotonic()
    try:
        with pytest.raises(RunLocked, match="in use by process"):
            verbs.optimize(*inputs, max_drop=0.05, run=run, options=FEW)
        assert verbs.load_report(run).state == "finished"
    finally:
        lock.release()
    assert time.monotonic() - start < 60  # far below the time of a run


def reopened(run: Path, to: Path) -> Path:
    """A copy of a finished run as it was just before *prove* was opened."""
    shutil.copytree(run, to)
    database = sqlite3.connect(to / "run.sqlite")
    database.execute("DELETE FROM facts WHERE name IN ('certificates', 'final')")
    database.execute("DELETE FROM openings")
    database.commit()
    database.close()
    return to


def poison(run: Path) -> None:
    """Makes every label of *prove* random, and the seal believe it."""
    place, facts = run / "views" / "prove", run / "views" / "cut.json"
    labels = np.load(place / "labels.npy")
    np.save(place / "labels.npy", np.random.default_rng(0).integers(0, 10, len(labels)))
    told = json.loads(facts.read_text())
    told["prove"]["fingerprint"] = View.load(place).fingerprint()
    facts.write_text(json.dumps(told))


def test_a_broken_seal_is_seen(finished: tuple[Path, Report], inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    copy = reopened(finished[0], tmp_path / "run")
    labels = copy / "views" / "prove" / "labels.npy"
    np.save(labels, np.load(labels)[::-1])
    with pytest.raises(StorageError, match="not what was sealed"):
        verbs.optimize(*inputs, max_drop=0.05, run=copy, options=FEW)


def test_proof_data_that_was_opened_before_is_called_reused(
    finished: tuple[Path, Report], inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    copy = reopened(finished[0], tmp_path / "run")
    database = sqlite3.connect(copy / "run.sqlite")
    database.execute("DELETE FROM facts WHERE name = 'identity'")
    database.commit()
    database.close()
    found = verbs.optimize(*inputs, max_drop=0.05, run=copy, options=FEW)
    assert found.openings[0].reused
    assert not finished[1].openings[0].reused


def unsearched(run: Path, to: Path) -> Path:
    """A copy of a finished run with its data cut and its heats timed, but with no trial and no choice."""
    reopened(run, to)
    database = sqlite3.connect(to / "run.sqlite")
    database.execute("DELETE FROM trials")
    database.execute("DELETE FROM facts WHERE name IN ('frozen', 'kept', 'ledger', 'searched') OR name LIKE 'network %'")
    database.commit()
    database.close()
    for name in ("packages", "cache", "outputs", "artifact", "best-so-far"):
        shutil.rmtree(to / name, ignore_errors=True)
    return to


def test_poisoned_proof_data_changes_no_candidate(
    finished: tuple[Path, Report], inputs: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The law of the seal: with every label of *prove* wrong, the whole search, given the same timings, goes as before."""
    from hasten.search import bench

    run, report = finished
    times = {t.number: t.measurement.latency for t in report.trials if t.measurement}
    monkeypatch.setattr(bench.timing, "quick", lambda runner, *_: times[int(runner._folder.name)])
    poisoned = unsearched(run, tmp_path / "run")
    poison(poisoned)
    before = Store(run / "run.sqlite", writable=False)
    found = verbs.optimize(*inputs, max_drop=0.05, run=poisoned, options=FEW)
    after = Store(poisoned / "run.sqlite", writable=False)
    assert [(t.recipe, t.state) for t in found.trials] == [(t.recipe, t.state) for t in report.trials]
    for new, old in zip(found.trials, report.trials, strict=True):
        assert new.measurement
        assert old.measurement
        assert (new.measurement.score_drop, new.measurement.latency) == (old.measurement.score_drop, old.measurement.latency)
    assert after.fact("frozen") == before.fact("frozen")
    assert [(line.part, line.score_drop) for line in found.ledger] == [(line.part, line.score_drop) for line in report.ledger]
    assert {p.name for p in (run / "packages").iterdir()} == {p.name for p in (poisoned / "packages").iterdir()}
    assert found.chosen
    assert found.chosen.score < 0.5  # the poison was looked at, in the end
    assert found.openings[0].fingerprint != report.openings[0].fingerprint


def test_prove_is_opened_once_and_only_after_the_candidates_are_frozen(
    finished: tuple[Path, Report], inputs: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = reopened(finished[0], tmp_path / "run")
    opened: list[object] = []
    real = View.load.__func__  # type: ignore[attr-defined]

    def watched(cls: type[View], place: Path) -> View:
        if place.name == "prove":
            store = Store(copy / "run.sqlite", writable=False)
            opened.append((store.fact("frozen"), store.openings()))
        return real(cls, place)  # type: ignore[no-any-return]

    monkeypatch.setattr(View, "load", classmethod(watched))
    verbs.optimize(*inputs, max_drop=0.05, run=copy, options=FEW)
    assert len(opened) == 1
    frozen, openings = opened[0]  # type: ignore[misc]
    assert frozen
    assert len(openings) == 1
    assert ledger.ledger_file().exists()


def only(as_given: object, *engines: object):  # type: ignore[no-untyped-def]
    return lambda *_, **__: Catalogue(as_given=as_given, engines=engines, steps=())  # type: ignore[arg-type]


def test_nothing_helps_and_the_network_comes_back_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "default", only(Eager()))
    train, held_out = problems.with_names()
    report = hasten.optimize(problems.trained(), train, held_out, run=tmp_path / "run", options=Options(trials=1))
    assert (report.class_names, report.input_names, len(report.input_shapes)) == (problems.NAMES, ("picture",), 1)
    assert report.exit_code == 0
    assert report.verdict == "equal"
    assert report.chosen.trial == 0  # type: ignore[union-attr]
    assert "unchanged" in report.sentence
    network = load_artifact(report)
    x = held_out["picture"][:5]
    with torch.inference_mode():
        expected = problems.trained()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(network(x)[0], expected, atol=1e-5)
    assert (tmp_path / "run" / "artifact" / "model.pt2").exists()


def test_the_best_plain_engine_comes_back_with_equal_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "default", only(Eager(), OnnxRuntime(threads=1)))
    data = problems.data()
    before = {k: v.clone() for k, v in problems.trained().state_dict().items()}
    report = hasten.optimize(problems.trained(), data.train, data.held_out, run=tmp_path / "run")
    assert report.verdict == "equal"
    assert report.chosen
    x = data.held_out.inputs[0][:5]
    with torch.inference_mode():
        expected = problems.trained()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(load_artifact(report)(x)[0], expected, atol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in problems.trained().state_dict().items())


@pytest.mark.parametrize(
    ("cap", "words"),
    [({"size_bytes": 10}, "bytes on disk, cap 10"), pytest.param({"min_speedup": 1e6}, "minimum 1e\\+06×", marks=pytest.mark.long)],
)
def test_a_cap_that_nothing_meets(
    finished: tuple[Path, Report],
    inputs: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cap: dict[str, float],
    words: str,
) -> None:
    monkeypatch.setattr(presets, "default", only(Eager(), OnnxRuntime(threads=1)))
    report = verbs.optimize(*inputs, max_drop=0.05, run=tmp_path / "run", options=Options(**cap))  # type: ignore[arg-type]
    assert report.chosen is None
    assert report.exit_code == 3
    import re

    assert re.search(words, report.closest_miss or "")
    assert folder.intact(tmp_path / "run" / "best-so-far")
    assert report.sentence


def test_without_labels_the_score_is_agreement(tmp_path: Path) -> None:
    data = problems.data()
    report = hasten.optimize(
        problems.trained(), data.train.inputs[0], data.held_out.inputs[0], max_drop=0.05, run=tmp_path / "run", options=FEW
    )
    assert "agreement" in report.score_name
    assert report.baselines["as given"].score == 1.0
    assert report.chosen


def test_an_onnx_graph_and_one_set_of_data(tmp_path: Path) -> None:
    data = problems.data()
    graph = lower(files.from_module(problems.trained(), (data.train.inputs[0][:4],)))
    onnx.save(graph.graph, tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=data.train.inputs[0], y=data.train.labels)
    report = verbs.optimize(tmp_path / "model.onnx", tmp_path / "data.npz", max_drop="10%rel", run=tmp_path / "run", options=FEW)
    assert report.provenance == "unknown"
    assert report.limit.max_drop == pytest.approx(0.1 * report.trials[0].measurement.score)  # type: ignore[union-attr]
    assert report.chosen
    assert any("Quantize" in t.words and t.state == "finished" for t in report.trials)
    assert not any("Fold" in t.words for t in report.trials)


def test_a_network_that_fails_is_refused(tmp_path: Path) -> None:
    class Broken(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(ModelRefused, match="mat1 and mat2"):
        hasten.optimize(Broken(), problems.data().train, run=tmp_path / "run")


@pytest.mark.long
def test_an_engine_that_crashes_hangs_or_differs_costs_one_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.search import bench
    from methods import Crashing, Guessing, Hanging, Short

    monkeypatch.setattr(bench, "DEADLINE_S", 20.0)
    monkeypatch.setattr(presets, "default", only(Eager(), Crashing(), Hanging(), Short(), Guessing(), OnnxRuntime(threads=1)))
    data = problems.data()
    report = hasten.optimize(problems.trained(), data.train, data.held_out, run=tmp_path / "run")
    ended = {t.words.partition("(")[0]: t for t in report.trials if not t.recipe["steps"]}
    for engine, reason in {"Crashing": "SIGABRT", "Hanging": "no answer within 20 s", "Short": r"\(.*, 10\).*\(.*, 9\)"}.items():
        assert ended[engine].state == "failed"
        assert re.search(reason, ended[engine].reason or "")
    assert ended["Guessing"].measurement
    assert ended["Guessing"].measurement.score_drop > 0.5
    assert report.exit_code == 0
    assert report.chosen
    assert "Guessing" not in report.chosen.words


def test_a_full_disk_stops_with_its_own_error_and_the_run_goes_on_later(
    inputs: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = finals.heat

    def full(*_: object) -> None:
        raise StorageError("cannot write: the disk is full")

    monkeypatch.setattr(finals, "heat", full)
    with pytest.raises(StorageError, match="the disk is full"):
        verbs.optimize(*inputs, max_drop=0.05, run=tmp_path / "run", options=FEW)
    broken_off = verbs.load_report(tmp_path / "run")
    assert broken_off.state == "interrupted"
    assert broken_off.exit_code == 130
    assert (tmp_path / "run" / "artifact" / "load.py").exists()  # best so far is on disk already
    monkeypatch.setattr(finals, "heat", real)
    report = verbs.optimize(*inputs, max_drop=0.05, run=tmp_path / "run", options=FEW)
    assert report.trials[: len(broken_off.trials)] == broken_off.trials


@pytest.mark.parametrize("kills", [2, pytest.param(15, marks=pytest.mark.long)])
def test_no_finished_trial_is_lost_to_kill_9(inputs: tuple[Path, Path, Path], tmp_path: Path, kills: int) -> None:
    run = tmp_path / "run"
    seen = problems.killed_until_done(inputs, run, kills)
    report = verbs.load_report(run)
    assert report.state == "finished"
    final = {t.number: t.to_json() for t in report.trials}
    for trials in seen:
        for trial in trials:
            assert final[trial["number"]] == trial  # type: ignore[index]
    assert all(t.state != "running" for t in report.trials)
    assert len({json.dumps(t.recipe) for t in report.trials}) == len(report.trials)
    assert folder.intact(run / "artifact")
    assert not list(run.rglob("*.part"))


@pytest.mark.parametrize("workers", [None, pytest.param(2, marks=pytest.mark.long)])
def test_the_same_seed_gives_the_same_scores(
    finished: tuple[Path, Report], inputs: tuple[Path, Path, Path], tmp_path: Path, workers: int | None
) -> None:
    """Timings differ from run to run and may change what is tried; recipes that both runs tried score the same, whoever built them."""
    again = verbs.optimize(*inputs, max_drop=0.05, run=tmp_path / "run", options=Options(trials=8, workers=workers))
    scores = {json.dumps(t.recipe): t.measurement.score for t in finished[1].trials if t.measurement}
    common = [t for t in again.trials if t.measurement and json.dumps(t.recipe) in scores]
    assert len(common) >= 3
    assert all(t.measurement.score == scores[json.dumps(t.recipe)] for t in common if t.measurement)
