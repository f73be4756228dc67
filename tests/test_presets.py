"""What is tried unasked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import problems
from hasten import engines, presets, verbs
from hasten.core import folder
from hasten.core.errors import UsageError
from hasten.core.network import Arrays
from hasten.core.recipe import Stage
from hasten.core.report import Latency
from hasten.core.runner import Runner
from hasten.measure import timing
from hasten.verbs import Options

DEFAULT = presets.default  # other tests put a shorter one in its place


def test_more_effort_tries_all_that_less_effort_tries() -> None:
    quick, normal, thorough = (DEFAULT("module", effort) for effort in ("quick", "normal", "thorough"))  # type: ignore[arg-type]
    assert set(quick.steps) < set(normal.steps) < set(thorough.steps)
    assert set(quick.engines) < set(normal.engines) <= set(thorough.engines)
    assert (quick.trainings, quick.tune) == (0, False)
    assert 0 < normal.trainings < thorough.trainings
    assert not any(kind.stage in (Stage.STRUCTURE, Stage.TRAIN) for kind in quick.steps)
    assert any(kind.stage == Stage.STRUCTURE and "speed" in kind.aims for kind in normal.steps)
    with pytest.raises(UsageError, match="effort must be quick, normal or thorough, got 'much'"):
        Options(effort="much")  # type: ignore[arg-type]


def test_a_cap_on_the_size_is_met_with_what_makes_files_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Enough(Exception):
        pass

    def default(kind: str, effort: str, *, goals: Sequence[str], **_: object) -> None:
        asked.append(tuple(goals))
        raise Enough

    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(presets, "default", default)
    for size in (None, 1000):
        with pytest.raises(Enough):
            verbs.optimize(problems.trained(), problems.with_names()[0], run=tmp_path / str(size), options=Options(size_bytes=size))
    assert asked == [("latency",), ("latency", "size")]


def test_where_the_size_counts_files_are_packed() -> None:
    assert not any(getattr(engine, "packed", False) for engine in DEFAULT("graph").engines)
    assert any(getattr(engine, "packed", False) for engine in DEFAULT("graph", goals=("latency", "size")).engines)


def _by_size(runner: Runner, _: Arrays, batches: Sequence[int], **__: Any) -> tuple[Latency, ...]:
    """A clock that no other process disturbs: a millisecond for each kilobyte of the packed network."""
    ms = folder.size_bytes(runner._folder) / 1000
    return tuple(Latency(batch=b, p50_ms=ms, p95_ms=ms, calls=1, launches=1, first_call_ms=ms) for b in batches)


@pytest.mark.long
def test_the_search_prunes_trains_and_rounds_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the typed fields of the steps alone: a pruned network is trained before it is judged, and later steps build on it."""
    whole = DEFAULT("module", "normal")
    engines = tuple(e for e in whole.engines if type(e).__name__ == "OnnxRuntime")
    monkeypatch.setattr(presets, "default", lambda *_, **__: replace(whole, engines=engines, tune=False, trainings=2))
    monkeypatch.setattr(timing, "FULL", timing.Protocol(fewest=2, most=2, block_ms=5, blocks=2))
    monkeypatch.setattr(timing, "quick", _by_size)
    inputs = problems.write_files(tmp_path)
    report = verbs.optimize(*inputs, max_drop=0.05, run=tmp_path / "run", options=Options(trials=30))
    finished = [t.words for t in report.trials if t.state == "finished"]
    assert any(w.startswith("PruneStructure") or "→ PruneStructure" in w for w in finished)
    assert {f.method for f in report.findings} == {kind.__name__ for kind in whole.steps}
    assert any("PruneStructure" in w and "→ FineTune" in w for w in finished), finished
    assert report.chosen


def test_nothing_is_compiled_where_there_is_little_time() -> None:
    for time_s, there in ((120.0, False), (600.0, True)):
        assert any(isinstance(e, engines.TorchCompile) for e in DEFAULT("module", time_s=time_s).engines) is there
