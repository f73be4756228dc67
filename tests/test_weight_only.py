"""Weight-only integers and 16-bit storage: against the formulas, against ONNX Runtime's quantizer, and in the size that engines pack."""

from __future__ import annotations

import logging
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from hasten.compress import QuantizeStatic, QuantizeWeights, StoreHalf
from hasten.compress.quantize.weights import in_blocks
from hasten.core.data import View
from hasten.core.errors import Unsupported
from hasten.core.network import Network
from hasten.core.recipe import Context, Profile, Step
from hasten.engines import OnnxRuntime, OpenVINO
from hasten.load.lower import forward
from hasten.measure.counts import macs, parameters
from networks import lowered
from sketches import ENGINES, Sketch, attention, cnn, data, distance, gated, in_onnxruntime, in_openvino, mlp
from test_dynamic import kernels

WAYS: tuple[Step, ...] = (
    QuantizeWeights(),
    QuantizeWeights(symmetric=False),
    QuantizeWeights(bits=4, block=16),
    QuantizeWeights(bits=4, symmetric=False),
    QuantizeWeights(integer_products=True),
    StoreHalf(),
    StoreHalf(format="bf16"),
)
NEAR = {8: 0.02, 4: 0.2}


def apply(step: Step, network: Network, profile: Profile | None = None) -> Network:
    view = View(inputs=network.example)
    return step.apply(network, Context(train=view, calibrate=view, profile=profile or OnnxRuntime().profile))


def of(model: onnx.ModelProto) -> Network:
    return Network(kind="graph", body=model, example=(data(model)[:4],))


@pytest.mark.parametrize("step", WAYS, ids=str)
@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm", "transformer", "unet"])
def test_outputs_stay_near_and_counts_stay_equal(name: str, step: Step) -> None:
    network = lowered(name)
    before = network.graph.SerializeToString()
    made = apply(step, network)
    assert network.graph.SerializeToString() == before
    assert distance(list(forward(network, network.example)), list(forward(made, network.example))) < NEAR[getattr(step, "bits", 8)]
    tied = 320 if name == "transformer" and isinstance(step, QuantizeWeights) and step._packs else 0  # its head is its embedding
    assert parameters(made) == parameters(network) + tied
    assert macs(made) == macs(network)


@pytest.mark.parametrize("step", [s for s in WAYS if not getattr(s, "integer_products", False)], ids=str)
@pytest.mark.parametrize("make", [cnn, gated, attention, mlp])
def test_openvino_gives_the_same(make, step: Step) -> None:  # type: ignore[no-untyped-def]
    made = apply(step, of(make()), OpenVINO().profile)
    x = data(make())[:3]
    assert distance(in_onnxruntime(made.graph, x), in_openvino(made.graph, x)) < 1e-5


def large() -> onnx.ModelProto:
    s = Sketch("n", 8, 12, 12)
    x = s("Relu", s.conv(s("Relu", s.conv("x", 8, 64)), 64, 64))
    return s.done(s.gemm(s("Flatten", x), 64 * 144, 32))


