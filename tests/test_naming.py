"""Inputs that the data and the network both name are told apart by their names, whatever the order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten import prepare
from hasten.core.data import View
from hasten.core.errors import DataRefused
from hasten.load import files
from hasten.load.examples import Loaded
from hasten.load.graphs import Input
from hasten.load.lower import forward
from hasten.load.naming import arranged


class Minus(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left - 2 * right


LEFT, RIGHT = (np.random.default_rng(seed).normal(size=(20, 3)).astype(np.float32) for seed in (0, 1))


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, Path]:
    """The network as `.pt2` and `.onnx`; the data in either order."""
    found = {name: tmp_path / name for name in ("net.pt2", "net.onnx", "data.npz", "turned.npz")}
    example = tuple(map(torch.from_numpy, (LEFT, RIGHT)))
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(Minus().eval(), example, dynamic_shapes=({0: batch}, {0: batch}))
    torch.export.save(program, found["net.pt2"])
    graph = onnx.parser.parse_graph(
        "net (float[n, 3] left, float[n, 3] right) => (float[n, 3] out) <float two = {2}> { double = Mul(right, two)  out = Sub(left, double) }"
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9), found["net.onnx"])
    labels = (LEFT - 2 * RIGHT).argmax(1)
    np.savez(found["data.npz"], left=LEFT, right=RIGHT, y=labels)
    np.savez(found["turned.npz"], right=RIGHT, left=LEFT, y=labels)
    return found


@pytest.mark.parametrize("name", ["net.pt2", "net.onnx"])
def test_a_network_takes_the_inputs_by_their_names(saved: dict[str, Path], name: str) -> None:
    network = files.open_network(saved[name], (RIGHT, LEFT), ("right", "left"))
    np.testing.assert_allclose(forward(network, (RIGHT, LEFT))[0], LEFT - 2 * RIGHT, atol=1e-6)
    assert "the inputs are taken by their names, in the order of the data: right, left" in network.notes
    other = files.open_network(saved[name], (RIGHT, LEFT), ("a", "b"))
    np.testing.assert_allclose(forward(other, (RIGHT, LEFT))[0], RIGHT - 2 * LEFT, atol=1e-6)


@pytest.mark.parametrize("name", ["net.pt2", "net.onnx"])
@pytest.mark.parametrize("data", ["data.npz", "turned.npz"])
def test_evaluate_gives_the_same_for_either_order(saved: dict[str, Path], name: str, data: str) -> None:
    assert hasten.evaluate(str(saved[name]), str(saved[data])).score == 1.0


def test_the_proof_comes_in_the_order_of_the_data() -> None:
    data = Loaded(view=View(inputs=(LEFT, RIGHT)), names=("left", "right"))
    turned = Loaded(view=View(inputs=(RIGHT, LEFT), labels=np.arange(20)), names=("right", "left"))
    found = arranged(turned, data.names)
    assert found.view.inputs[0] is LEFT
    assert found.view.labels is turned.view.labels
    assert arranged(turned, ("a", "b")) is turned


def test_data_is_read_in_the_order_that_is_known(saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words: dict[str, Any] = {"run": str(tmp_path), "target": None, "group": None}
    prepare.read_whole(data=str(saved["turned.npz"]), classes=[], inputs=["left", "right"], **words)
    np.testing.assert_array_equal(View.load(tmp_path / "views" / "train").inputs[0], LEFT)
    np.savez(tmp_path / "prove.npz", right=RIGHT + 10, left=LEFT + 10, y=np.arange(20) % 3)
    cut = []
    monkeypatch.setattr("hasten.load.split.seal", lambda parts, run: cut.append(parts))
    prepare.read_and_cut(data=str(saved["data.npz"]), prove=str(tmp_path / "prove.npz"), seed=0, max_drop=0.01, **words)
    assert {*cut[0].prove.inputs[0][:, 0].tolist()} <= {*(LEFT + 10)[:, 0].tolist()}


@pytest.mark.parametrize(
    ("shape", "dtype", "array", "way"),
    [
        ((None, 12), np.int64, np.zeros((4, 12), np.int32), r"store it as int64"),
        ((None, 3, 8, 8), np.float32, np.zeros((4, 8, 8, 3), np.uint8), r"transpose\(0, 3, 1, 2\), in floats and scaled"),
        ((None, 1, 8, 8), np.float32, np.zeros((4, 8, 8), np.float32), r"array\[:, None\]"),
        ((None, 1, 8, 8), np.float32, np.zeros((4, 1, 8, 8), np.uint8), r"turn the pixels into floats"),
        ((None, 20), np.float32, np.zeros((4, 21), np.float32), r"1 columns too many"),
    ],
)
def test_what_does_not_fit_is_told_with_a_way_out(shape: tuple[int | None, ...], dtype: type, array: np.ndarray, way: str) -> None:
    from hasten.load.fitting import fitted

    with pytest.raises(DataRefused, match=way):
        fitted((Input(name="x", shape=shape, dtype=np.dtype(dtype)),), (shape,), None, (array,))
