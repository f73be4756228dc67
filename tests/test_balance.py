"""Equalize and Smooth: the function stays, the ranges become what the papers say, and rounding loses less."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hasten.compress import Equalize, FoldBatchNorm, QuantizeStatic, Smooth
from hasten.compress.balance.chains import incoming, outgoing, pairs, scale_input, scale_output
from hasten.core.data import View
from hasten.core.errors import DataRefused, Unsupported, UsageError
from hasten.core.network import Network
from hasten.core.recipe import Context
from hasten.engines import OnnxRuntime
from hasten.load.lower import forward, lower
from networks import equal, network


def context(of: Network, rows: int = 20) -> Context:
    random = np.random.default_rng(0)
    inputs = tuple(np.concatenate([a] * 9)[:rows] + 0.1 * random.standard_normal((rows, *a.shape[1:])).astype(a.dtype) for a in of.example)
    view = View(inputs=inputs)
    return Context(train=view, calibrate=view, profile=OnnxRuntime().profile)


def made_of(module: nn.Module, *shape: int) -> Network:
    torch.manual_seed(0)
    return Network(kind="module", body=module.eval(), example=(torch.randn(4, *shape).numpy(),))


def uneven(module: nn.Module) -> nn.Module:
    """Output channels of very different size."""
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.weight.mul_(torch.exp(1.5 * torch.randn(len(layer.weight))).view(-1, *[1] * (layer.weight.dim() - 1)))
                layer.weight.div_(layer.weight.std() * layer.weight[0].numel() ** 0.5)
    return module


def chain() -> nn.Module:
    """Plain, depthwise in the middle, grouped, transposed, pooled and flattened."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.LeakyReLU(0.2),
        nn.Conv2d(8, 12, 1, groups=4), nn.PReLU(12), nn.MaxPool2d(2), nn.ConvTranspose2d(12, 8, 2, 2, groups=2), nn.ReLU(),
        nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Dropout(0.1), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, 10), nn.ReLU(), nn.Linear(10, 4),
    )  # fmt: skip


def test_every_pair_of_the_chain_is_found() -> None:
    made = Equalize().apply(made_of(chain(), 3, 12, 12), context(made_of(chain(), 3, 12, 12)))
    found = [(p.first, p.second, p.block) for p in pairs(made.module, made.example)]  # type: ignore[arg-type]
    assert found == [("0", "2", 1), ("2", "4", 1), ("4", "7", 1), ("7", "9", 1), ("9", "14", 9), ("14", "16", 1)]


def test_equalized_ranges_are_equal_and_the_function_stays() -> None:
    of = made_of(uneven(chain()), 3, 12, 12)
    before = {k: v.clone() for k, v in of.module.state_dict().items()}
    made = Equalize().apply(of, context(of))
    assert all(torch.equal(v, before[k]) for k, v in of.module.state_dict().items())
    assert equal(forward(of, of.example), forward(made, of.example))
    for pair in pairs(made.module, made.example):  # type: ignore[arg-type]
        ours, theirs = outgoing(made.module.get_submodule(pair.first)), incoming(made.module.get_submodule(pair.second), pair.block)
        assert torch.allclose(ours, theirs, rtol=1e-2), pair
    first = dict(of.module.named_modules())
    spread = outgoing(first["0"]) / incoming(first["2"], 1)
    assert float(spread.max() / spread.min()) > 10, "the example was even before"


def test_one_pair_against_the_formula() -> None:
    of = made_of(uneven(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))), 6)
    a, b = (of.module[i].weight.detach().numpy().astype(np.float64) for i in (0, 2))  # type: ignore[index]
    bias = of.module[0].bias.detach().numpy()  # type: ignore[index]
    s = np.sqrt(np.abs(a).max(1) / np.abs(b).max(0))
    made = Equalize().apply(of, context(of)).module.state_dict()
    np.testing.assert_allclose(made["0.weight"], a / s[:, None], rtol=1e-5)
    np.testing.assert_allclose(made["0.bias"], bias / s, rtol=1e-5)
    np.testing.assert_allclose(made["2.weight"], b * s, rtol=1e-5)


@pytest.mark.parametrize("make", [
    lambda: nn.Conv2d(4, 6, 3), lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.ConvTranspose2d(4, 6, 2, groups=2),
    lambda: nn.ConvTranspose1d(4, 6, 2), lambda: nn.Linear(4, 6),
])  # fmt: skip
def test_factors_on_either_side_of_a_layer(make: Callable[[], nn.Module]) -> None:
    """f(x · s) with the inputs' factor taken out again, times t on the outputs: what the layer alone would give, times t."""
    torch.manual_seed(0)
    layer = make()
    axes = layer.weight.dim() - 2  # type: ignore[union-attr, operator]
    x = torch.randn(2, 4, *[5] * axes) if axes else torch.randn(2, 4)
    s, t = torch.rand(4).double() + 0.5, torch.rand(6).double() + 0.5
    expected = layer(x) * t.float().view(1, -1, *[1] * axes)
    scale_input(layer, 1 / s, 1)
    scale_output(layer, t)
    got = layer(x * s.float().view(1, -1, *[1] * axes))
    assert torch.allclose(got, expected, atol=1e-5)


