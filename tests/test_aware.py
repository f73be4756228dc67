"""QuantizeAware: the gradients are the paper's, the grid is QuantizeStatic's to the integer, and coarse weights lose less."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import fx, nn

import problems
from hasten.compress import FoldBatchNorm, QuantizeAware, QuantizeStatic
from hasten.compress.quantize.insert import Numbers, round_weights, scale_and_zero_point
from hasten.compress.quantize.rounding import RoundedLayer, RoundedRange, best_step, round_symmetric
from hasten.core.data import View
from hasten.core.errors import Unsupported, UsageError
from hasten.core.network import Network
from hasten.core.recipe import Context, Profile, Stage, describe, part_from_json, part_to_json
from hasten.engines import OnnxRuntime, OpenVINO
from hasten.load.lower import forward, lower
from hasten.train import FineTune
from networks import NETWORKS, network

CONV = Profile(integer_ops=frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"}), passing_ops=OnnxRuntime().profile.passing_ops)


def context(of: Network, profile: Profile = CONV) -> Context:
    rows = np.arange(24) % len(of.example[0])
    view = View(inputs=tuple(a[rows] for a in of.example))
    return Context(train=view, calibrate=view, original=of, loss="original", profile=profile)


def test_the_gradient_of_a_step_is_the_paper_s() -> None:
    """Esser et al., equations 3 and 5: round(v/s) − v/s inside, the integer itself outside; v's is 1 inside, 0 outside."""
    v = torch.linspace(-3, 3, 41, dtype=torch.float64, requires_grad=True)
    step = torch.full((41,), 0.31, dtype=torch.float64, requires_grad=True)
    made = round_symmetric(v, step, 7)
    made.sum().backward()
    ratio = v.detach().numpy() / 0.31
    inside = np.abs(ratio) < 7
    np.testing.assert_allclose(made.detach().numpy(), np.clip(np.round(ratio), -7, 7) * 0.31, atol=1e-12)
    np.testing.assert_allclose(step.grad.numpy(), np.where(inside, np.round(ratio) - ratio, 7 * np.sign(ratio)), atol=1e-9)
    np.testing.assert_allclose(v.grad.numpy(), inside.astype(float))


