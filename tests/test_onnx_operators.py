"""ONNX's own backend tests through the importer: the number that passes does not fall. docs/onnx.md has the table."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hasten.core.network import Network
from hasten.load import files

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "onnx_operators.py"
EVERY_40TH, ALL = 30, 1302  # raise them when more pass


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


def test_a_deformed_convolution_is_a_sampling_and_a_convolution(operators: Any) -> None:
    cases = [c for c in operators.cases() if c.operator == "DeformConv"]
    assert len(cases) == 4
    assert [operators.attempt(case) for case in cases] == [""] * 4


def test_a_deformed_convolution_takes_any_batch_and_settings() -> None:
    """Strides, distances, groups and an offset that is itself computed; held against ONNX Runtime on two batches and two sizes."""
    draw = np.random.default_rng(0)
    shapes = {"v": (36, 4, 3, 2), "w": (6, 2, 3, 3), "b": (6,)}
    weights = {name: draw.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    steps = {"strides": [2, 1], "dilations": [1, 2], "pads": [1, 2, 1, 2]}
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["offset"], strides=[2, 1], pads=[1, 0, 1, 1]),
        helper.make_node("DeformConv", ["x", "w", "offset", "b"], ["y"], group=2, offset_group=2, **steps),
    ]
    x = draw.normal(size=(2, 4, 9, 8)).astype(np.float32)
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 9, "width"]), helper.make_tensor_value_info("y", 1, None)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(w, n) for n, w in weights.items()])
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    found = files.imported(Network(kind="graph", body=model, example=(x,), open_axes=((3,),)))
    assert found.kind == "module", found.notes
    assert sum(type(m).__name__ == "Conv2d" for m in found.module.modules()) == 2
