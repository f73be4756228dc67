"""Laws of static quantization: every network × every profile."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from hasten.compress import QuantizeStatic
from hasten.compress.quantize.insert import Numbers, round_weights, scale_and_zero_point
from hasten.compress.quantize.normalise import normalise
from hasten.compress.quantize.observe import OBSERVERS
from hasten.compress.quantize.static import quantizable
from hasten.compress.quantize.wiring import Wiring
from hasten.core.data import View
from hasten.core.errors import DataRefused, Unsupported, UsageError
from hasten.core.network import Network
from hasten.core.recipe import Context, Profile, part_from_json, part_to_json
from hasten.engines import OnnxRuntime
from hasten.load.lower import lower
from sketches import (
    ENGINES,
    NETWORKS,
    PROFILES,
    Sketch,
    attention,
    cnn,
    compiled,
    data,
    distance,
    in_onnxruntime,
    mlp,
    mobile,
    quantize,
    residual,
)

EVERY = [pytest.param(n, p, id=f"{n}-{p}") for n in NETWORKS for p in PROFILES]


@pytest.mark.parametrize(("name", "profile"), EVERY)
def test_laws(name: str, profile: str) -> None:
    model = NETWORKS[name]()
    before = model.SerializeToString()
    quantized = quantize(model, PROFILES[profile])
    assert model.SerializeToString() == before, "the given graph was written on"
    assert quantize(model, PROFILES[profile]).SerializeToString() == quantized.SerializeToString(), "not deterministic"
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(quantized, strict_mode=True), full_check=True)
    assert [i.name for i in quantized.graph.input] == ["x"]
    assert [o.name for o in quantized.graph.output] == [o.name for o in model.graph.output]
    assert quantized.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "n", "the batch is no longer free"
    x = data(model)[:5]
    old = in_onnxruntime(model, x)
    for engine, run in ENGINES.items():
        assert distance(old, run(quantized, x)) < 0.05, engine
        assert run(quantized, x[:1])[0].shape[0] == 1


@pytest.mark.parametrize("name", ["cnn", "residual", "mobile", "mlp", "branches", "gated", "whole"])
def test_every_layer_runs_on_integers(name: str, tmp_path: Path) -> None:
    model = NETWORKS[name]()
    x = data(model)[:2]
    in_onnxruntime(quantize(model, PROFILES["onnxruntime"]), x, kept=tmp_path / "run.onnx")
    kinds = {n.op_type for n in onnx.load(tmp_path / "run.onnx").graph.node}
    assert not kinds & {"Conv", "Gemm", "MatMul", "GlobalAveragePool", "Relu", "Clip", "FusedConv"}, kinds
    runtime = compiled(quantize(model, PROFILES["openvino"])).get_runtime_model()
    found = {}
    for op in runtime.get_ordered_ops():
        facts = op.get_rt_info()
        found.setdefault(facts["layerType"].astype(str), set()).add(facts["runtimePrecision"].astype(str))
    layers = {kind: found[kind] for kind in ("Convolution", "FullyConnected", "Pooling") if kind in found}
    assert layers
    assert set().union(*layers.values()) <= {"u8", "i8"}, layers


@pytest.mark.parametrize("name", NETWORKS)
def test_normal_form_computes_the_same(name: str) -> None:
    model = NETWORKS[name]()
    normal = normalise(model).model()
    kinds = {n.op_type for n in normal.graph.node}
    assert not kinds & {"BatchNormalization", "Identity", "Dropout", "Constant"}
    x = data(model)[:5]
    assert distance(in_onnxruntime(model, x), in_onnxruntime(normal, x)) < 1e-6


def test_normal_form_of_older_exports() -> None:
    """Constant nodes, a transposed weight, MatMul + Add, a bias behind a convolution, ReduceMean with its axes as attribute."""
    s = Sketch("n", 3, 8, 8, opset=13)
    weight = numpy_helper.from_array(s.random.normal(size=(10, 8)).astype(np.float32))
    x = s("Add", s("Conv", "x", s.weight(8, 3, 3, 3)), s.weight(1, 8, 1, 1))
    x = s("ReduceMean", x, axes=[2, 3], keepdims=0)
    model = s.done(s("Add", s.weight(10), s("MatMul", x, s("Transpose", s("Constant", value=weight), perm=[1, 0]))))
    normal = normalise(model).model()
    assert [n.op_type for n in normal.graph.node] == ["Conv", "GlobalAveragePool", "Flatten", "Gemm"]
    x = data(model)[:5]
    assert distance(in_onnxruntime(model, x), in_onnxruntime(normal, x)) < 1e-6


def test_weights_are_stored_in_eight_bits() -> None:
    model = attention()
    quantized = quantize(model, PROFILES["onnxruntime"])
    weights = [i for i in quantized.graph.initializer if i.data_type == TensorProto.INT8 and len(i.dims) > 1]
    assert len(weights) == len(quantizable(model, PROFILES["onnxruntime"])) == 7
    assert all(np.abs(numpy_helper.to_array(w)).max() == 63 for w in weights)
    assert not [i for i in quantized.graph.initializer if i.data_type == TensorProto.FLOAT and np.prod(i.dims) > 64]
    assert quantized.ByteSize() < model.ByteSize() * 0.6


def test_weights_of_five_bits() -> None:
    quantized = quantize(mlp(), PROFILES["onnxruntime"], QuantizeStatic(weight_bits=5))
    weights = [i for i in quantized.graph.initializer if i.data_type == TensorProto.INT8 and len(i.dims) > 1]
    assert {np.abs(numpy_helper.to_array(w)).max() for w in weights} == {15}


def test_gemm_against_the_formula() -> None:
    """One layer, written out: y = s_x · s_w · (Σ (q_x − z) · q_w + q_b). Seven bits, which no processor saturates."""
    s = Sketch("n", 12)
    model = s.done(s.gemm("x", 12, 5))
    weight, bias = (numpy_helper.to_array(i) for i in model.graph.initializer)
    x = data(model)
    quantized = quantize(model, PROFILES["onnxruntime"], QuantizeStatic(weight_bits=7))
    step = np.float32((float(x.max()) - float(x.min())) / 255)
    zero = np.round(-float(x.min()) / float(step))
    steps = (np.abs(weight).max(1).astype(np.float64) / 63).astype(np.float32)
    q_x = np.clip(np.round(x / step) + zero, 0, 255)
    q_w, q_b = np.round(weight / steps[:, None]), np.round(bias.astype(np.float64) / (step * steps))
    naive = (step * steps) * ((q_x - zero) @ q_w.T + q_b)
    for run in ENGINES.values():
        np.testing.assert_allclose(run(quantized, x)[0], naive, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_wrong_zero_point_is_seen(engine: str) -> None:
    model = cnn()
    quantized = quantize(model, PROFILES["onnxruntime"])
    zero = next(i for i in quantized.graph.initializer if i.name == "x_zero_point")
    quantized.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(zero) - np.uint8(20), "wrong"))
    next(n for n in quantized.graph.node if n.name == "x_dequantize").input[2] = "wrong"
    x = data(model)[:5]
    assert distance(in_onnxruntime(model, x), ENGINES[engine](quantized, x)) > 0.05


def test_kept_layers_stay_in_floats() -> None:
    model, profile = residual(), PROFILES["onnxruntime"]
    names = quantizable(model, profile)
    kept = names[2:4]
    quantized = quantize(model, profile, QuantizeStatic(keep=kept))
    floats = {i.name for i in quantized.graph.initializer if i.data_type == TensorProto.FLOAT}
    assert {n.name for n in quantized.graph.node if n.name in names and n.input[1] in floats} == set(kept)
    x = data(model)[:5]
    old = in_onnxruntime(model, x)
    assert distance(old, in_onnxruntime(quantized, x)) < distance(old, in_onnxruntime(quantize(model, profile), x))


def test_passing_operators_keep_the_scale() -> None:
    quantized = quantize(cnn(), PROFILES["onnxruntime"])
    made = {out: n for n in quantized.graph.node for out in n.output}
    read = {name: n for n in quantized.graph.node for name in n.input}
    pool = next(n for n in quantized.graph.node if n.op_type == "MaxPool")
    assert list(made[pool.input[0]].input[1:]) == list(read[pool.output[0]].input[1:])


@pytest.mark.parametrize("name", NETWORKS)
def test_compiling_engines_get_each_range_once(name: str) -> None:
    """In front of what computes on integers, nowhere behind it: HardSwish reads the convolution, MaxPool hands on its range."""
    profile = PROFILES["openvino"]
    quantized = quantize(NETWORKS[name](), profile)
    made = {out: n for n in quantized.graph.node for out in n.output}
    for node in quantized.graph.node:
        maker = made.get(node.input[0])
        if node.op_type == "QuantizeLinear":
            assert maker is None or maker.op_type not in profile.passing_ops
        elif node.op_type in ("HardSwish", "LeakyRelu", "Sigmoid", "Softmax"):
            assert maker is None or maker.op_type != "DequantizeLinear"


def test_symmetric_activations_have_zero_point_zero() -> None:
    quantized = quantize(mobile(), PROFILES["openvino"])
    zeros = {i.name: numpy_helper.to_array(i) for i in quantized.graph.initializer if i.name.endswith("_zero_point")}
    assert {str(z.dtype) for z in zeros.values()} == {"int8", "uint8"}
    assert all(z == 0 for z in zeros.values())


def test_symmetric_activations_can_be_asked_for() -> None:
    quantized = quantize(residual(), PROFILES["onnxruntime"], QuantizeStatic(symmetric=True))
    zeros = [numpy_helper.to_array(i) for i in quantized.graph.initializer if i.name.endswith("_zero_point")]
    assert all(z == 0 for z in zeros)
    x = data(residual())[:5]
    assert distance(in_onnxruntime(residual(), x), in_onnxruntime(quantized, x)) < 0.05


def test_keep_takes_patterns() -> None:
    model, profile = residual(), PROFILES["onnxruntime"]
    one, all_ = (quantize(model, profile, QuantizeStatic(keep=k)) for k in (("n0",), ("n[0-4]",)))
    count = [sum(i.data_type == TensorProto.INT8 and len(i.dims) > 1 for i in m.graph.initializer) for m in (one, all_)]
    assert count[1] < count[0] == len(quantizable(model, profile)) - 1


def test_a_fixed_batch_is_respected() -> None:
    s = Sketch(4, 12)
    model = s.done(s.gemm("x", 12, 5))
    quantized = quantize(model, PROFILES["onnxruntime"], fixed_batch=4, view=View(inputs=(data(model, 10),)))
    assert in_onnxruntime(quantized, data(model, 4))[0].shape == (4, 5)
    with pytest.raises(DataRefused, match="at least 4 examples, got 3"):
        quantize(model, PROFILES["onnxruntime"], fixed_batch=4, view=View(inputs=(data(model, 3),)))


@pytest.mark.parametrize("observer", OBSERVERS)
def test_observers(observer: str) -> None:
    model = cnn()
    x = data(model)
    quantized = quantize(model, PROFILES["onnxruntime"], QuantizeStatic(observer=observer))  # type: ignore[arg-type]
    assert distance(in_onnxruntime(model, x), in_onnxruntime(quantized, x)) < 0.08


@pytest.mark.parametrize("observer", ["percentile", "mse", "entropy"])
def test_observers_cut_an_outlier(observer: str) -> None:
    values = np.append(np.random.default_rng(0).normal(size=1_000_000), 40.0)
    counts, edges = np.histogram(values, bins=2048)
    low, high = OBSERVERS[observer](counts, edges[0], edges[-1])
    assert edges[0] <= low < -2
    assert 3 < high < 35


@pytest.mark.parametrize("tail", [1.5, 3, 30])
def test_mse_observer_against_a_search_over_the_values(tail: float) -> None:
    values = np.random.default_rng(0).standard_t(tail, size=20_000)

    def error(low: float, high: float) -> float:
        step, zero = scale_and_zero_point(low, high, symmetric=False)
        return float(((np.clip(np.round(values / step) + zero, 0, 255) - zero) * step - values).__pow__(2).mean())

    counts, edges = np.histogram(values, bins=2048)
    least = min(error(f * edges[0], f * edges[-1]) for f in np.linspace(0.2, 1, 81))
    assert error(*OBSERVERS["mse"](counts, edges[0], edges[-1])) < 1.02 * least


def test_weights_of_an_empty_channel_and_a_large_bias() -> None:
    weight, bias = np.zeros((3, 4), dtype=np.float32), np.array([0.0, 5.0, 1e8], dtype=np.float32)
    integers, scale = round_weights(
        weight, bias, axis=0, input_scale=0.01, numbers=Numbers(weight_bits=8, per_channel=True, symmetric=False)
    )
    assert not integers.any()
    assert np.isfinite(scale).all()
    rounded = np.round(bias / (scale.astype(np.float64) * 0.01))
    assert np.abs(rounded).max() < 2**31
    np.testing.assert_allclose(rounded * scale * 0.01, bias, rtol=1e-6)


def test_per_tensor_weights_have_one_scale() -> None:
    quantized = quantize(residual(), PROFILES["onnxruntime"], QuantizeStatic(per_channel=False))
    assert not [i for i in quantized.graph.initializer if i.name.endswith("_scale") and i.dims]
    assert distance(in_onnxruntime(residual(), data(residual())), in_onnxruntime(quantized, data(residual()))) < 0.08


def test_layers_that_share_a_weight_share_its_integers() -> None:
    s = Sketch("n", 12)
    weight = s.weight(12, 12)
    model = s.done(s("Gemm", s("Relu", s("Gemm", "x", weight, transB=1)), weight, transB=1))
    quantized = quantize(model, PROFILES["onnxruntime"])
    assert sum(i.data_type == TensorProto.INT8 and list(i.dims) == [12, 12] for i in quantized.graph.initializer) == 1


def test_json_round_trip() -> None:
    step = QuantizeStatic(observer="mse", weight_bits=6, keep=("n3", "n4"))
    assert part_from_json(json.loads(json.dumps(part_to_json(step)))) == step


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"observer": "median"}, ValueError, "observer must be one of minmax, percentile, mse, entropy, got 'median'"),
        ({"weight_bits": 9}, ValueError, r"weight_bits must be in \[2, 8\] or None, got 9"),
        ({"rounding": "up"}, ValueError, "rounding must be 'nearest' or 'adaptive', got 'up'"),
        ({"keep": "n3"}, TypeError, "keep must be a tuple of node names"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        QuantizeStatic(**settings)  # type: ignore[arg-type]


def test_refusals() -> None:
    model, profile = cnn(), PROFILES["onnxruntime"]
    with pytest.raises(Unsupported, match="computes in integers already"):
        quantize(quantize(model, profile), profile)
    with pytest.raises(Unsupported, match="needs an engine that runs operators on integers"):
        quantize(model, Profile())
    with pytest.raises(Unsupported, match=r"constant float32 weights among LSTM; the graph has .*Conv"):
        quantize(model, Profile(integer_ops=frozenset({"LSTM"})))
    with pytest.raises(UsageError, match="keep must name nodes of the graph, got 'nothing'"):
        quantize(model, profile, QuantizeStatic(keep=("nothing",)))
    with pytest.raises(Unsupported, match="wants activations with zero point 0, but symmetric is False"):
        quantize(model, PROFILES["openvino"], QuantizeStatic(symmetric=False))
    with pytest.raises(DataRefused, match="at least 1 examples, got 0"):
        quantize(model, profile, view=View(inputs=(data(model, 0),)))
    with pytest.raises(Unsupported, match="expected finite activations"):
        quantize(model, profile, view=View(inputs=(data(model) * np.float32(np.inf),)))


def test_refuses_control_flow() -> None:
    s = Sketch("n", 12)
    branch = helper.make_graph(
        [helper.make_node("Identity", ["gemm0"], ["b"])], "b", [], [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)]
    )
    x = s.gemm("x", 12, 5)
    model = s.done(s("If", s.constant(np.array(True)), then_branch=branch, else_branch=branch))
    assert x == "gemm0"
    with pytest.raises(Unsupported, match="cannot quantize around control flow: 'n1'"):
        quantize(model, PROFILES["onnxruntime"])


def test_relu_keeps_its_own_pair_where_the_engine_does_not_fuse_it() -> None:
    profile = replace(PROFILES["onnxruntime"], fuses_relu=False)
    quantized = quantize(cnn(), profile)
    made = {out: n for n in quantized.graph.node for out in n.output}
    assert all(made[n.input[0]].op_type == "DequantizeLinear" for n in quantized.graph.node if n.op_type == "Relu")


def test_the_wires_are_looked_up_as_often_for_many_layers_as_for_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked up after each layer, a thousand layers took the time of their square."""
    counts = []
    for layers in (2, 8):
        module = nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(4, 4), nn.ReLU()))).eval()
        data = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)
        graph, view = lower(Network(kind="module", body=module, example=(data[:2],))), View(inputs=(data,))
        calls: list[None] = []
        with monkeypatch.context() as patch:
            real = Wiring.rewire
            patch.setattr(Wiring, "rewire", lambda self, real=real, calls=calls: (calls.append(None), real(self))[1])
            QuantizeStatic().apply(graph, Context(train=view, calibrate=view, profile=OnnxRuntime().profile))
        counts.append(len(calls))
    assert counts[0] == counts[1]