def test_rounding_is_torch_s_own_learnable_one() -> None:
    """Values, and gradients of values and step, against PyTorch's kernel for learnt steps.

    It counts values within half a step beyond the range as inside, the paper does not; there are none here.
    """
    torch.manual_seed(0)
    rows = torch.randn(5, 40)
    steps = torch.linspace(0.1, 0.5, 5)
    rows[((rows / steps[:, None]).abs() - 7.25).abs() < 0.3] = 0
    push = torch.randn(5, 40)
    found = []
    for rounding in (
        lambda v, s: round_symmetric(v, s[:, None], 7),
        lambda v, s: torch._fake_quantize_learnable_per_channel_affine(v, s, torch.zeros(5), 0, -7, 7, 1.0),
    ):
        v, s = rows.clone().requires_grad_(), steps.clone().requires_grad_()
        made = rounding(v, s)
        made.backward(push)
        found.append((made.detach(), v.grad, s.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("top", [1, 3, 7, 127])
def test_the_first_step_has_the_least_squared_error(top: int) -> None:
    weight = np.random.default_rng(0).normal(size=(5, 60))
    found = best_step(torch.from_numpy(weight), top).numpy()

    def error(row: np.ndarray, step: float) -> float:
        return float(((np.clip(np.round(row / step), -top, top) * step - row) ** 2).sum())

    for row, step in zip(weight, found, strict=True):
        largest = np.abs(row).max() / top
        assert error(row, step) <= 1.1 * min(error(row, s) for s in np.linspace(0.2 * largest, largest, 200))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("low", "high"), [(-1.3, 2.9), (0.0, 4.0), (-2.0, 0.0)])
def test_activations_are_rounded_on_the_grid_of_the_pairs(low: float, high: float, symmetric: bool) -> None:
    ranged = RoundedRange(symmetric=symmetric)
    ranged(torch.tensor([low, high]))
    assert ranged.start()
    x = torch.linspace(1.2 * low - 0.1, 1.2 * high + 0.1, 1001)
    x = x[((x / ((high - low) / 255)) % 1 - 0.5).abs() > 1e-2]  # not at the edge between two integers
    scale, zero = scale_and_zero_point(*ranged.bounds(), symmetric=symmetric)
    ends = (-127, 127) if zero.dtype == np.int8 else (0, 255)
    want = (np.clip(np.round(x.numpy() / scale) + zero, *ends) - zero.astype(int)) * scale
    assert np.abs(ranged(x).detach().numpy() - want).max() < 1e-5 + 1e-2 * float(scale)


def test_bounds_are_learnt_each_and_zero_stays_zero() -> None:
    for low, high, goal in ((0.0, 4.0, (0.0, 2.0)), (-4.0, 4.0, (-1.5, 3.0))):
        ranged = RoundedRange(symmetric=False)
        ranged(torch.tensor([low, high]))
        assert ranged.start()
        optimizer = torch.optim.Adam(ranged.parameters(), lr=0.05)
        x = torch.linspace(low, high, 100)
        for _ in range(80):
            optimizer.zero_grad()
            (ranged(x) - x.clamp(*goal)).square().mean().backward()
            optimizer.step()
        assert ranged.bounds() == pytest.approx(goal, abs=0.1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layer", [nn.Linear(9, 6), nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2)], ids=str)
def test_a_second_rounding_finds_the_same_integers(layer: nn.Module, bits: int) -> None:
    """Whatever the steps have become: far too small, right, and larger than any weight asks for."""
    rounded = RoundedLayer(copy.deepcopy(layer), bits=bits)
    top, axis = 2 ** (bits - 1) - 1, int(isinstance(layer, nn.ConvTranspose2d))
    with torch.no_grad():
        for growth in (-1.0, 0.0, 0.3, 3.0):
            rounded.growth.fill_(growth)
            weight = rounded.weight().numpy()
            integers, scale = round_weights(
                weight, None, axis=axis, input_scale=1.0, numbers=Numbers(weight_bits=bits, per_channel=True, symmetric=True)
            )
            along = scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
            np.testing.assert_allclose(integers * along, weight, atol=1e-6)
            assert (np.abs(integers).max(axis=tuple(i for i in range(weight.ndim) if i != axis)) == top).all()


def integer_weights(graph: onnx.ModelProto) -> list[np.ndarray]:
    """The weights as the integer graph has them, in real numbers, biases left out."""
    held = {i.name: numpy_helper.to_array(i) for i in graph.graph.initializer}
    found = []
    for node in graph.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in held and held[node.input[0]].dtype == np.int8:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            integers, scale = held[node.input[0]], held[node.input[1]]
            found.append(integers * scale.reshape([-1 if i == axis else 1 for i in range(integers.ndim)]))
    return found


@pytest.mark.parametrize("engine", [OnnxRuntime(), OpenVINO()], ids=str)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "cnn" else pytest.mark.long) for n in NETWORKS if n not in ("lstm", "gru", "rnn")]
)
def test_quantizing_afterwards_changes_no_weight(name: str, engine: OnnxRuntime | OpenVINO) -> None:
    of = network(name)
    told = context(of, engine.profile)
    made = QuantizeAware(weight_bits=4, epochs=2, batch=8).apply(of, told)
    graph = QuantizeStatic(weight_bits=4).apply(lower(made), told).graph
    layers = [m for m in made.module.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d))]
    trained = [w for m in layers for w in (m.weight.detach().numpy(), m.weight.detach().transpose(0, 1).numpy())]
    found = integer_weights(graph)
    assert found
    for weight in found:
        near = [float(np.abs(w - weight).max()) for w in trained if w.shape == weight.shape]
        tied = name == "transformer" and 20 in weight.shape
        assert tied or min(near) < 1e-6, (name, weight.shape, near)


