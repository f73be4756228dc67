"""Where the time goes: what a layer's time is made of, what the engine's nodes are brought back to, and what is concluded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from hasten import advice, inspecting
from hasten.core.errors import UsageError
from hasten.core.network import Network
from hasten.engines import profiling
from hasten.load.source import Source
from hasten.measure import layers, machine
from hasten.measure.layers import Ceiling, Layer, LayerTimes
from networks import lowered, network

CEILING = Ceiling(float_macs_per_s=1e9, integer_macs_per_s=4e9, bytes_per_s=1e9)


def layer(
    ms: float, *, kind: str = "Conv", macs: int | None = 1_000_000, moved: int = 1000, integers: bool = False, parameters: int = 10
) -> Layer:
    floor, bound = (None, None) if macs is None else CEILING.floor_ms(macs, moved, integers=integers)
    return Layer(
        name=f"n{ms}",
        module="a.b",
        kind=kind,
        nodes=("n", "m"),
        shape=(1, 64),
        parameters=parameters,
        macs=macs,
        moved_bytes=moved,
        integers=integers,
        ms=ms,
        share=ms / 4,
        floor_ms=floor,
        bound=bound,
    )


def times(*rows: Layer, rest_ms: float = 0.0, threads: int = 1) -> LayerTimes:
    return LayerTimes(
        engine="OnnxRuntime",
        threads=threads,
        batch=1,
        call_ms=4.0,
        rest_ms=rest_ms,
        calls=10,
        profiler_ms=0.001,
        ceiling=CEILING,
        layers=rows,
    )


@pytest.fixture(scope="module")
def measured() -> LayerTimes:
    return profiling.layer_times(lowered("cnn"), batch=4, threads=1)


def test_layers_add_up_to_the_call(measured: LayerTimes) -> None:
    assert sum(x.ms for x in measured.layers) + measured.rest_ms == pytest.approx(measured.call_ms, rel=1e-6)
    assert sum(x.share for x in measured.layers) <= 1 + 1e-6
    assert (measured.batch, measured.threads) == (4, 1)


def test_every_node_is_in_one_layer_and_convolutions_carry_their_activations(measured: LayerTimes) -> None:
    found = [n for x in measured.layers for n in x.nodes]
    assert sorted(found) == sorted(n.name for n in lowered("cnn").graph.graph.node)
    first = measured.layers[0]
    assert (first.kind, first.module, len(first.nodes)) == ("Conv", "0", 2)
    assert first.shape == (4, 16, 16, 16)
    assert first.macs == 4 * 16 * 16 * 16 * 27
    assert first.parameters == 16 * 27 + 16
    assert first.moved_bytes == 4 * (4 * 3 * 256 + 4 * 16 * 256 + 16 * 27 + 16)


def test_layer_times_come_back_from_their_json(measured: LayerTimes) -> None:
    assert LayerTimes.from_json(json.loads(json.dumps(measured.to_json()))) == measured
    assert set(measured.by_module()) >= {"0", "4", "9"}


def test_a_slow_layer_is_found() -> None:
    """A product of 512 × 512 matrices beside one of 8 × 8: the first takes nearly all the time."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n)
        for s, n in (((8, 512), "a"), ((512, 512), "b"), ((512, 8), "c"))
    ]
    nodes = [helper.make_node("MatMul", [i, w], [o]) for i, w, o in (("x", "a", "p"), ("p", "b", "q"), ("q", "c", "y"))]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 8]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    found = profiling.layer_times(Network(kind="graph", body=model, example=(np.ones((2, 8), np.float32),)), batch=64, threads=1)
    assert [x.name for x in found.layers] == ["MatMul_0", "MatMul_1", "MatMul_2"]
    assert found.layers[1].share > 0.6
    assert all(n.name == "" for n in model.graph.node)  # the user's graph is left alone


def graph(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "g", [], [])


def test_what_was_fused_goes_where_its_work_went() -> None:
    """A convolution into its activation; quantizers into the operator that gives their tensor; an addition into a blocked convolution."""
    node = helper.make_node
    given = graph(
        node("DequantizeLinear", ["q"], ["d"], "dq"),
        node("Conv", ["d", "w"], ["c"], "conv"),
        node("Relu", ["c"], ["r"], "relu"),
        node("Conv", ["r", "v"], ["e"], "second"),
        node("Add", ["e", "r"], ["s"], "add"),
        node("Relu", ["s"], ["y"], "last"),
    )
    optimized = graph(
        node("Conv", ["q", "w2"], ["reorder_token_1"], "r_nchwc"),
        node("Conv", ["reorder_token_1", "v2", "", "reorder_token_1"], ["reorder_token_2"], "e_nchwc"),
        node("ReorderOutput", ["reorder_token_2"], ["y"], "ReorderOutput"),
    )
    assert profiling._anchors(given, optimized) == [2, 3, 5]
    assert profiling._groups(given, optimized) == {2: [0, 1, 2], 3: [3, 4], 5: [5]}