def error(of: Network, made: Network, **settings: object) -> float:
    """Of per-tensor int8, relative to the outputs of the original."""
    told = context(of)
    quantized = QuantizeStatic(**settings).apply(lower(made), told)  # type: ignore[arg-type]
    old, new = forward(of, of.example)[0], forward(quantized, of.example)[0]
    return float(np.sqrt(((old - new) ** 2).mean() / (old**2).mean()))


def test_equalized_networks_round_better() -> None:
    convs = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    of = made_of(uneven(nn.Sequential(*convs)), 3, 12, 12)
    made = Equalize().apply(of, context(of))
    assert error(of, made, per_channel=False, weight_bits=5) < 0.7 * error(of, of, per_channel=False, weight_bits=5)


@pytest.mark.parametrize(
    "between",
    [nn.ReLU6(), nn.GELU(), nn.Sigmoid(), nn.BatchNorm2d(4), nn.Softplus()],
    ids=lambda m: type(m).__name__,
)
def test_what_is_not_homogeneous_stops_it(between: nn.Module) -> None:
    of = made_of(nn.Sequential(nn.Conv2d(3, 4, 1), between, nn.Conv2d(4, 2, 1)), 3, 4, 4)
    with pytest.raises(Unsupported, match=r"Equalize needs two layers with only ReLU.*batch norms must be folded first"):
        Equalize().apply(of, context(of))


class Twisted(nn.Module):
    """A second reader, a second call, a shared weight, an axis that moves, a pool along the channels."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        if kind == "shared":
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.kind == "read twice":
            return self.b(y) + y
        if self.kind == "called twice":
            return self.b(torch.tanh(self.a(torch.tanh(y))))
        if self.kind == "turned":
            return self.b(y.transpose(1, 2))
        if self.kind == "pooled":
            return self.b(nn.functional.max_pool1d(y, 3, 1, 1))
        return self.b(y)


@pytest.mark.parametrize("kind", ["read twice", "called twice", "shared", "turned", "pooled"])
def test_twisted_networks_are_refused(kind: str) -> None:
    of = made_of(Twisted(kind), 6, 6)
    with pytest.raises(Unsupported, match="found none"):
        Equalize().apply(of, context(of))


def test_only_and_keep() -> None:
    of = made_of(uneven(chain()), 3, 12, 12)
    changed = Equalize(only=("14", "16")).apply(of, context(of)).module.state_dict()
    assert {k for k, v in of.module.state_dict().items() if not torch.equal(v, changed[k])} == {"14.weight", "14.bias", "16.weight"}
    kept = Equalize(keep=("14",)).apply(of, context(of)).module.state_dict()
    assert torch.equal(kept["14.weight"], of.module.state_dict()["14.weight"])
    with pytest.raises(UsageError, match="no layer is named 'first'"):
        Equalize(only=("first",)).apply(of, context(of))
    for step in (Equalize, Smooth):
        with pytest.raises(TypeError, match="keep must be a tuple"):
            step(keep="14")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["resnet", "cnn"])
def test_equalize_behind_a_fold(name: str) -> None:
    of = network(name)
    folded = FoldBatchNorm().apply(of, context(of))
    made = Equalize().apply(folded, context(of))
    assert equal(forward(of, of.example), forward(made, of.example))


class Outliers(nn.Module):
    """Two readers of one norm, a feed-forward part, and channels a hundred times larger than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        with torch.no_grad():
            self.norm.weight[::5] = 60.0
            self.norm.bias.normal_()
            for layer in (self.q, self.k):
                layer.weight[:, ::5] *= 0.02

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.down(torch.relu(self.up(torch.tanh(self.q(y)) * torch.tanh(self.k(y)))))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smooth_against_the_formula(alpha: float) -> None:
    torch.manual_seed(0)
    of = made_of(Outliers(), 5, 16)
    told = context(of)
    old = of.module.state_dict()
    made = Smooth(alpha=alpha).apply(of, told)
    assert equal(forward(of, of.example), forward(made, of.example))
    x = torch.nn.functional.layer_norm(torch.from_numpy(told.calibrate.inputs[0]), (16,), old["norm.weight"], old["norm.bias"])
    weight = torch.maximum(old["q.weight"].abs().amax(0), old["k.weight"].abs().amax(0))
    s = x.abs().amax((0, 1)) ** alpha / weight ** (1 - alpha)
    new = made.module.state_dict()
    for name in ("norm.weight", "norm.bias"):
        torch.testing.assert_close(new[name], old[name] / s, rtol=1e-4, atol=1e-6)
    for name in ("q.weight", "k.weight"):
        torch.testing.assert_close(new[name], old[name] * s, rtol=1e-4, atol=1e-6)
    assert not torch.equal(new["up.weight"], old["up.weight"])