@pytest.mark.parametrize("engine", [OnnxRuntime(threads=1), OpenVINO(threads=1)], ids=lambda e: type(e).__name__)
def test_what_engines_pack_is_smaller(engine, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    network = of(large())

    def size(made: Network, name: str) -> int:
        (tmp_path / name).mkdir()
        engine.pack(made, tmp_path / name)
        return sum(f.stat().st_size for f in (tmp_path / name).iterdir())

    whole = size(network, "whole")
    for i, (step, share) in enumerate(((StoreHalf(), 0.52), (StoreHalf(format="bf16"), 0.52), (QuantizeWeights(), 0.27))):
        assert size(apply(step, network, engine.profile), str(i)) < share * whole, step
    assert size(apply(QuantizeWeights(bits=4, block=128), network, engine.profile), "four") < 0.17 * whole


def test_convolutions_run_as_in_floats(tmp_path: Path) -> None:
    """ONNX Runtime widens at load, so that its blocked convolutions and packed products stay."""
    network = of(large())
    plain = kernels(network, tmp_path)
    for step in (QuantizeWeights(), QuantizeWeights(symmetric=False), StoreHalf(), StoreHalf(format="bf16")):
        assert kernels(apply(step, network), tmp_path) == plain, step


def test_eight_bits_against_the_formula() -> None:
    s = Sketch("n", 64)
    model = s.done(s.gemm("x", 64, 40))
    weight, bias = (numpy_helper.to_array(i).astype(np.float64) for i in model.graph.initializer)
    x = data(model)
    scale = np.abs(weight).max(1, keepdims=True) / 127
    got = in_onnxruntime(apply(QuantizeWeights(), of(model)).graph, x)[0]
    np.testing.assert_allclose(got, x @ (scale * np.round(weight / scale)).T + bias, atol=1e-5)
    low, high = np.minimum(weight.min(1, keepdims=True), 0), np.maximum(weight.max(1, keepdims=True), 0)
    step = (high - low) / 255
    zero = np.round(-low / step)
    rounded = step * (np.clip(np.round(weight / step) + zero, 0, 255) - zero)
    got = in_onnxruntime(apply(QuantizeWeights(symmetric=False), of(model)).graph, x)[0]
    np.testing.assert_allclose(got, x @ rounded.T + bias, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("inner", [96, 90])
def test_four_bits_against_the_formula(symmetric: bool, inner: int) -> None:
    """Blocks of 32 along the inputs; the last one may be short."""
    s = Sketch("n", inner)
    model = s.done(s.gemm("x", inner, 40))
    weight, bias = (numpy_helper.to_array(i).astype(np.float64) for i in model.graph.initializer)
    rounded = np.zeros_like(weight)
    for row in range(40):
        for at in range(0, inner, 32):
            block = weight[row, at : at + 32]
            if symmetric:
                step, zero = -block[np.abs(block).argmax()] / 8, 8.0
            else:
                step = (max(block.max(), 0) - min(block.min(), 0)) / 15
                zero = np.round(-min(block.min(), 0) / step)
            rounded[row, at : at + 32] = np.float32(step) * (np.clip(np.round(block / np.float32(step)) + zero, 0, 15) - zero)
    x = data(model)
    for profile, run in ((OnnxRuntime().profile, in_onnxruntime), (OpenVINO().profile, in_openvino)):
        got = run(apply(QuantizeWeights(bits=4, symmetric=symmetric), of(model), profile).graph, x)[0]
        np.testing.assert_allclose(got, x @ rounded.T + bias, atol=2e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [32, 128])
def test_four_bits_against_onnxruntimes_own_quantizer(symmetric: bool, block: int) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    s = Sketch("n", 256)
    model = s.done(s("MatMul", "x", s.weight(256, 48, scale=0.1)))
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    logging.disable(logging.INFO)
    theirs = MatMulNBitsQuantizer(copy, bits=4, block_size=block, is_symmetric=symmetric)
    theirs.process()
    logging.disable(logging.NOTSET)
    made = apply(QuantizeWeights(bits=4, block=block, symmetric=symmetric), of(model))
    x = data(model)
    old, ours, other = (in_onnxruntime(m, x) for m in (model, made.graph, theirs.model.model))
    assert distance(old, ours) <= 1.02 * distance(old, other)
    if symmetric:
        assert distance(ours, other) < 0.3 * distance(old, ours)


def test_blocks_of_zeros_and_of_one_sign() -> None:
    weight = np.zeros((2, 32), dtype=np.float32)
    weight[1] = np.linspace(1, 2, 32)
    for symmetric in (True, False):
        integers, scale, zeros = in_blocks(weight, bits=4, block=16, symmetric=symmetric)
        real = (integers.astype(float) - zeros[..., None]) * scale[..., None]
        assert not real[0].any()
        assert np.abs(real.reshape(2, -1) - weight).max() <= 0.5 * np.abs(scale).max() * 1.001


def test_a_layer_that_would_not_shrink_stays_and_a_kept_one_too() -> None:
    with pytest.raises(Unsupported, match="found no float32 weight that 8 bits would make smaller"):
        s = Sketch("n", 4)
        apply(QuantizeWeights(), of(s.done(s.gemm("x", 4, 3))))
    model = cnn()
    names = [n.name for n in model.graph.node if n.op_type == "Conv"]
    for step in (QuantizeWeights(keep=(names[0],)), StoreHalf(keep=(names[0],))):
        made = apply(step, of(model)).graph.graph
        constants = {i.name for i in made.initializer if i.data_type == TensorProto.FLOAT}
        kept = {n.name: n.input[1] in constants for n in made.node if n.op_type == "Conv"}
        assert kept == {names[0]: True, names[1]: False}


def test_a_shared_weight_is_stored_once() -> None:
    made = apply(QuantizeWeights(), lowered("shared")).graph.graph
    assert sum(i.data_type == TensorProto.INT8 for i in made.initializer) == 2


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_halves_against_the_formats(kind: str) -> None:
    """Rounded to the nearest, ties to even, as torch and ml_dtypes do; also next to the ends."""
    values = np.concatenate(
        [np.random.default_rng(0).normal(size=500), [0.0, -0.0, 1e-7, 65504.0, -3e-5, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11]]
    )
    weight = np.resize(values, (32, 16)).astype(np.float32)
    s = Sketch("n", 32)
    model = s.done(s("MatMul", "x", s.constant(weight)))
    made = apply(StoreHalf(format=kind), of(model)).graph  # type: ignore[arg-type]
    got = in_onnxruntime(made, np.eye(32, dtype=np.float32))[0]
    dtype, torch_type = (np.float16, torch.float16) if kind == "fp16" else (ml_dtypes.bfloat16, torch.bfloat16)
    np.testing.assert_array_equal(got, weight.astype(dtype).astype(np.float32))
    np.testing.assert_array_equal(got, torch.from_numpy(weight).to(torch_type).float().numpy())


def test_halves_of_an_integer_graph() -> None:
    """What static quantization kept in floats is stored in 16 bits; its scales are not touched."""
    model = cnn()
    network = of(model)
    view = View(inputs=(data(model),))
    context = Context(train=view, calibrate=view, profile=OnnxRuntime().profile)
    name = next(n.name for n in model.graph.node if n.op_type == "Gemm")
    made = QuantizeStatic(keep=(name,)).apply(network, context)
    halved = StoreHalf().apply(made, context)
    assert sum(i.data_type == TensorProto.FLOAT16 for i in halved.graph.graph.initializer) == 1
    x = data(model)[:4]
    for run in ENGINES.values():
        assert distance(run(made.graph, x), run(halved.graph, x)) < 1e-3


@pytest.mark.parametrize("step", [s for s in WAYS if isinstance(s, QuantizeWeights)], ids=str)
def test_halves_leave_the_scales_of_integers_alone(step: QuantizeWeights) -> None:
    network = lowered("lstm")
    made = apply(step, network)
    try:
        halved = apply(StoreHalf(), made)
    except Unsupported:
        return
    names = {i.name.removesuffix("_fp16") for i in halved.graph.graph.initializer if i.data_type == TensorProto.FLOAT16}
    assert names
    assert not {n for n in names if "scale" in n or "zero" in n}


@pytest.mark.parametrize(
    ("step", "settings", "words"),
    [
        (QuantizeWeights, {"bits": 5}, "bits must be 8 or 4, got 5"),
        (QuantizeWeights, {"bits": 4, "block": 48}, "block must be one of 16, 32, 64, 128, 256 or None, got 48"),
        (QuantizeWeights, {"block": 64}, "block needs bits=4 or integer_products=True: .* got 64"),
        (StoreHalf, {"format": "fp8"}, "format must be 'fp16' or 'bf16', got 'fp8'"),
    ],
)
def test_settings_are_checked(step: type[Step], settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        step(**settings)


def test_refusals() -> None:
    with pytest.raises(Unsupported, match="4-bit blocks need an engine with MatMulNBits"):
        apply(QuantizeWeights(bits=4), of(mlp()), Profile())
    with pytest.raises(Unsupported, match="integer_products needs an engine that finds ranges while running"):
        apply(QuantizeWeights(bits=4, integer_products=True), of(mlp()), OpenVINO().profile)
    with pytest.raises(Unsupported, match="computes in integers already"):
        context = Context(train=View(inputs=(data(cnn()),)), calibrate=View(inputs=(data(cnn()),)), profile=OnnxRuntime().profile)
        QuantizeWeights().apply(QuantizeStatic().apply(of(cnn()), context), context)
    s = Sketch("n", 32)
    big = s.done(s("MatMul", "x", s.constant(np.full((32, 32), 1e5, dtype=np.float32))))
    with pytest.raises(Unsupported, match=r"fp16 ends at 65504, but a weight of 'n0' is 1e\+05; bf16 holds it"):
        apply(StoreHalf(), of(big))
    apply(StoreHalf(format="bf16"), of(big))
    with pytest.raises(Unsupported, match="found no float32 weight that fp16 would make smaller"):
        apply(StoreHalf(), apply(StoreHalf(), of(mlp())))
