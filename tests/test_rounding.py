"""How weights are rounded, biases corrected and ranges chosen, each against its formula written out."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from hasten.compress import QuantizeStatic
from hasten.compress.quantize import insert
from hasten.compress.quantize.adaptive import patches, round_rows
from hasten.compress.quantize.observe import OBSERVERS
from hasten.core.data import View
from hasten.core.network import Network
from hasten.core.recipe import Context, part_from_json
from sketches import PROFILES, Sketch, attention, cnn, data, distance, in_onnxruntime, mlp, mobile, quantize, residual

ONNXRUNTIME = PROFILES["onnxruntime"]


def error_of(weight: np.ndarray, scale: float, inputs: np.ndarray, integers: np.ndarray) -> float:
    """Mean over the inputs of the squared difference of one output."""
    return float(((inputs @ (weight - scale * integers)) ** 2).mean())


@pytest.mark.parametrize("seed", [2, 4, 6, 7])
def test_adaptive_rounding_against_all_choices(seed: int) -> None:
    """256 ways to round eight weights: the search finds the best or the second, never one worse than the nearest integers."""
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(60, 8)) @ random.normal(size=(8, 8)) + 0.5  # correlated, and not around zero
    weight, scale = random.normal(size=8), 0.4
    moment = inputs.T @ inputs / len(inputs)
    found = round_rows(weight[None, None], np.full((1, 1, 1), scale), moment[None], 7)[0, 0]
    low = np.floor(weight / scale)
    errors = sorted(error_of(weight, scale, inputs, low + np.array(up)) for up in itertools.product((0, 1), repeat=8))
    got = error_of(weight, scale, inputs, found)
    assert set(found - low) <= {0, 1}
    assert got <= errors[1] * (1 + 1e-9)
    assert got <= error_of(weight, scale, inputs, np.round(weight / scale))
    assert errors[1] < 0.7 * error_of(weight, scale, inputs, np.round(weight / scale)), "the example is too easy"


def test_adaptive_rounding_with_dead_inputs_and_a_full_range() -> None:
    weight = np.array([[[3.4, -3.4, 0.2, 9.0]]])
    assert np.abs(round_rows(weight, np.ones((1, 1, 1)), np.zeros((1, 4, 4)), 3)).max() == 3
    assert round_rows(weight, np.ones((1, 1, 1)), np.eye(4)[None], 7)[0, 0].tolist() == [3, -3, 0, 7]


@pytest.mark.parametrize(
    "facts",
    [
        {"pads": [1, 1, 1, 1]},
        {"pads": [0, 1, 2, 1], "strides": [2, 1]},
        {"dilations": [2, 1], "pads": [2, 1, 2, 1]},
        {"group": 2},
        {"group": 4, "strides": [2, 2]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"auto_pad": "SAME_LOWER"},
    ],
    ids=str,
)
def test_patches_are_what_a_convolution_sums_over(facts: dict[str, object]) -> None:
    groups = int(facts.get("group", 1))  # type: ignore[call-overload]
    s = Sketch("n", 4, 9, 8)
    model = s.done(s("Conv", "x", s.weight(8, 4 // groups, 3, 3), **facts))
    x = data(model, 3)
    weight = numpy_helper.to_array(model.graph.initializer[0]).reshape(groups, 8 // groups, -1)
    rows = patches(model.graph.node[0], x, (3, 3), groups, most=10**9)
    expected = in_onnxruntime(model, x)[0]  # (batch, channels, height, width)
    got = np.einsum("grk,gok->gor", rows, weight).reshape(8, 3, -1)
    np.testing.assert_allclose(got, np.moveaxis(expected.reshape(3, 8, -1), 0, 1), atol=1e-5)


@pytest.mark.parametrize("make", [mlp, cnn, residual, mobile, attention])
def test_adaptive_rounding_brings_low_bits_nearer(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    x = data(model)
    old = in_onnxruntime(model, x)
    errors = {
        way: distance(old, in_onnxruntime(quantize(model, ONNXRUNTIME, QuantizeStatic(weight_bits=4, rounding=way)), x))  # type: ignore[arg-type]
        for way in ("nearest", "adaptive")
    }
    assert errors["adaptive"] < 0.9 * errors["nearest"], errors


def test_transposed_convolutions_stay_with_the_nearest_integers() -> None:
    s = Sketch("n", 4, 6, 6)
    model = s.done(s("ConvTranspose", s.conv("x", 4, 8), s.weight(8, 3, 2, 2), strides=[2, 2]))
    made = {way: quantize(model, PROFILES["openvino"], QuantizeStatic(rounding=way)) for way in ("nearest", "adaptive")}  # type: ignore[arg-type]
    weights = {
        way: {i.name: numpy_helper.to_array(i) for i in m.graph.initializer if i.data_type == TensorProto.INT8 and len(i.dims) > 1}
        for way, m in made.items()
    }
    same = [np.array_equal(weights["nearest"][n], weights["adaptive"][n]) for n in weights["nearest"]]
    assert sorted(same) == [False, True]


def test_bias_correction_against_the_formula() -> None:
    """One layer: b' = b − (E[ỹ] − E[y]), in steps of s_x · s_w."""
    s = Sketch("n", 12)
    model = s.done(s.gemm("x", 12, 5))
    x = data(model)
    step = QuantizeStatic(weight_bits=3)
    plain, corrected = quantize(model, ONNXRUNTIME, step), quantize(model, ONNXRUNTIME, QuantizeStatic(weight_bits=3, bias_correction=True))
    shift = (in_onnxruntime(plain, x)[0] - in_onnxruntime(model, x)[0]).mean(0)
    assert np.abs(shift).max() > 1e-3
    difference = (in_onnxruntime(corrected, x)[0] - in_onnxruntime(plain, x)[0]).mean(0)
    scales = next(numpy_helper.to_array(i) for i in plain.graph.initializer if i.name.endswith("_scale") and i.dims)
    step_x = next(float(numpy_helper.to_array(i)) for i in plain.graph.initializer if i.name == "x_scale")
    assert (np.abs(difference + shift) <= 0.51 * scales * step_x).all()


