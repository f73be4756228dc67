"""Recipes and names: what a JSON file of strangers may make Python do, and what may reach the terminal."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

from hasten.core.store import Store
from hostile.cases import Make, add_all

ENGINE = {"name": "hasten.engines.OnnxRuntime"}


def recipe(*steps: Any, engine: Any = ENGINE) -> Make:
    return lambda _: json.dumps({"steps": list(steps), "engine": engine}).encode()


def raw(text: bytes) -> Make:
    return lambda _: text


NAMED = "no step or engine named|is no step|is no engine|expected an object"
MODULES = {
    "os.system": "os.system", "subprocess.Popen": "subprocess.Popen", "a module that is not imported": "antigravity.Step", "a private room": "hasten.load.saved.load",
    "a room of ours": "hasten.core.child.Child", "a builtin": "builtins.eval", "dots": "...", "nothing": "", "a path": "../../evil.Step", "escape codes": "os\x1b[2J.system",
    "an attribute": "hasten.compress.FoldBatchNorm.__init__", "main": "__main__.Step", "an ending": "hasten.compress.FoldBatchNorm\0", "a network": "hasten.core.network.Network", "a value of ours": "hasten.core.recipe.Context",
}  # fmt: skip
add_all("recipe naming", "r.json", {n: (recipe({"name": m}), NAMED) for n, m in MODULES.items()}, door="recipe")
add_all("recipe", "r.json", {
    "a name by a list": (recipe({"name": ["os"]}), "expected an object with a `name`"),
    "a name by a number": (recipe({"name": 1}), "expected an object with a `name`"),
    "a setting that is none": (recipe({"name": "hasten.compress.FoldBatchNorm", "__class__": "os"}), "has no setting"),
    "a setting of another kind": (recipe({"name": "hasten.compress.QuantizeStatic", "weight_bits": {"a": 1}}), "must|expected|not"),
    "2^1000 bits": (recipe({"name": "hasten.compress.QuantizeStatic", "weight_bits": 2**1000}), "digits|must|bits"),
    "an engine as a step": (recipe(ENGINE), "is no step"),
    "a step as the engine": (recipe(engine={"name": "hasten.compress.FoldBatchNorm"}), "is no engine"),
    "an engine with code": (recipe(engine=ENGINE | {"provider": "__import__('os')", "code": 1}), "has no setting"),
    "100,000 deep": (raw(b'{"steps":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "JSON|recipe"),
    "a number of 10,000 digits": (raw(b'{"steps": [' + b"9" * 10_000 + b'], "engine": {}}'), "JSON|digits"),
    "a list": (raw(b"[]"), "must be a JSON object"),
    "no text": (raw(b"\xff\xfe\x00"), "JSON"),
    "empty": (raw(b""), "JSON"),
    "a key twice": (raw(b'{"steps": [], "steps": [{"name": "os.system"}], "engine": {}}'), "each key once"),
}, door="recipe")  # fmt: skip


def run(**facts: str) -> Make:
    """A run folder whose database holds such facts."""

    def make(path: Path) -> None:
        path.mkdir()
        store = Store(path / "run.sqlite")
        store.close()
        with contextlib.closing(sqlite3.connect(path / "run.sqlite")) as database:
            database.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
            database.execute("INSERT INTO trials (number, key, recipe, words, state) VALUES (0, 'k', ?, ?, 'failed')", ("{}", ESCAPES))
            database.commit()

    return make


def no_database(path: Path) -> None:
    path.mkdir()
    (path / "run.sqlite").write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 20)


def foreign(path: Path) -> None:
    run()(path)
    with contextlib.closing(sqlite3.connect(path / "run.sqlite")) as database:
        database.executescript(
            "DROP TABLE trials; CREATE VIEW trials AS WITH RECURSIVE n(i) AS (VALUES(0) UNION ALL SELECT i+1 FROM n) SELECT i AS number, '{}' AS recipe, 'w' AS words, 'failed' AS state, NULL AS measurement, 'r' AS reason, 1.0 AS seconds FROM n"
        )


BROKEN = "holds no run that can be read|cannot use|has no"
ESCAPES = "\x1b[2J\x1b]0;owned\x07"
add_all("run", "r", {
    "no database": (no_database, "cannot use"),
    "a view without an end": (foreign, "must hold tables alone"),
    "facts that are no JSON": (run(settings="{", task="{", environment="{"), BROKEN),
    "facts 100,000 deep": (run(settings="[" * 100_000, task="[" * 100_000), BROKEN),
    "facts of other kinds": (run(settings="1", task="[]", environment='"x"', survey="7"), BROKEN),
    "a number of 10,000 digits": (run(settings="9" * 10_000), BROKEN),
}, door="run")  # fmt: skip
