"""Dynamic int8: against the formula, against ONNX Runtime's own quantizer, in the kernels that it is for."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from hasten.compress import QuantizeDynamic
from hasten.core.data import View
from hasten.core.errors import Unsupported, UsageError
from hasten.core.network import Network
from hasten.core.recipe import Context
from hasten.engines import OnnxRuntime, OpenVINO
from hasten.load.lower import forward
from hasten.measure.counts import macs, parameters
from networks import lowered
from sketches import Sketch, attention, cnn, data, distance, in_onnxruntime, mlp


def dynamic(network: Network, engine: object = None, **settings: object) -> Network:
    view = View(inputs=network.example)
    profile = (engine or OnnxRuntime()).profile  # type: ignore[attr-defined]
    return QuantizeDynamic(**settings).apply(network, Context(train=view, calibrate=view, profile=profile))  # type: ignore[arg-type]


def of(model: onnx.ModelProto) -> Network:
    return Network(kind="graph", body=model, example=(data(model)[:4],))


def kernels(network: Network, folder: Path) -> set[str]:
    """What ONNX Runtime really runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(folder / "run.onnx")
    onnxruntime.InferenceSession(network.graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return {n.op_type for n in onnx.load(folder / "run.onnx").graph.node}


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_product_against_the_formula(per_channel: bool) -> None:
    """y = s_x · s_w · (q_x − z) q_w + b with the range of this very batch. Seven bits, which no processor saturates."""
    s = Sketch("n", 12)
    model = s.done(s.gemm("x", 12, 5))
    weight, bias = (numpy_helper.to_array(i) for i in model.graph.initializer)
    for x in (data(model)[:7], data(model)[7:9] * 3):
        step = np.float32((max(float(x.max()), 0) - min(float(x.min()), 0)) / 255)
        zero = np.round(-float(x.min()) / step)
        q_x = np.clip(np.round(x / step) + zero, 0, 255)
        steps = (np.abs(weight).max(1) if per_channel else np.abs(weight).max()) / 63
        q_w = np.round(weight / (steps[:, None] if per_channel else steps))
        naive = step * steps * ((q_x - zero) @ q_w.T) + bias
        got = in_onnxruntime(dynamic(of(model), weight_bits=7, per_channel=per_channel).graph, x)[0]
        np.testing.assert_allclose(got, naive, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mlp", "lstm", "encoder", "transformer", "shared"])
def test_outputs_stay_near_and_any_batch_is_taken(name: str) -> None:
    network = lowered(name)
    before = network.graph.SerializeToString()
    made = dynamic(network, weight_bits=7)
    assert network.graph.SerializeToString() == before
    old = [np.asarray(a) for a in forward(network, network.example)]
    assert distance(old, list(forward(made, network.example))) < 0.03
    one = tuple(a[:1] for a in network.example)
    assert distance(list(forward(network, one)), list(forward(made, one))) < 0.03
    tied = 320 if name == "transformer" else 0  # its embedding stays in floats, its head is integers
    assert parameters(made) == parameters(network) + tied
    assert macs(made) == macs(network)


@pytest.mark.parametrize(("name", "kernel"), [("mlp", "DynamicQuantizeMatMul"), ("lstm", "DynamicQuantizeLSTM")])
def test_the_integer_kernels_run(name: str, kernel: str, tmp_path: Path) -> None:
    found = kernels(dynamic(lowered(name)), tmp_path)
    assert kernel in found
    assert not found & {"MatMul", "Gemm", "LSTM", "MatMulInteger", "DynamicQuantizeLinear"}


@pytest.mark.parametrize("name", ["mlp", "lstm", "encoder"])
@pytest.mark.parametrize("reduce_range", [True, False])
def test_against_onnxruntimes_own_quantizer(name: str, reduce_range: bool, tmp_path: Path) -> None:
    """The same integers in 8 bits; with a reduced range theirs end at 64 and ours at 63."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from hasten.compress.quantize.normalise import normalise

    network = lowered(name)
    logging.disable(logging.WARNING)
    try:
        quantize_dynamic(
            normalise(network.graph).model(), tmp_path / "theirs.onnx", op_types_to_quantize=["MatMul", "LSTM"],
            per_channel=True, reduce_range=reduce_range, weight_type=QuantType.QInt8,
        )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)
    theirs = network.with_body(onnx.load(tmp_path / "theirs.onnx"))
    ours = dynamic(network, weight_bits=7 if reduce_range else 8)
    old, a, b = (list(forward(n, network.example)) for n in (network, ours, theirs))
    if reduce_range:
        assert distance(old, a) < 1.6 * distance(old, b)
    else:
        assert distance(b, a) < 1e-5
    assert ours.graph.ByteSize() < 1.15 * theirs.graph.ByteSize()


def test_kept_and_other_layers_stay_in_floats() -> None:
    model = attention()
    network = of(model)
    names = [n.name for n in model.graph.node if n.op_type == "MatMul"]
    made = dynamic(network, keep=(names[0], "n1[0-9]"))
    kinds = {n.name: n.op_type for n in made.graph.graph.node}
    assert kinds[names[0]] == "MatMul"
    assert all(kind != "MatMulInteger" for name, kind in kinds.items() if name.startswith("n1") and len(name) == 3)
    assert "MatMulInteger" in kinds.values()


def test_a_weight_that_an_embedding_reads_too_is_not_turned() -> None:
    """The head of this transformer is its embedding."""
    made = dynamic(lowered("transformer"), weight_bits=7)
    assert distance(list(forward(lowered("transformer"), lowered("transformer").example)), list(forward(made, made.example))) < 0.03


def test_the_profile_tells_the_bits() -> None:
    made = dynamic(of(mlp()))
    top = 2 ** (OnnxRuntime().profile.weight_bits - 1) - 1
    weights = [numpy_helper.to_array(i) for i in made.graph.graph.initializer if i.data_type == TensorProto.INT8 and len(i.dims) == 2]
    assert {int(np.abs(w).max()) for w in weights} == {top}


def test_refusals() -> None:
    with pytest.raises(Unsupported, match="needs an engine that finds ranges while running, such as OnnxRuntime"):
        dynamic(of(mlp()), OpenVINO())
    with pytest.raises(Unsupported, match="needs a layer with constant float32 weights among Gemm, LSTM, MatMul"):
        dynamic(of(no_product()))
    with pytest.raises(Unsupported, match="computes in integers already"):
        dynamic(dynamic(of(cnn())))
    with pytest.raises(UsageError, match="keep must name nodes of the graph, got 'nothing'; the nearest are"):
        dynamic(of(mlp()), keep=("nothing",))
    with pytest.raises(ValueError, match=r"weight_bits must be in \[2, 8\] or None, got 1"):
        QuantizeDynamic(weight_bits=1)


def no_product() -> onnx.ModelProto:
    s = Sketch("n", 3, 8, 8)
    return s.done(s.conv("x", 3, 4))


def test_gru_is_left_in_floats() -> None:
    made = dynamic(lowered("gru"))
    kinds = {n.op_type for n in made.graph.graph.node}
    assert {"GRU", "MatMulInteger"} <= kinds
