"""Zeros in front of a maximum count, in the module, in the exported graph and in a graph that is opened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from hasten.core.network import Network
from hasten.load.graphs import open_graph
from hasten.load.lower import forward, lower, run_graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_are_larger_than_what_is_negative(dtype: torch.dtype) -> None:
    negative = -torch.rand(2, 3, 8, 8, dtype=dtype) - 1
    network = Network(kind="module", body=nn.Sequential(nn.ZeroPad2d(1), nn.MaxPool2d(3, 2)).eval(), example=(negative.numpy(),))
    found = forward(lower(network), network.example)[0]
    np.testing.assert_array_equal(found, forward(network, network.example)[0])
    assert found.max() == 0


@pytest.mark.parametrize("value", ["none", "left out", "weight", "constant", "one"])
def test_so_they_are_in_a_file(value: str, tmp_path: Path) -> None:
    number = numpy_helper.from_array(np.float32(value == "one"), "value")
    inputs = {"none": ["x", "pads"], "left out": ["x", "pads", ""]}.get(value, ["x", "pads", "value"])
    nodes = [
        helper.make_node("Pad", inputs, ["wide"]),
        helper.make_node("MaxPool", ["wide"], ["y"], kernel_shape=[3, 3], strides=[2, 2]),
    ]
    weights = [numpy_helper.from_array(np.array([0, 0, 1, 1, 0, 0, 1, 1]), "pads")]
    if value == "constant":
        nodes.insert(0, helper.make_node("Constant", [], ["value"], value=number))
    elif len(inputs) > 2 and inputs[2]:
        weights.append(number)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 2, s, s]) for n, s in (("x", 8), ("y", 4))]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], weights), opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    )
    onnx.save(model, tmp_path / "given.onnx")
    found = run_graph(open_graph(tmp_path / "given.onnx"), (np.full((1, 2, 8, 8), -3, np.float32),))[0]
    assert (found[0, 0, 0] == (value == "one")).all()
    assert (found[0, 0, 1:, 1:] == -3).all()
