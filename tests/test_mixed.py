"""Mixed precision: which layers go back to floats, and that it helps."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from hasten.compress import QuantizeMixed, QuantizeStatic
from hasten.compress.quantize.mixed import chosen, sensitivity
from hasten.compress.quantize.normalise import normalise
from hasten.compress.quantize.static import calibration, quantizable
from hasten.core.data import View
from hasten.core.errors import Unsupported, UsageError
from hasten.core.network import Network
from hasten.core.recipe import Context, Profile
from hasten.measure.counts import layer_macs, macs
from sketches import ENGINES, NETWORKS, PROFILES, Sketch, cnn, data, distance, in_onnxruntime, mlp, residual

ONNXRUNTIME = PROFILES["onnxruntime"]


def of(model: onnx.ModelProto) -> tuple[Network, Context]:
    view = View(inputs=(data(model),))
    return Network(kind="graph", body=model, example=(data(model)[:2],)), Context(train=view, calibrate=view, profile=ONNXRUNTIME)


def outlier() -> onnx.ModelProto:
    """The second convolution reads one channel that is a thousand times the others: a single scale loses them."""
    s = Sketch("n", 3, 12, 12)
    x = s("Relu", s.conv("x", 3, 8))
    factor = np.ones((1, 8, 1, 1), dtype=np.float32)
    factor[0, 3] = 1000
    wide = s("Mul", x, s.constant(factor))
    weight = s.random.normal(size=(8, 8, 3, 3)).astype(np.float32) * 0.2
    weight[:, 3] /= 1000
    x = s("Relu", s("Conv", wide, s.constant(weight), pads=[1] * 4))
    return s.done(s.conv(s("Relu", s.conv(x, 8, 32)), 32, 4))


def in_floats(model: onnx.ModelProto) -> set[str]:
    floats = {i.name for i in model.graph.initializer if i.data_type == TensorProto.FLOAT}
    return {n.name for n in model.graph.node if n.op_type in ("Conv", "Gemm", "MatMul") and n.input[1] in floats}


def test_the_layer_that_loses_most_stays_in_floats() -> None:
    network, context = of(outlier())
    made = QuantizeMixed(floats=0.3).apply(network, context).graph
    assert "n3" in in_floats(made)
    x = data(network.graph)
    old = in_onnxruntime(network.graph, x)
    plain = distance(old, in_onnxruntime(QuantizeStatic().apply(network, context).graph, x))
    for run in ENGINES.values():
        assert distance(old, run(made, x)) < 0.5 * plain


@pytest.mark.parametrize("name", ["cnn", "residual", "mobile", "attention"])
def test_errors_are_those_of_one_layer_alone(name: str) -> None:
    """Against the definition: everything else kept, the outputs compared."""
    network, context = of(NETWORKS[name]())
    x = data(network.graph)
    errors = sensitivity(
        normalise(network.graph), ONNXRUNTIME, calibration(network, context.calibrate, context.progress), observer="minmax"
    )
    names = quantizable(network.graph, ONNXRUNTIME)
    assert tuple(errors) == names
    old = in_onnxruntime(network.graph, x)[0]
    for layer in names[:3]:
        alone = QuantizeStatic(keep=tuple(n for n in names if n != layer)).apply(network, context).graph
        got = in_onnxruntime(alone, x)[0]
        assert errors[layer] == pytest.approx(float(((old - got) ** 2).sum() / (old**2).sum()), rel=1e-3)


def test_the_budget_and_the_tolerance_are_kept() -> None:
    errors, costs = {"a": 0.3, "b": 0.1, "c": 0.4, "d": 0.0}, {"a": 10, "b": 1, "c": 89, "e": 0, "d": 5}
    assert chosen(errors, costs, floats=0.2, tolerance=0.0) == ("b", "a")
    assert chosen(errors, costs, floats=0.2, tolerance=0.71) == ("b",)
    assert chosen(errors, costs, floats=0.2, tolerance=1.0) == ()
    assert chosen(errors, costs, floats=0.02, tolerance=0.0) == ("b",)
    network, context = of(residual())
    whole = layer_macs(Network(kind="graph", body=normalise(network.graph).model(), example=network.example))
    assert whole is not None
    for floats in (0.05, 0.2, 0.5):
        stay = in_floats(QuantizeMixed(floats=floats).apply(network, context).graph)
        assert 0 < sum(whole[name] for name in stay) <= floats * sum(whole.values())


def test_where_all_layers_would_stay_in_floats_it_says_so() -> None:
    network, context = of(mlp())
    first, _ = quantizable(network.graph, ONNXRUNTIME)  # 64·96 of the 64·96 + 96·10 multiplications
    with pytest.raises(Unsupported, match="all layers that could be rounded have less than 20% of the multiplications"):
        QuantizeMixed(floats=0.2, keep=(first,)).apply(network, context)


def test_counts_by_layer_add_up() -> None:
    network, _ = of(cnn())
    counted = layer_macs(network)
    assert counted is not None
    assert sum(counted.values()) == 2 * macs(network)  # the example has two rows


def test_a_tolerance_above_all_errors_is_plain_static() -> None:
    network, context = of(cnn())
    a, b = (step.apply(network, context).graph for step in (QuantizeMixed(tolerance=10.0), QuantizeStatic()))
    x = data(network.graph)
    np.testing.assert_array_equal(in_onnxruntime(a, x)[0], in_onnxruntime(b, x)[0])
    assert not in_floats(a)


def test_kept_layers_stay_whatever_they_lose() -> None:
    network, context = of(cnn())
    first = quantizable(network.graph, ONNXRUNTIME)[0]
    assert first in in_floats(QuantizeMixed(tolerance=10.0, keep=(first,)).apply(network, context).graph)


@pytest.mark.parametrize("profile", PROFILES)
def test_other_settings_reach_the_quantizer(profile: str) -> None:
    network, context = of(residual())
    context = Context(train=context.train, calibrate=context.calibrate, profile=PROFILES[profile])
    made = QuantizeMixed(floats=0.2, observer="mse", bias_correction=True).apply(network, context).graph
    plain = QuantizeMixed(floats=0.2, observer="mse").apply(network, context).graph
    biases = [[numpy_helper.to_array(i) for i in m.graph.initializer if i.data_type == TensorProto.INT32] for m in (made, plain)]
    assert any(not np.array_equal(a, b) for a, b in zip(*biases, strict=False))
    x = data(network.graph)[:4]
    assert distance(in_onnxruntime(network.graph, x), ENGINES[profile](made, x)) < 0.05


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"floats": 0.0}, r"floats must be in \(0, 1\), got 0.0"),
        ({"floats": 1.0}, r"floats must be in \(0, 1\), got 1.0"),
        ({"tolerance": -1.0}, "tolerance must be >= 0, got -1.0"),
        ({"observer": "median"}, "observer must be one of"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        QuantizeMixed(**settings)  # type: ignore[arg-type]


def test_refusals() -> None:
    network, context = of(mlp())
    with pytest.raises(Unsupported, match="found no layer with less than 1% of the multiplications; use QuantizeStatic"):
        QuantizeMixed(floats=0.01).apply(network, context)
    with pytest.raises(Unsupported, match="QuantizeMixed needs an engine that runs operators on integers"):
        QuantizeMixed().apply(network, Context(train=context.train, calibrate=context.calibrate, profile=Profile()))
    with pytest.raises(UsageError, match="keep must name nodes"):
        QuantizeMixed(keep=("nothing",)).apply(network, context)
