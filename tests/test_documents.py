"""Documents that are code, and JSON that others read."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hasten
import sample_reports
from hasten import compress, engines, tasks, train
from hasten.core.report import Report
from hasten.core.store import _SCHEMA, SCHEMA_VERSION
from hasten.measure import scores
from hasten.report import json_text

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"


def load(path: Path):  # type: ignore[no-untyped-def]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def test_mini_is_short() -> None:
    assert len((ROOT / "docs" / "mini.py").read_text().splitlines()) <= 150


@pytest.mark.long
def test_mini_runs_and_finds_something(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = load(ROOT / "docs" / "mini.py").main(epochs=2)
    out = capsys.readouterr().out
    assert "drop at most" in out
    assert "OnnxRuntime" in chosen or "OpenVINO" in chosen


def test_the_page_of_the_command_line_is_that_of_the_program(tmp_path: Path) -> None:
    """Made by `python -m typer hasten.cli utils docs --name hasten --output docs/cli.md`."""
    made = tmp_path / "cli.md"
    command = [sys.executable, "-m", "typer", "hasten.cli", "utils", "docs", "--name", "hasten", "--output", str(made)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "COLUMNS": "100"})
    assert made.read_text() == (ROOT / "docs" / "cli.md").read_text()


def test_the_report_has_golden_bytes() -> None:
    """The JSON of a report, byte for byte. A change of format raises `FORMAT` and keeps this file readable."""
    file = GOLDEN / "report.json"
    report = sample_reports.ALL["kept"]
    assert json_text(report) == file.read_text()
    assert Report.from_json(json.loads(file.read_text())) == report


def test_the_recipe_has_golden_bytes() -> None:
    from hasten.core.recipe import Recipe

    recipe = Recipe((compress.FoldBatchNorm(), train.FineTune(), compress.QuantizeStatic()), engines.OpenVINO(shapes="static"))
    file = GOLDEN / "recipe.json"
    assert json.dumps(recipe.to_json(), indent=1) + "\n" == file.read_text()
    assert Recipe.from_json(json.loads(file.read_text())) == recipe


def test_the_store_has_its_schema() -> None:
    """A change of schema raises SCHEMA_VERSION, and docs/format.md with it."""
    import hashlib

    assert (SCHEMA_VERSION, hashlib.sha256(_SCHEMA.encode()).hexdigest()[:16]) == (2, SCHEMA_DIGEST)


SCHEMA_DIGEST = "72ad97dc8a53b4b8"


def test_every_method_is_in_the_documents() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    named = set(re.findall(r"^\| `(\w+)`", text, re.M))
    assert named == {*compress.__all__, *engines.__all__, "Distil", "FineTune"}
    for name, _ in scores._KNOWN:
        assert f"`{name}`" in text


def test_what_the_articles_are_called_here_exists() -> None:
    text = (ROOT / "docs" / "articles.md").read_text()
    homes = (hasten, compress, engines, train, train.optim)
    named = set(re.findall(r"`(?:[a-z]+\.)*([A-Z]\w+)", text))
    assert len(named) > 40
    assert not [name for name in sorted(named) if not any(hasattr(home, name) for home in homes)]
    for path in re.findall(r"`((?:examples|scripts|tests)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path
    for task in re.findall(r"^\| \w+ \| (`.*) \|$", text, re.M):
        assert set(re.findall(r"`(\w+)`", task)) <= set(tasks.names())


def test_a_report_from_a_newer_hasten_is_refused() -> None:
    from hasten.core.errors import StorageError

    record = json.loads((GOLDEN / "report.json").read_text())
    for change in ({"format": 2}, {"verdict": "great"}, {"surprise": 1}, {"seconds": "soon"}):
        with pytest.raises(StorageError, match="not a Report"):
            Report.from_json(record | change)


FIGURE = re.compile(r"benchmarks/results/(\w+)\.json")


def test_quoted_results_are_committed() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for name in FIGURE.findall(document.read_text()):
            found = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
            assert not found.get("quick")


def test_tables_of_the_pages_are_those_of_the_results() -> None:
    tables = load(ROOT / "benchmarks" / "tables.py")
    pages = {page.name: page.read_text() for page in tables.PAGES}
    assert "| bare |" in pages["training.md"]
    for name, page in pages.items():
        assert tables.written(page) == page, f"run python benchmarks/tables.py: {name} is old"
        assert tables.written(page.replace("| bare |", "| base |")) == page
