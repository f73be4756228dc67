"""What is tried unasked."""

from __future__ import annotations

from pathlib import Path

import pytest

import problems
from hasten import presets, verbs
from hasten.core.errors import UsageError
from hasten.measure import timing
from hasten.verbs import Options

DEFAULT = presets.default  # other tests put a shorter one in its place


def test_thorough_tries_all_that_normal_tries_and_changes_the_structure() -> None:
    normal, thorough = (set(DEFAULT("module", effort).steps) for effort in ("normal", "thorough"))  # type: ignore[arg-type]
    assert normal < thorough
    assert {"PruneStructure", "Distil"} <= {kind.__name__ for kind in thorough - normal}
    assert all(kind.stage != 20 for kind in normal)
    with pytest.raises(UsageError, match="effort must be normal or thorough, got 'much'"):
        Options(effort="much")  # type: ignore[arg-type]


@pytest.mark.long
def test_the_search_prunes_trains_and_rounds_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the typed fields of the steps alone: a pruned network is trained before it is judged, and later steps build on it."""
    catalogue = DEFAULT("module", "thorough")
    engines = tuple(e for e in catalogue.engines if type(e).__name__ == "OnnxRuntime")
    monkeypatch.setattr(
        presets, "default", lambda *_, **__: type(catalogue)(as_given=catalogue.as_given, engines=engines, steps=catalogue.steps)
    )
    monkeypatch.setattr(timing, "FULL", timing.Protocol(fewest=2, most=2, block_ms=5, blocks=2))
    inputs = problems.write_files(tmp_path)
    report = verbs.optimize(*inputs, max_drop=0.05, run=tmp_path / "run", options=Options(trials=30, effort="thorough"))
    finished = [t.words for t in report.trials if t.state == "finished"]
    assert any(w.startswith("PruneStructure") or "→ PruneStructure" in w for w in finished)
    assert any("PruneStructure" in w and "→ FineTune" in w for w in finished), finished
    assert report.chosen