def test_smooth_networks_round_better() -> None:
    torch.manual_seed(0)
    of = made_of(Outliers(), 5, 16)
    assert error(of, Smooth().apply(of, context(of))) < 0.5 * error(of, of)


class WrittenOut(nn.Module):
    """An RMS norm in single operators, as in networks of `transformers`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize("norm", [nn.RMSNorm, WrittenOut])
def test_smooth_knows_norms_of_squares(norm: Callable[[int], nn.Module]) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(norm(16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        module.get_parameter("0.weight")[::5] = 60.0
        module.get_parameter("1.weight")[:, ::5] *= 0.02
    of = made_of(module, 5, 16)
    made = Smooth().apply(of, context(of))
    assert equal(forward(of, of.example), forward(made, of.example))
    spread = [torch.aminmax(m.module.get_parameter("0.weight")) for m in (of, made)]
    assert spread[1].max / spread[1].min < 0.5 * spread[0].max / spread[0].min
    kept = Smooth(keep=("0",)).apply(of, context(of)).module
    assert torch.equal(kept.get_parameter("0.weight"), of.module.get_parameter("0.weight"))
    assert not torch.equal(kept.get_parameter("1.weight"), of.module.get_parameter("1.weight"))  # by the linear layer behind it


def test_a_scale_that_something_else_reads_stays() -> None:
    class Twice(WrittenOut):
        def __init__(self) -> None:
            super().__init__(16)
            self.layer = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.weight * x) + self.weight.sum()

    of = made_of(Twice(), 5, 16)
    with pytest.raises(Unsupported, match="found none"):
        Smooth().apply(of, context(of))


@pytest.mark.parametrize("first", [False, True])
def test_a_scale_that_is_the_weight_of_a_layer_too_stays(first: bool) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            norm = nn.LayerNorm(16)
            if first:  # the weight is known by this name, and the norm as its other holder
                self.scale = norm.weight
            self.norm, self.one, self.other = norm, nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.norm.weight * x) + self.other(self.norm(x))

    of = made_of(Tied(), 5, 16)
    with pytest.raises(Unsupported, match="found none"):
        Smooth().apply(of, context(of))


def test_smooth_leaves_a_norm_with_a_shortcut_alone() -> None:
    of = network("encoder")  # post-norm: both norms feed shortcuts
    made = Smooth().apply(of, context(of))
    old, new = of.module.state_dict(), made.module.state_dict()
    assert all(torch.equal(v, old[k]) for k, v in new.items() if "norm" in k)
    assert equal(forward(of, of.example), forward(made, of.example))


def test_smooth_on_tokens_and_with_dead_channels() -> None:
    of = network("transformer")
    view = View(inputs=of.example)
    made = Smooth().apply(of, Context(train=view, calibrate=view))
    assert equal(forward(of, of.example), forward(made, of.example))
    assert not torch.equal(made.module.state_dict()["norm1.weight"], of.module.state_dict()["norm1.weight"])
    dead = made_of(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), 4)
    with torch.no_grad():
        dead.module[0].weight[1], dead.module[0].bias[1] = 0.0, 0.0  # type: ignore[index, union-attr]
        dead.module[2].weight[:, 2] = 0.0  # type: ignore[index, union-attr]
    for step in (Smooth(), Equalize()):
        assert equal(forward(dead, dead.example), forward(step.apply(dead, context(dead)), dead.example))


def test_smooth_refuses() -> None:
    of = made_of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), 3, 4, 4)
    with pytest.raises(Unsupported, match="needs a norm, scale or linear layer that only linear layers read"):
        Smooth().apply(of, context(of))
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 1.5"):
        Smooth(alpha=1.5)
    mlp = made_of(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), 4)
    with pytest.raises(DataRefused, match="at least 1 examples, got 0"):
        Smooth().apply(mlp, context(mlp, rows=0))
    with pytest.raises(Unsupported, match="expected finite activations, but the inputs of '2' are not"):
        view = View(inputs=(np.full((8, 4), np.nan, dtype=np.float32),))
        Smooth().apply(mlp, Context(train=view, calibrate=view))
