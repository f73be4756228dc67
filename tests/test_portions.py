"""A slow network and little time: fewer examples choose and prove, drawn before anyone looks, and the report says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import madeup
from hasten.core.data import Sealed, View
from hasten.core.report import Limit
from hasten.core.runner import batch_of
from hasten.load.split import fewest
from hasten.search import bench, run
from hasten.search.catalogue import Settings


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


@pytest.mark.parametrize(
    ("limit_s", "each_s", "expected"), [(None, 1.0, 5000), (600.0, 0.001, 5000), (600.0, 0.02, 1500), (60.0, 1.0, 300)]
)
def test_what_fits_into_a_share_of_the_time(limit_s: float | None, each_s: float, expected: int) -> None:
    assert Settings(limit=Limit(), time_limit_s=limit_s).fitting(5000, each_s, 1 / 20, 300) == expected


def test_a_batch_size_that_is_no_goal_is_left_where_a_call_takes_too_long() -> None:
    settings = Settings(limit=Limit(), batches=(1, 32), time_limit_s=120.0)
    assert settings.timed(0.018).batches == (1, 32)
    assert settings.timed(0.020).batches == (1,)
    assert replace(settings, time_limit_s=None).timed(9.0).batches == (1, 32)
    assert replace(settings, goals=("throughput",)).timed(9.0).batches == (1, 32)


@pytest.mark.parametrize(("shape", "expected"), [((100, 10), 64), ((100, 3, 224, 224), 6), ((2, 3, 2000, 2000), 1), ((0, 4), 64)])
def test_examples_are_answered_together_as_long_as_they_take_little_room(shape: tuple[int, ...], expected: int) -> None:
    assert batch_of((np.broadcast_to(np.float32(0), shape),)) == expected


def test_a_search_with_little_time_chooses_and_proves_by_a_part(tmp_path: Path) -> None:
    settings = replace(madeup.SETTINGS, time_limit_s=1000.0, prove_examples=600)
    madeup.prepare(tmp_path / "some", select=400, prove=600)
    with mock.patch.object(bench, "SCORING", 0.0), mock.patch.object(run, "PROVING", 0.0):
        some = madeup.search(tmp_path / "some", settings)
    least = 2 * (fewest(0.02, 0.95) or 0)
    assert 200 < least < 600
    assert {c.bound.n for c in some.certificates if c.bound} == {least}
    assert "200 of the 400 examples of select chose, drawn at random, for the sake of the time limit" in some.notes
    assert f"{least} of the 600 examples of prove proved, drawn at random, for the sake of the time limit" in some.notes
    assert View.load(tmp_path / "some" / "outputs" / "original").inputs[0].shape[0] == 200

    madeup.prepare(tmp_path / "all", select=400, prove=600)
    whole = madeup.search(tmp_path / "all", settings)
    assert {c.bound.n for c in whole.certificates if c.bound} == {600}
    assert not any("time limit" in note for note in whole.notes)
