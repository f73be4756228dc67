"""The trials of a run in SQLite, so that a killed run goes on where it was. docs/format.md has the schema.

Optuna's storages are not used: its journal breaks for good on one torn line, and its SQLite one leaves trials "running".
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from hasten.core.errors import StorageError
from hasten.core.recipe import Recipe
from hasten.core.report import Measurement, Opening, Trial

T = TypeVar("T")
SCHEMA_VERSION = 2
_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE trials (
    number INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    recipe TEXT NOT NULL,
    words TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('running', 'finished', 'failed')),
    measurement TEXT,
    reason TEXT,
    seconds REAL NOT NULL DEFAULT 0,
    pace_s REAL
) STRICT;
CREATE TABLE openings (record TEXT NOT NULL) STRICT;
"""


class Store:
    """The database of one run. Every method that writes returns when the write has reached the disk.

    Args:
        file: the SQLite file; made if it is not there.
        writable: False opens what is there, also while another process writes it.

    Raises:
        StorageError: if it cannot be opened, is damaged or of a newer version.
    """

    def __init__(self, file: Path, *, writable: bool = True) -> None:
        if not writable and not file.exists():
            raise StorageError(f"no run in {file.parent}: expected {file.name} there")
        with _errors(file):
            self._file = file
            still = not writable and not os.access(file.parent, os.W_OK)  # a copy on a disk that nobody writes: SQLite would want to
            place = f"file:{quote(str(file.resolve()))}?immutable=1" if still else file
            self._db = sqlite3.connect(place, isolation_level=None, timeout=5, uri=still)
            if writable:
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = FULL")
            self._prepare(writable)

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def fact(self, name: str) -> Any:
        """The JSON value stored under `name`, or None."""
        with _errors(self._file):
            row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return json.loads(row[0]) if row else None

    def remember(self, name: str, value: object) -> None:
        """Stores a JSON value under `name`, replacing an older one."""
        with _errors(self._file):
            self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """The JSON value stored under `name`; computed and stored the first time."""
        value: T | None = self.fact(name)
        if value is None:
            value = compute()
            self.remember(name, value)
        return value

    def begin(self, recipe: Recipe) -> Trial:
        """The trial of this recipe: as it ended, or a new (or broken-off) one in state "running"."""
        key = recipe.key()
        with _errors(self._file):
            if not self._db.execute("SELECT 1 FROM trials WHERE key = ?", (key,)).fetchone():
                self._db.execute(
                    "INSERT INTO trials (number, key, recipe, words, state) SELECT coalesce(max(number), -1) + 1, ?, ?, ?, ? FROM trials",
                    (key, json.dumps(recipe.to_json()), str(recipe), "running"),
                )
        return self._read("WHERE key = ?", key)[0]

    def forget(self, number: int) -> None:
        """Takes a trial out, so that its recipe is tried again."""
        with _errors(self._file):
            self._db.execute("DELETE FROM trials WHERE number = ?", (number,))

    def finish(self, number: int, measurement: Measurement, *, seconds: float, pace_s: float | None = None) -> None:
        """Ends a trial with its measurement."""
        self._end(number, "finished", json.dumps(measurement.to_json()), None, seconds, pace_s)

    def fail(self, number: int, reason: str, *, seconds: float, pace_s: float | None = None) -> None:
        """Ends a trial with the reason why there is no measurement."""
        self._end(number, "failed", None, reason, seconds, pace_s)

    def trials(self) -> list[Trial]:
        """All of them, by number."""
        return self._read("")

    def record_opening(self, opening: Opening) -> None:
        """Writes down that *prove* is about to be opened."""
        with _errors(self._file):
            self._db.execute("INSERT INTO openings VALUES (?)", (json.dumps(opening.to_json()),))

    def openings(self) -> tuple[Opening, ...]:
        """The openings of *prove* in this run, the first first."""
        with _errors(self._file):
            rows = self._db.execute("SELECT record FROM openings ORDER BY rowid").fetchall()
        return tuple(Opening.from_json(json.loads(record)) for (record,) in rows)

    def _read(self, which: str, *values: object) -> list[Trial]:
        query = f"SELECT number, recipe, words, state, measurement, reason, seconds, pace_s FROM trials {which} ORDER BY number"
        with _errors(self._file):
            rows = self._db.execute(query, values).fetchall()
        return [
            Trial(
                number=number,
                recipe=json.loads(recipe),
                words=words,
                state=state,
                measurement=Measurement.from_json(json.loads(measured)) if measured else None,
                reason=reason,
                seconds=seconds,
                pace_s=pace_s,
            )
            for number, recipe, words, state, measured, reason, seconds, pace_s in rows
        ]

    def _end(self, number: int, state: str, *ended: str | float | None) -> None:
        with _errors(self._file):
            self._db.execute(
                "UPDATE trials SET state = ?, measurement = ?, reason = ?, seconds = ?, pace_s = ? WHERE number = ?",
                (state, *ended, number),
            )

    def _prepare(self, writable: bool) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0 and writable:
            self._db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        elif version != SCHEMA_VERSION:
            raise StorageError(f"{self._file} has format {version}, this hasten reads {SCHEMA_VERSION}; choose another run folder")
        foreign = self._db.execute("SELECT name FROM sqlite_master WHERE type IN ('view', 'trigger')").fetchone()
        if foreign:  # a view can be a query without an end
            raise StorageError(f"{self._file} must hold tables alone, got {foreign[0]!r}: not read")


@contextlib.contextmanager
def _errors(file: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as why:
        raise StorageError(f"cannot use {file}: {why}; what was finished before is safe there") from why
