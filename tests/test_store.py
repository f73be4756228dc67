"""The store: trials that ended stay ended, whatever happens to the process."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from hasten.core.errors import StorageError
from hasten.core.recipe import Recipe
from hasten.core.report import Latency, Measurement, Opening
from hasten.core.store import Store
from hasten.search import ledger
from methods import Quick, Round

MEASURED = Measurement(
    score=0.9,
    score_drop=0.01,
    flips=0.02,
    max_difference=0.1,
    latency=(Latency(batch=1, p50_ms=1.0, p95_ms=1.5, calls=10, launches=1, first_call_ms=3.0),),
    size_bytes=10,
    peak_memory_bytes=20,
)
ONE, TWO = Recipe((), Quick()), Recipe((Round(),), Quick())


def test_trials_survive_closing(tmp_path: Path) -> None:
    store = Store(tmp_path / "run.sqlite")
    first, second = store.begin(ONE), store.begin(TWO)
    assert (first.number, second.number, first.state) == (0, 1, "running")
    store.finish(0, MEASURED, seconds=1.5)
    store.fail(1, "too slow", seconds=0.5)
    store.close()
    again = Store(tmp_path / "run.sqlite")
    assert again.begin(ONE).measurement == MEASURED
    assert again.begin(TWO).reason == "too slow"
    assert [t.number for t in again.trials()] == [0, 1]
    assert again.begin(ONE).recipe == ONE.to_json()


def test_a_broken_off_trial_is_begun_again_under_its_number(tmp_path: Path) -> None:
    Store(tmp_path / "run.sqlite").begin(ONE)
    again = Store(tmp_path / "run.sqlite")
    assert again.begin(ONE).state == "running"
    assert again.begin(ONE).number == 0
    assert again.begin(TWO).number == 1


def test_once_computes_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "run.sqlite")
    calls: list[int] = []

    def compute() -> dict[str, int]:
        calls.append(1)
        return {"a": 1}

    assert store.once("x", compute) == store.once("x", compute) == {"a": 1}
    assert calls == [1]
    assert store.fact("y") is None


def test_a_reader_looks_on_while_a_writer_works(tmp_path: Path) -> None:
    writer = Store(tmp_path / "run.sqlite")
    writer.begin(ONE)
    reader = Store(tmp_path / "run.sqlite", writable=False)
    assert len(reader.trials()) == 1
    writer.begin(TWO)
    assert len(reader.trials()) == 2


def test_a_copy_that_nobody_can_write_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "ä b?c"
    place.mkdir()
    writer = Store(place / "run.sqlite")
    writer.begin(ONE)
    writer.close()
    before = sorted(place.iterdir())
    monkeypatch.setattr("hasten.core.store.os.access", lambda *_: False)
    reader = Store(place / "run.sqlite", writable=False)
    assert len(reader.trials()) == 1
    reader.close()
    assert sorted(place.iterdir()) == before


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no run in"):
        Store(tmp_path / "run.sqlite", writable=False)
    (tmp_path / "run.sqlite").write_bytes(b"not a database, not at all" * 100)
    with pytest.raises(StorageError, match="not a database"):
        Store(tmp_path / "run.sqlite")
    newer = tmp_path / "newer.sqlite"
    sqlite3.connect(newer).execute("PRAGMA user_version = 99")
    with pytest.raises(StorageError, match="has format 99, this hasten reads 2"):
        Store(newer)


def test_settings_that_make_it_durable(tmp_path: Path) -> None:
    store = Store(tmp_path / "run.sqlite")
    assert store._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert store._db.execute("PRAGMA synchronous").fetchone()[0] == 2


def test_openings_are_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "run.sqlite")
    opening = Opening(fingerprint="f", when="2026-01-01", candidates=(1, 2), reused=False)
    store.record_opening(opening)
    store.record_opening(replace(opening, reused=True))
    assert store.openings() == (opening, replace(opening, reused=True))


def test_the_ledger_knows_data_that_was_opened_before() -> None:
    assert not ledger.record("data", (1,), run="a").reused
    assert not ledger.record("data", (1,), run="a").reused  # the same run going on after a kill
    assert ledger.record("data", (1,), run="b").reused
    assert ledger.record("data", (1, 2), run="a").reused
    assert not ledger.record("other data", (1,), run="b").reused
    file = ledger.ledger_file()
    with open(file, "a") as opened:
        opened.write('{"fingerprint": "torn')
    assert ledger.record("data", (1,), run="c").reused
    assert not ledger.record("new", (1,), run="c").reused
    assert ledger.record("new", (1,), run="d").reused
