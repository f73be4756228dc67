"""ONNX's own backend tests through the importer: the number that passes does not fall. docs/onnx.md has the table."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "onnx_operators.py"
EVERY_40TH, ALL = 30, 1298  # raise them when more pass


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("onnx_operators", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "onnx_operators", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("every", "least"),
    [pytest.param(40, EVERY_40TH, marks=pytest.mark.long(share=1)), pytest.param(1, ALL, marks=pytest.mark.long(share=1000))],
    ids=["sample", "all"],
)
def test_as_many_of_onnx_own_tests_pass_as_before(operators: Any, every: int, least: int) -> None:
    reasons = [operators.attempt(case) for case in list(operators.cases())[::every]]
    assert sum(not why for why in reasons) >= least
