"""ONNX graphs whose batch is not in front, inputs that are pinned, and sizes that stay open."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from hasten.core.errors import ModelRefused, UsageError
from hasten.load.files import open_network
from hasten.load.lower import forward
from hasten.load.source import Source
from networks import equal

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64
DRAW = np.random.default_rng(0)
X, STATE = DRAW.standard_normal((4, 5)).astype(np.float32), DRAW.standard_normal((4, 2, 3)).astype(np.float32)
W = DRAW.standard_normal((5, 3)).astype(np.float32)


def write(path: Path, *, inside_if: bool = False) -> Path:
    """y = x @ w, new state = state · y / rate, with the state as (2, batch, 3) and a rate of no axes."""
    product = helper.make_node("Mul", ["state", "y"], ["scaled"])
    if inside_if:
        branch = helper.make_graph(
            [helper.make_node("Mul", ["state", "y"], ["inner"])], "b", [], [helper.make_tensor_value_info("inner", FLOAT, None)]
        )
        product = helper.make_node("If", ["yes"], ["scaled"], then_branch=branch, else_branch=branch)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        product,
        helper.make_node("Cast", ["rate"], ["by"], to=FLOAT),
        helper.make_node("Div", ["scaled", "by"], ["new"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", FLOAT, ["batch", 5]),
        helper.make_tensor_value_info("state", FLOAT, [2, "batch", 3]),
        helper.make_tensor_value_info("rate", INT, []),
    ]
    outputs = [helper.make_tensor_value_info("y", FLOAT, ["batch", 3]), helper.make_tensor_value_info("new", FLOAT, [None, None, None])]
    weights = [onnx.numpy_helper.from_array(W, "w"), onnx.numpy_helper.from_array(np.array(True), "yes")]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize("inside_if", [False, True])
def test_a_state_is_turned_and_a_rate_pinned(tmp_path: Path, inside_if: bool) -> None:
    path = write(tmp_path / "m.onnx", inside_if=inside_if)
    network = open_network(Source.of(path, pins={"rate": 4}), (X, STATE))
    y = X @ W
    assert network.kind == "module"
    assert network.fixed_batch is None
    assert equal(forward(network, (X, STATE)), (y, STATE * y[:, None] / 4))
    assert network.notes == (
        "the batch of input state is its axis 1 in the file and its first here",
        "the batch of output new is its axis 1 in the file and its first here",
    )


def test_what_cannot_be_pinned(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx")
    with pytest.raises(ModelRefused, match=r"got rate, which is none; where it is no data, pin it: --pin rate=NUMBER"):
        open_network(path, (X, STATE))
    with pytest.raises(UsageError, match=r"no input is named 'rat'; the inputs are x, state, rate"):
        open_network(Source.of(path, pins={"rat": 4}), (X, STATE))
    (tmp_path / "net.py").write_text("")
    with pytest.raises(UsageError, match="can be pinned, not those of"):
        open_network(Source.of(f"{tmp_path}/net.py:Net", pins={"rate": 4}), (X,))


def test_a_graph_that_takes_one_row_whatever_it_says(tmp_path: Path) -> None:
    inputs = [helper.make_tensor_value_info("x", FLOAT, ["batch", 5])]
    shape = onnx.numpy_helper.from_array(np.array([1, 5]), "shape")
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", FLOAT, [None, 5])], [shape])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "m.onnx")
    network = open_network(tmp_path / "m.onnx", (X,))
    assert network.fixed_batch == 1
    assert "the file leaves its batch open and takes one example only" in network.notes


@pytest.mark.parametrize(
    ("kind", "given"),
    [(TensorProto.INT8, np.int64), (TensorProto.UINT16, np.int64), (TensorProto.FLOAT16, np.float32), (TensorProto.DOUBLE, np.float32)],
)
def test_inputs_of_types_that_data_is_not_kept_in_take_ours(tmp_path: Path, kind: int, given: type) -> None:
    nodes = [helper.make_node("Cast", ["x"], ["f"], to=FLOAT), helper.make_node("MatMul", ["f", "w"], ["y"])]
    inputs, outputs = [helper.make_tensor_value_info("x", kind, ["n", 5])], [helper.make_tensor_value_info("y", FLOAT, ["n", 3])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [onnx.numpy_helper.from_array(W, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), tmp_path / "m.onnx")
    x = np.arange(20).reshape(4, 5).astype(given)
    network = open_network(tmp_path / "m.onnx", (x,))
    assert network.example[0].dtype == given
    np.testing.assert_allclose(forward(network, (x,))[0], x.astype(np.float32) @ W, rtol=1e-5)
    assert any(f"takes {np.dtype(given)} here" in note for note in network.notes)


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("batch", [1, "batch"])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_network_for_one_example_may_leave_the_batch_out_of_what_it_gives(tmp_path: Path, opset: int, batch: object, rows: int) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Reshape", ["y", "flat"], ["scores"]),
        helper.make_node("ReduceSum" if opset > 12 else "ReduceMax", ["y"], ["most"], keepdims=0),
    ]
    weights = [onnx.numpy_helper.from_array(W, "w"), onnx.numpy_helper.from_array(np.array([3]), "flat")]
    outputs = [helper.make_tensor_value_info("scores", FLOAT, [batch]), helper.make_tensor_value_info("most", FLOAT, [])]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", FLOAT, [batch, 5])], outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7), tmp_path / "m.onnx")
    network = open_network(Source.of(tmp_path / "m.onnx"), (X[:rows],))
    y = X[:1] @ W
    assert (network.kind, network.fixed_batch) == ("module", 1)
    assert equal(forward(network, (X[:1],)), (y, np.array([y.sum() if opset > 12 else y.max()])))
    assert "output scores has no axis for the batch in the file and one here" in network.notes