@pytest.mark.parametrize("make", [cnn, residual, mobile, attention])
def test_bias_correction_brings_every_layer_to_its_mean(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    x = data(model)
    shifts = {}
    for on in (False, True):
        made = quantize(model, ONNXRUNTIME, QuantizeStatic(weight_bits=4, bias_correction=on))
        last = [in_onnxruntime(m, x)[0] for m in (model, made)]
        shifts[on] = float(np.abs((last[1] - last[0]).mean(0)).max() / np.abs(last[0]).max())
    assert shifts[True] < 0.25 * shifts[False], shifts


def test_bias_correction_gives_a_bias_where_there_was_none() -> None:
    s = Sketch("n", 3, 8, 8)
    x = s("Relu", s("Conv", "x", s.weight(8, 3, 3, 3)))
    model = s.done(s("Conv", x, s.weight(4, 8, 3, 3)))
    made = quantize(model, ONNXRUNTIME, QuantizeStatic(weight_bits=4, bias_correction=True))
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(made, strict_mode=True), full_check=True)
    assert sum(i.data_type == TensorProto.INT32 and numpy_helper.to_array(i).any() for i in made.graph.initializer) == 2


def kinds(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


def clipped(low: float, high: float) -> onnx.ModelProto:
    s = Sketch("n", 3, 8, 8)
    low_, high_ = (s.constant(np.float32(v).reshape(())) for v in (low, high))
    x = s("Clip", s.conv("x", 3, 8), low_, high_)
    return s.done(s.conv(x, 8, 4))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(("low", "high"), [(0.0, 0.5), (-0.4, 0.5), (-0.4, 0.4), (-0.3, 9.0)])
def test_a_clip_that_ends_where_the_integers_end_goes(profile: str, low: float, high: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = clipped(low, high)
    quantized = quantize(model, PROFILES[profile])
    gone = "Clip" not in kinds(quantized)
    assert gone == (profile == "onnxruntime" or low in (0.0, -high))
    far = data(model) * 10  # far beyond what calibration saw
    monkeypatch.setattr(insert, "_drop_clips", lambda wiring: None)
    with_clip = quantize(model, PROFILES[profile])
    assert "Clip" in kinds(with_clip)
    same, other = in_onnxruntime(with_clip, far), in_onnxruntime(quantized, far)
    if low == -high and profile == "openvino":  # int8 has one step more below
        assert distance(same, other) < 0.01
    else:
        np.testing.assert_array_equal(same[0], other[0])


def test_a_clip_that_others_read_or_that_ends_inside_stays() -> None:
    s = Sketch("n", 3, 8, 8)
    low, high = (s.constant(np.float32(v).reshape(())) for v in (-0.4, 0.5))
    x = s("Clip", "x", low, high)
    model = s.done(s.conv(x, 3, 4), s("Sigmoid", x))
    assert kinds(quantize(model, ONNXRUNTIME)).count("Clip") == 1
    assert kinds(quantize(clipped(-0.1, 0.5), PROFILES["openvino"])).count("Clip") == 1


def test_a_clip_in_front_of_the_first_layer_goes() -> None:
    s = Sketch("n", 3, 8, 8)
    low, high = (s.constant(np.float32(v).reshape(())) for v in (-0.4, 0.4))
    model = s.done(s.conv(s("Clip", "x", low, high), 3, 4))
    for profile in PROFILES.values():
        quantized = quantize(model, profile)
        assert "Clip" not in kinds(quantized)
        x = data(model)
        assert distance(in_onnxruntime(model, x), in_onnxruntime(quantized, x)) < 0.03


def test_relu_and_clip_behind_a_layer_leave_one_pair() -> None:
    s = Sketch("n", 3, 8, 8)
    low, high = (s.constant(np.float32(v).reshape(())) for v in (0.0, 0.5))
    model = s.done(s.conv(s("Clip", s("Relu", s.conv("x", 3, 8)), low, high), 8, 4))
    quantized = quantize(model, ONNXRUNTIME)
    assert kinds(quantized).count("QuantizeLinear") == 3  # in front, between, behind
    assert "Clip" not in kinds(quantized)


def naive_entropy(counts: np.ndarray, edges: np.ndarray) -> float:
    """The top of the range for values that are not negative, bin by bin."""
    best, least = 0.0, np.inf
    counts = counts.astype(float)
    counts[0] = min(counts[0], counts[1])  # zeros are met exactly
    counts = np.array([counts[max(i - 4, 0) : i + 4].sum() / 8 for i in range(len(counts))])
    for factor in np.linspace(1.0, 0.125, 113):
        top = factor * edges[-1]
        p, q = [], []
        steps: dict[int, list[float]] = {}
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
            if (low + high) / 2 <= top:
                p.append(float(count))
                steps.setdefault(min(int((low + high) / 2 / top * 256), 255), []).append(float(count))
        for inside in steps.values():
            filled = sum(c > 0 for c in inside)
            q += [sum(inside) / filled if c > 0 else 0.0 for c in inside]
        p[-1] += counts.sum() - sum(p)
        p_, q_ = (0.9999 * np.array(v) / sum(v) + 1e-4 / len(v) for v in (p, q))
        divergence = float(sum(a * np.log(a / b) for a, b in zip(p_, q_, strict=True)))
        if divergence < least:
            best, least = top, divergence
    return best


@pytest.mark.parametrize("shape", [0.5, 1.0, 3.0])
def test_entropy_observer_against_the_formula(shape: float) -> None:
    values = np.random.default_rng(0).gamma(shape, size=30_000)
    counts, edges = np.histogram(values, bins=2048, range=(0.0, float(values.max())))
    assert OBSERVERS["entropy"](counts, 0.0, float(values.max()))[1] == pytest.approx(naive_entropy(counts, edges))


@pytest.mark.parametrize("tail", [3, 5, 1000])
def test_entropy_observer_against_onnxruntime(tail: float) -> None:
    """Theirs has half as many steps, whole counts and another smoothing; both cut heavy tails at about the same place."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    values = np.random.default_rng(0).standard_t(tail, size=200_000)
    top = float(np.abs(values).max())
    counts = np.histogram(values, bins=2047, range=(-top, top))
    theirs = HistogramCollector("entropy", True, 2047, 128, 99.99, None).get_entropy_threshold((*counts, -top, top), 128)
    ours = OBSERVERS["entropy"](np.histogram(values, bins=2048, range=(-top, top))[0], -top, top)
    assert 0.7 < ours[1] / float(theirs[1]) < 1.4
    assert (ours[1] < 0.4 * top) == (tail == 3)


def test_all_settings_at_once() -> None:
    """It is nearer than plain rounding, and the file is as large."""
    model = cnn()
    x = data(model)
    old = in_onnxruntime(model, x)
    best = QuantizeStatic(weight_bits=3, rounding="adaptive", bias_correction=True, observer="mse")
    made, plain = quantize(model, ONNXRUNTIME, best), quantize(model, ONNXRUNTIME, QuantizeStatic(weight_bits=3))
    assert distance(old, in_onnxruntime(made, x)) < 0.8 * distance(old, in_onnxruntime(plain, x))
    assert made.ByteSize() < 1.1 * plain.ByteSize()


def test_progress_is_told_and_never_goes_back() -> None:
    model, told = cnn(), []
    view = View(inputs=(data(model),))
    network = Network(kind="graph", body=model, example=(data(model)[:2],))
    context = Context(train=view, calibrate=view, profile=ONNXRUNTIME, progress=lambda share, words: told.append((share, words)))
    QuantizeStatic(rounding="adaptive", bias_correction=True).apply(network, context)
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert any("rounding" in words for _, words in told)


def test_a_wide_layer_is_rounded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.compress.quantize import adaptive

    model = mlp()
    x = data(model)
    old = in_onnxruntime(model, x)
    monkeypatch.setattr(adaptive, "_WIDEST", 40)
    monkeypatch.setattr(adaptive, "_HELD", 100)
    made = quantize(model, ONNXRUNTIME, QuantizeStatic(weight_bits=4, rounding="adaptive"))
    nearest = quantize(model, ONNXRUNTIME, QuantizeStatic(weight_bits=4))
    assert distance(old, in_onnxruntime(made, x)) < distance(old, in_onnxruntime(nearest, x))


def test_patches_of_one_dimension_against_torch() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[2, 2], dilations=[2])
    x, weight = torch.randn(2, 4, 11), torch.randn(6, 4, 3)
    rows = patches(node, x.numpy(), (3,), 1, most=10**9)
    expected = torch.nn.functional.conv1d(x, weight, padding=2, dilation=2)
    got = (rows[0] @ weight.reshape(6, -1).T.numpy()).reshape(2, 11, 6)
    np.testing.assert_allclose(got, expected.transpose(1, 2).numpy(), atol=1e-5)


def test_a_recipe_from_before_these_settings_still_opens() -> None:
    old = {"name": "hasten.compress.QuantizeStatic", "observer": "minmax", "per_channel": True, "weight_bits": None, "keep": []}
    assert part_from_json(old) == QuantizeStatic()