def test_activation_scales_are_the_learnt_bounds() -> None:
    """Where the data reaches both ends of a clamp, the pair has its range; the first here reads the input, made to reach them."""
    of = network("cnn")
    told = context(of)
    made = QuantizeAware(epochs=2, batch=8).apply(of, told)
    first = next(n for n in made.module.graph.nodes if n.target is torch.ops.aten.clamp.default)
    low, high = first.args[1:]
    far = View(inputs=(100 * told.calibrate.inputs[0],))
    graph = QuantizeStatic().apply(lower(made), replace(told, calibrate=far)).graph
    scales = [float(numpy_helper.to_array(i)) for i in graph.graph.initializer if i.name.endswith("_scale") and not i.dims]
    assert min(abs(s - (high - low) / 255) for s in scales) < 1e-6


def ops(made: Network) -> list[str]:
    return [str(n.target) for n in made.module.graph.nodes if n.op.startswith("call")]


def test_what_comes_back_is_an_ordinary_network_with_clamps() -> None:
    of = network("cnn")
    made = QuantizeAware(epochs=1, batch=8).apply(of, context(of))
    clamp, pool = "aten.clamp.default", "aten.max_pool2d.default"
    assert ops(made) == [clamp, "0", clamp, pool, "4", clamp, pool, "aten.flatten.using_ints", "9"]
    assert isinstance(made.module, fx.GraphModule)
    assert [n for n, _ in made.module.named_children()] == ["0", "4", "9"]
    assert all(p.requires_grad for p in made.module.parameters())
    assert not any(m.training for m in made.module.modules())


def test_tensors_that_two_layers_read_have_one_range() -> None:
    of = network("resnet")
    found = ops(QuantizeAware(epochs=1, batch=8).apply(of, context(of)))
    assert found.count("aten.clamp.default") == 6  # input, block 1 in and between, block 2 in (conv and shortcut) and between, head
    assert "1.relu" not in found, "a clamp from 0 takes its place"


def test_a_tied_weight_is_left_alone() -> None:
    of = network("transformer")
    made = QuantizeAware(weight_bits=2, epochs=1, batch=8).apply(of, context(of)).module
    assert len(made.get_submodule("mlp.0").weight[0].unique()) <= 3
    assert made.get_submodule("head").weight is made.get_submodule("words").weight
    assert len(made.get_submodule("head").weight[0].unique()) > 3


def test_only_and_keep_choose_layers() -> None:
    of = network("cnn")
    made = QuantizeAware(weight_bits=2, epochs=1, batch=8, only=("0", "4"), keep=("4",)).apply(of, context(of)).module
    few = {n: all(len(row.unique()) <= 3 for row in m.weight.flatten(1)) for n, m in made.named_children() if hasattr(m, "weight")}
    assert few == {"0": True, "4": False, "9": False}


def test_coarse_weights_lose_less_than_rounded_ones() -> None:
    """On real digits with 3 bits, in integers, against rounding at once and against fine-tuning for as long and then rounding."""
    data = problems.data()
    given = Network(kind="module", body=problems.trained(), example=(data.train.inputs[0][:4],))
    told = Context(train=data.train, calibrate=data.train.take(slice(100)), original=given, profile=OnnxRuntime().profile)
    x, y = data.held_out.inputs[0], data.held_out.labels

    def score(network: Network) -> float:
        graph = QuantizeStatic(weight_bits=3).apply(lower(network), told)
        return float((forward(graph, (x,))[0].argmax(1) == y).mean())

    rounded, tuned = score(given), score(FineTune(epochs=3).apply(given, told))
    aware = score(QuantizeAware(weight_bits=3, epochs=3).apply(given, told))
    plain = float((forward(given, (x,))[0].argmax(1) == y).mean())
    assert aware > max(rounded, tuned) + 0.05
    assert aware > plain - 0.03


