"""Parameters and multiply-accumulates, against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from hasten.core.network import Network
from hasten.load.files import summarize
from hasten.measure.counts import macs, parameters
from networks import NETWORKS, QUICK, lowered, network

CASES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in NETWORKS]
# Folding a BatchNorm into the convolution before it takes 2·channels numbers away, and a bias of that size comes where none was.
# Rows of a position table that a constant looks up stay, the others go.
FOLDED = {
    "bert": -160,
    "albert": -80,
    "cnn": -80,
    "resnet": -64,
    "mobilenet": -128,
    "unet": -8,
    "dilated": -48,
    "two inputs": -32,
    "two outputs": -16,
}


def module(body: nn.Module, *shapes: tuple[int, ...], fixed_batch: int | None = None) -> Network:
    example = tuple(np.ones(s, np.float32) for s in shapes)
    return Network(kind="module", body=body.eval(), example=example, fixed_batch=fixed_batch)


def first(layer: nn.Module) -> nn.Module:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    return First()


BY_HAND = {
    "linear": (lambda: module(nn.Linear(20, 30), (4, 20)), 20 * 30 + 30, 20 * 30),
    "linear over time": (lambda: module(nn.Linear(20, 30), (4, 7, 20)), 20 * 30 + 30, 7 * 20 * 30),
    "convolution": (lambda: module(nn.Conv2d(3, 8, 3, stride=2, padding=1), (4, 3, 16, 16)), 3 * 8 * 9 + 8, 8 * 8 * 8 * 27),
    "depthwise": (lambda: module(nn.Conv2d(6, 6, 3, groups=6, bias=False), (2, 6, 8, 8)), 54, 6 * 6 * 6 * 9),
    "transposed": (lambda: module(nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 5)), 4 * 6 * 4 + 6, 5 * 5 * 4 * 6 * 4),
    "dilated": (lambda: module(nn.Conv1d(4, 5, 3, dilation=2), (2, 4, 20)), 4 * 5 * 3 + 5, 16 * 5 * 12),
    "lstm": (lambda: module(first(nn.LSTM(6, 8, batch_first=True)), (2, 9, 6)), 4 * 8 * (6 + 8 + 2), 9 * 4 * 8 * (6 + 8)),
    "gru, two ways": (
        lambda: module(first(nn.GRU(6, 8, batch_first=True, bidirectional=True)), (2, 9, 6)),
        2 * 3 * 8 * (6 + 8 + 2),
        2 * 9 * 3 * 8 * (6 + 8),
    ),
    "fused attention": (
        lambda: module(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (2, 7, 16)),
        4 * (16 * 16 + 16) + 2 * 16 * 32 + 32 + 16 + 4 * 16,
        7 * 4 * 16 * 16 + 2 * 7 * 7 * 16 + 2 * 7 * 16 * 32,
    ),
    "no product": (lambda: module(nn.ReLU(), (2, 5)), 0, 0),
    "fixed batch": (lambda: module(nn.Linear(20, 30), (4, 20), fixed_batch=4), 630, 600),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_modules_against_numbers_by_hand(case: str) -> None:
    build, numbers, products = BY_HAND[case]
    assert parameters(build()) == numbers
    assert macs(build()) == products


@pytest.mark.parametrize("name", CASES)
def test_a_module_and_its_graph_agree(name: str) -> None:
    assert macs(lowered(name)) == macs(network(name)) > 0
    assert parameters(lowered(name)) == parameters(network(name)) + FOLDED.get(name, 0)
    assert summarize(network(name))["parameters"] == parameters(network(name))


def test_counting_leaves_torch_as_it_was() -> None:
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    macs(network("encoder"))
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled) == before


class Vectors(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.mv(x, x[0])


class Breaking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("no")


@pytest.mark.parametrize("body", [Vectors(), Breaking()])
def test_what_cannot_be_counted_is_none(body: nn.Module) -> None:
    assert macs(module(body, (3, 3))) is None


def graph(nodes: Sequence[Any], weights: dict[str, np.ndarray[Any, Any]], shape: tuple[int, ...], *, domain: str = "") -> Network:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape[1:]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    inner = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(a, n) for n, a in weights.items()])
    opsets = [helper.make_opsetid("", 18), *([helper.make_opsetid(domain, 1)] if domain else [])]
    model = helper.make_model(inner, opset_imports=opsets, ir_version=9)
    return Network(kind="graph", body=model, example=(np.ones(shape, np.float32),))


def array(*shape: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.ones(shape, dtype)


def scalar(dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.ones((), dtype)


def test_an_integer_graph_counts_as_its_float_one() -> None:
    """Q/DQ around a Conv with 8-bit weights, one scale per channel: scales and zero points are no parameters."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("Conv", ["xd", "wd", "b"], ["y"]),
    ]
    weights = {"s": scalar(), "z": scalar(np.uint8), "w": array(8, 3, 3, 3, dtype=np.int8), "ws": array(8)}
    given = graph(nodes, {**weights, "wz": array(8, dtype=np.int8), "b": array(8)}, (2, 3, 6, 6))
    assert parameters(given) == 8 * 27 + 8
    assert macs(given) == 4 * 4 * 8 * 27


def test_integer_operators() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("QLinearMatMul", ["xq", "s", "z", "w", "s", "wz", "s", "z"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "s", "z"], ["y"]),
    ]
    weights = {"s": scalar(), "z": scalar(np.uint8), "w": array(5, 7, dtype=np.int8), "wz": scalar(np.int8)}
    given = graph(nodes, weights, (2, 5))
    assert parameters(given) == 35
    assert macs(given) == 35


def test_weights_in_constant_nodes_and_shared_weights_count_once() -> None:
    nodes = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(array(5, 5))),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["h", "w"], ["i"]),
        helper.make_node("Gemm", ["i", "v", "c"], ["y"], transB=1),
    ]
    given = graph(nodes, {"v": array(1, 5), "c": array(1)}, (3, 5))
    assert parameters(given) == 25 + 5 + 1
    assert macs(given) == 25 + 25 + 5


def test_einsum_is_the_product_of_its_axes() -> None:
    given = graph([helper.make_node("Einsum", ["x", "w"], ["y"], equation="bij,jk->bik")], {"w": array(4, 6)}, (2, 3, 4))
    assert macs(given) == 3 * 4 * 6
    dots = graph([helper.make_node("Einsum", ["x", "w"], ["y"], equation="...j,jk->...k")], {"w": array(4, 6)}, (2, 3, 4))
    assert macs(dots) is None


def test_a_graph_that_cannot_be_counted_is_none() -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["t"])], "b", [], [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)]
    )
    branch = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    assert macs(graph([branch], {"c": scalar(np.bool_)}, (2, 3))) is None
    unknown = helper.make_node("Mystery", ["x"], ["y"], domain="somewhere")
    assert macs(graph([unknown], {}, (2, 3), domain="somewhere")) is None


def test_counting_leaves_the_graph_alone() -> None:
    given = lowered("cnn")
    before = given.graph.SerializeToString()
    macs(given), parameters(given)
    assert given.graph.SerializeToString() == before
    onnx.checker.check_model(given.graph)
