"""A slow network and little time: fewer examples choose and prove, drawn before anyone looks, and the report says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import madeup
from hasten.core.data import Sealed, View
from hasten.core.network import Arrays
from hasten.core.report import Limit
from hasten.core.runner import Runner, batch_of
from hasten.core.score import Score
from hasten.core.store import Store
from hasten.load.split import fewest
from hasten.measure.scores import AUC, Accuracy, Fidelity, SquaredError
from hasten.search import portions
from hasten.search.bench import Bench
from hasten.search.catalogue import Settings

SETTINGS = Settings(limit=Limit(max_drop=0.01), batches=(1, 32), time_limit_s=120.0)
LABELS = np.arange(1000) % 2


class Slow:
    """Takes `each_s` for an example, on a clock of its own."""

    def __init__(self, each_s: float) -> None:
        self.each_s, self.now = each_s, 0.0

    def outputs(self, inputs: Arrays) -> Arrays:
        self.now += self.each_s * len(inputs[0])
        return (np.eye(2)[inputs[0][:, 0] % 2],)

    def perf_counter(self) -> float:
        return self.now


def fitted(each_s: float, settings: Settings = SETTINGS, score: Score | None = None) -> dict[str, Any]:
    slow, select = Slow(each_s), View(inputs=(np.arange(1000)[:, None],), labels=LABELS)
    with mock.patch.object(portions, "time", slow):
        found = portions.fit(slow, settings, select, score or Accuracy(), None)  # type: ignore[arg-type]
    assert found.pop("each_s") == pytest.approx(0.0 if settings.time_limit_s is None else each_s)
    return found


def test_of_a_sealed_view_a_part_is_drawn_by_the_seed_alone() -> None:
    view = View(inputs=(np.arange(100)[:, None],), labels=np.arange(100))
    sealed = Sealed(lambda: view, size=100, fingerprint="f")
    said: list[str] = []
    parts = [sealed.part(10, seed=seed).open(said.append) for seed in (0, 0, 1)]
    assert [len(p) for p in parts] == [10, 10, 10]
    assert np.array_equal(parts[0].inputs[0], parts[1].inputs[0])
    assert not np.array_equal(parts[0].inputs[0], parts[2].inputs[0])
    assert parts[0].labels is not None
    assert np.array_equal(parts[0].labels, parts[0].inputs[0][:, 0])
    assert sealed.part(10, seed=0).size == 10
    assert said == ["f"] * 3


def test_what_chooses_and_which_batches_are_timed() -> None:
    assert fitted(0.001) == {"select": [1000, 1000], "batches": [1, 32], "left": []}
    assert fitted(0.010) == {"select": [300, 1000], "batches": [1, 32], "left": []}
    assert fitted(0.020) == {"select": [200, 1000], "batches": [1], "left": [32]}
    assert fitted(0.5)["select"] == [24, 1000]
    assert fitted(9.0, replace(SETTINGS, time_limit_s=None)) == {"select": [1000, 1000], "batches": [1, 32], "left": []}
    assert fitted(9.0, replace(SETTINGS, goals=("throughput",)))["batches"] == [1, 32]


def test_a_score_of_the_whole_keeps_its_rare_classes() -> None:
    assert fitted(9.0, score=AUC())["select"] == [1000, 1000]


@pytest.mark.parametrize(
    ("score", "each_s", "expected"),
    [
        (Accuracy(), 0.001, 5000),
        (Accuracy(), 0.010, 1500),
        (Accuracy(), 0.05, 2 * 268),
        (Fidelity(), 0.05, 2 * 299),
        (SquaredError(), 0.1, 200),
        (Accuracy(), 0.11, 272),
        (Accuracy(), 0.12, 125),  # too few to show a drop of a point: what is equal takes no more
        (Accuracy(), 1.0, 16),
        (Accuracy(), 60.0, 16),
    ],
)
def test_what_proves_can_show_the_limit(score: Score, each_s: float, expected: int) -> None:
    assert portions.proving(SETTINGS, 5000, each_s, score) == expected
    assert portions.proving(replace(SETTINGS, time_limit_s=None), 5000, each_s, score) == 5000


def test_a_relative_limit_is_shown_in_the_unit_of_the_score() -> None:
    settings = replace(SETTINGS, relative_drop=0.01).settled(0.5)
    assert portions.proving(settings, 5000, 0.025, Accuracy()) == 2 * (fewest(0.005, 0.95) or 0)


@pytest.mark.parametrize(("shape", "expected"), [((100, 10), 64), ((100, 3, 224, 224), 6), ((2, 3, 2000, 2000), 2), ((0, 4), 64)])
def test_examples_are_answered_together_as_long_as_they_take_little_room(shape: tuple[int, ...], expected: int) -> None:
    assert batch_of((np.broadcast_to(np.float32(0), shape),)) == expected


@pytest.mark.parametrize(("fixed", "sizes"), [(None, [6, 6, 6, 2]), (8, [8, 8, 4]), (4, [4] * 5)])
def test_a_fixed_batch_is_filled(fixed: int | None, sizes: list[int]) -> None:
    class Counting(Runner):
        def __init__(self) -> None:
            self._fixed_batch = fixed

        def __call__(self, *inputs: np.ndarray) -> Arrays:  # type: ignore[type-arg]
            seen.append(len(inputs[0]))
            return (np.zeros(len(inputs[0])),)

    seen: list[int] = []
    Counting().outputs((np.broadcast_to(np.float32(0), (20, 3, 224, 224)),))
    assert seen == sizes


def test_a_search_with_little_time_chooses_and_proves_by_a_part(tmp_path: Path) -> None:
    settings = replace(madeup.SETTINGS, time_limit_s=1000.0, prove_examples=600)
    madeup.prepare(tmp_path / "some", select=400, prove=600)
    with mock.patch.object(portions, "SCORING", 0.0), mock.patch.object(portions, "PROVING", 0.0):
        some = madeup.search(tmp_path / "some", settings)
    least = 2 * (fewest(0.02, 0.95) or 0)
    assert 200 < least < 600
    assert {c.bound.n for c in some.certificates if c.bound} == {least}
    assert "200 of the 400 examples of select chose, drawn at random, for the sake of the time limit" in some.notes
    assert f"{least} of the 600 examples of prove proved, drawn at random, for the sake of the time limit" in some.notes
    assert some.examples == {"select": 200, "prove": least}
    assert View.load(tmp_path / "some" / "outputs" / "original").inputs[0].shape[0] == 200

    madeup.prepare(tmp_path / "all", select=400, prove=600)
    whole = madeup.search(tmp_path / "all", settings)
    assert {c.bound.n for c in whole.certificates if c.bound} == {600}
    assert not any("time limit" in note for note in whole.notes)


def test_a_run_that_goes_on_keeps_the_parts_that_it_had(tmp_path: Path) -> None:
    select = View(inputs=(np.arange(1000)[:, None],), labels=LABELS)
    store = Store(tmp_path / "run.sqlite")
    store.remember("fitted", {"select": [300, 1000], "batches": [1], "left": [32], "each_s": 0.02})
    benches = [Bench(tmp_path, store, select, Accuracy(), SETTINGS, None) for _ in range(2)]  # type: ignore[arg-type]
    store.close()
    assert [len(b.select) for b in benches] == [300, 300]
    assert np.array_equal(benches[0].select.inputs[0], benches[1].select.inputs[0])
    assert benches[0].settings.batches == (1,)