def test_a_folded_network_and_one_with_its_norms_train_alike() -> None:
    of = network("cnn")
    told = context(of)
    step = QuantizeAware(epochs=1, batch=8)
    one, two = (step.apply(n, told) for n in (of, FoldBatchNorm().apply(of, told)))
    np.testing.assert_allclose(forward(one, of.example)[0], forward(two, of.example)[0], atol=1e-4)


def test_norms_that_cannot_fold_keep_their_statistics() -> None:
    """In front of an activation there is no layer to fold into; statistics of rounded batches would move the ranges behind them."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten())
    nn.init.uniform_(body[2].running_mean, -0.5, 0.5)
    nn.init.uniform_(body[2].running_var, 0.5, 2.0)
    of = Network(kind="module", body=body.eval(), example=(torch.randn(8, 3, 6, 6).numpy(),))
    made = QuantizeAware(epochs=2, batch=8, learning_rate=1e-2).apply(of, context(of)).module
    (norm,) = (m for m in made.modules() if isinstance(m, nn.BatchNorm2d))
    assert torch.equal(norm.running_mean, body[2].running_mean)
    assert torch.equal(norm.running_var, body[2].running_var)
    assert not torch.equal(norm.weight, body[2].weight), "the rest of it learns"


def test_a_fixed_batch_is_kept() -> None:
    of = network("cnn")
    fixed = replace(of, fixed_batch=4)
    assert QuantizeAware(epochs=1).apply(fixed, context(fixed)).fixed_batch == 4


REFUSALS = [
    ("cnn", QuantizeAware(), Profile(), Unsupported, r"runs on integers \(nothing\), found none"),
    ("cnn", QuantizeAware(keep=("*",)), CONV, Unsupported, "needs a layer with a weight of its own"),
    ("lstm", QuantizeAware(only=("layer",)), CONV, Unsupported, "needs a layer with a weight of its own"),
    ("cnn", QuantizeAware(only=("block.*",)), CONV, UsageError, r"no layer is named 'block\.\*'"),
]


@pytest.mark.parametrize(("name", "step", "profile", "kind", "words"), REFUSALS, ids=lambda v: v if isinstance(v, str) else "")
def test_refusals(name: str, step: QuantizeAware, profile: Profile, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        step.apply(network(name), context(network(name), profile))


def test_graphs_and_networks_without_layers_are_refused() -> None:
    bare = Network(kind="module", body=nn.PReLU(), example=(np.ones((2, 3), np.float32),))
    with pytest.raises(Unsupported, match="needs a linear or convolutional layer"):
        QuantizeAware.space(bare)
    with pytest.raises(Unsupported, match="needs a torch module"):
        QuantizeAware().apply(Network(kind="graph", body=None, example=bare.example), context(bare))


def test_activations_that_are_not_finite_are_refused() -> None:
    of = network("cnn")
    told = context(of)
    told.calibrate.inputs[0][0, 0, 0, 0] = np.inf
    with pytest.raises(Unsupported, match="expected finite activations"):
        QuantizeAware().apply(of, told)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"weight_bits": 1}, r"weight_bits must be in \[2, 8\] or None, got 1"),
        ({"weight_bits": 9}, "got 9"),
        ({"epochs": 0}, "epochs must be a finite number above 0"),
        ({"distil": 2}, r"distil must be in \[0, 1\]"),
        ({"batch": 1}, "batch must be at least 2"),
    ],
    ids=str,
)
def test_settings_out_of_range(wrong: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        QuantizeAware(**wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="only must be a tuple"):
        QuantizeAware(only="fc")  # type: ignore[arg-type]


def test_it_is_its_json_and_stands_between_folding_and_numbers() -> None:
    step = QuantizeAware(weight_bits=4, keep=("head",))
    assert part_from_json(json.loads(json.dumps(part_to_json(step)))) == step
    assert part_to_json(step)["name"] == "hasten.compress.QuantizeAware"
    assert describe(step) == "QuantizeAware(weight_bits=4, keep=('head',))"
    assert FoldBatchNorm.stage < QuantizeAware.stage < QuantizeStatic.stage
    assert QuantizeAware.stage is Stage.TRAIN