@pytest.mark.parametrize(
    ("scopes", "module"),
    [("['', 'body', 'body.0', 'linear']", "body.0"), ("['']", None), ("nonsense(", None), ("['', '_empty_hook', 'x']", None), ("3", None)],
)
def test_the_module_is_what_the_exporter_wrote(scopes: str, module: str | None) -> None:
    node = helper.make_node("MatMul", ["x", "val_3"], ["y"])
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    assert profiling._module(node) == module
    node.input[1] = "head.weight"
    assert profiling._module(node) == "head"


def test_bandwidth_is_that_of_a_machine() -> None:
    assert 1e8 < layers.bytes_per_s(1 << 20) < 1e13


def words(found: tuple[advice.Hint, ...], start: str) -> advice.Hint:
    return next(h for h in found if h.method.startswith(start))


def test_advice_on_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_int8_dot", lambda: False)
    monkeypatch.setattr(machine, "has_bf16", lambda: False)
    found = advice.advice(times(layer(2.0), layer(2.0, kind="LSTM")))
    assert [h.pays for h in found[:2]] == ["likely", "likely"]
    assert words(found, "int8").saves == pytest.approx(0.5 * 0.75)
    assert "no VNNI" in words(found, "int8").why
    assert words(found, "fewer channels").saves == pytest.approx(0.75)
    assert words(found, "bfloat16").pays == words(found, "single zeros").pays == "hardly"
    monkeypatch.setattr(machine, "has_bf16", lambda: True)
    assert words(advice.advice(times(layer(4.0))), "bfloat16").saves == pytest.approx(0.5)


def test_integers_do_not_pay_twice_nor_where_the_time_is_not_in_the_arithmetic() -> None:
    assert words(advice.advice(times(layer(2.0, integers=True), layer(2.0))), "int8").pays == "hardly"
    idle = advice.advice(times(layer(4.0, macs=1000, moved=10)))
    assert words(idle, "int8").pays == "hardly"
    assert words(idle, "fewer and fused").pays == "likely"


def test_advice_on_weights_and_on_shapes() -> None:
    waiting = layer(2.0, kind="Gemm", macs=1000, moved=1_000_000, parameters=240_000)
    found = advice.advice(times(waiting, dataclasses.replace(layer(2.0, kind="Slice", macs=0), shape=(1,)), threads=2))
    assert words(found, "weights in 8").saves == pytest.approx(0.75 * 0.5)
    assert words(found, "fixed sizes").saves == pytest.approx(0.5)
    assert "one thread" in words(found, "fewer and fused").why


def test_inspect_tells_it_in_three_forms(tmp_path: Path) -> None:
    onnx.save(lowered("cnn").graph, tmp_path / "net[b].onnx")
    found = inspecting.inspect(tmp_path / "net[b].onnx", threads=1)
    assert json.loads(json.dumps(found)) == found
    assert found["parameters"] > 0
    assert len(found["hints"]) == 7
    console = Console(width=120, record=True)
    inspecting.show(found, console)
    shown = console.export_text()
    assert "What is likely to pay" in shown
    assert "net[b].onnx" in shown
    inspecting.write_page(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Layer by layer" in page
    assert "<script" not in page


def test_inspect_refuses_before_it_opens_anything(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        inspecting.inspect(tmp_path / "nowhere.onnx")
    with pytest.raises(UsageError, match="at least 1 and threads at least 0, got 0 and 0"):
        inspecting.inspect(tmp_path, batch=0)


def test_what_cannot_be_lowered_is_counted_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.core.errors import Unsupported
    from hasten.load import lower

    def refuse(network: Network) -> Network:
        raise Unsupported("no such operator")

    monkeypatch.setattr(lower, "lower", refuse)
    torch.export.save(torch.export.export(network("mlp").module, (torch.from_numpy(network("mlp").example[0]),)), tmp_path / "mlp.pt2")
    found = inspecting._look(model=Source.of(tmp_path / "mlp.pt2").to_json(), data=None, batch=1, threads=1)
    assert (found["times"], found["reason"], found["hints"]) == (None, "no such operator", [])
    console = Console(width=80, record=True)
    inspecting.show({"model": "mlp.pt2", **found, "environment": {}}, console)
    assert "no times: no such operator" in console.export_text()
