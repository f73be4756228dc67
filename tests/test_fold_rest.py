"""Folding of branches, of idle calls and of input standardization: exact in 64 bits, refused where it cannot be."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hasten import testing
from hasten.compress import FoldBranches, FoldIdle, FoldInput, FoldLinear, Unfold
from hasten.core.data import View
from hasten.core.errors import Unsupported
from hasten.core.network import Network
from hasten.core.recipe import Context, Step
from hasten.load.lower import forward
from networks import NETWORKS, network
from test_fold_more import apply, exact, floats, given, layers


class Sum(nn.Module):
    """The sum of its branches; None stands for the identity."""

    def __init__(self, *branches: nn.Module | None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Identity() if b is None else b for b in branches)

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in list(self.branches)[1:]:
            total = total + branch(x)
        return F.relu(total)


class Lambda(nn.Module):
    """A function of x."""

    def __init__(self, call: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def normed(layer: nn.Module, norm: nn.Module) -> nn.Module:
    return nn.Sequential(layer, norm)


def conv(*args: object, **settings: object) -> nn.Module:
    return nn.Conv2d(*args, bias=False, **settings)  # type: ignore[arg-type,misc]


BRANCHES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "repvgg": (
        lambda: Sum(normed(conv(6, 6, 3, padding=1), nn.BatchNorm2d(6)), normed(conv(6, 6, 1), nn.BatchNorm2d(6)), nn.BatchNorm2d(6)),
        (6, 7, 7),
        1,
    ),
    "repvgg, strided": (
        lambda: Sum(normed(conv(4, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)), normed(conv(4, 8, 1, stride=2), nn.BatchNorm2d(8))),
        (4, 8, 7),
        1,
    ),
    "repvgg, groups": (lambda: Sum(conv(8, 8, 3, padding=1, groups=4), conv(8, 8, 1, groups=4), nn.BatchNorm2d(8)), (8, 5, 5), 1),
    "depthwise and identity": (
        lambda: Sum(nn.Conv2d(6, 6, 5, padding=2, groups=6), nn.Conv2d(6, 6, 3, padding=1, groups=6), None),
        (6, 7, 7),
        1,
    ),
    "square and crosses": (
        lambda: Sum(nn.Conv2d(4, 4, 3, padding=1), conv(4, 4, (1, 3), padding=(0, 1)), conv(4, 4, (3, 1), padding=(1, 0))),
        (4, 6, 6),
        1,
    ),
    "dilated": (lambda: Sum(nn.Conv1d(3, 3, 5, padding=4, dilation=2), nn.Conv1d(3, 3, 3, padding=4, dilation=4), None), (3, 12), 1),
    "residual": (lambda: Sum(nn.Conv2d(4, 4, 3, padding=1), None), (4, 6, 6), 1),
    "linear": (lambda: Sum(nn.Linear(5, 5), nn.Linear(5, 5, bias=False), None), (3, 5), 1),
    "linear, normed": (lambda: Sum(normed(nn.Linear(5, 5), nn.BatchNorm1d(5)), nn.BatchNorm1d(5)), (5,), 1),
    "two and another": (
        lambda: Sum(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1))),
        (4, 6, 6),
        2,
    ),
    "doubled": (lambda: Lambda(lambda m, x: (y := m.a(x)) + y + x, a=nn.Conv2d(4, 4, 3, padding=1)), (4, 6, 6), 1),
    "blocks in a row": (
        lambda: nn.Sequential(Sum(nn.Conv2d(4, 4, 3, padding=1), None), Sum(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))),
        (4, 6, 6),
        2,
    ),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_branches_become_one(name: str) -> None:
    build, shape, left = BRANCHES[name]
    made = exact(FoldBranches(), given(build, *shape))
    assert sum("Conv" in kind or kind == "Linear" for kind in layers(made)) == left
    assert not any("Norm" in kind for kind in layers(made))


APART: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "cross alone": (
        lambda: Sum(conv(4, 4, (1, 3), padding=(0, 1)), conv(4, 4, (3, 1), padding=(1, 0))),
        (4, 6, 6),
        "multiply-adds instead of",
    ),
    "other kernels dilated by one": (lambda: Sum(nn.Conv1d(3, 3, 2, dilation=2, padding=1), None), (3, 9), "instead of"),
    "no layer": (lambda: Sum(nn.BatchNorm2d(4), None), (4, 6, 6), "found none"),
    "broadcast": (lambda: Sum(nn.Conv2d(4, 1, 3, padding=1), nn.Conv2d(4, 4, 1)), (4, 6, 6), "found none"),
    "read twice": (lambda: Lambda(lambda m, x: (y := m.a(x)) * (m.b(x) + y), a=nn.Linear(4, 4), b=nn.Linear(4, 4)), (4,), "found none"),
    "not centred": (
        lambda: Sum(nn.Conv2d(4, 4, 3, padding=1), Lambda(lambda m, x: m.c(x)[:, :, :6, :6], c=nn.Conv2d(4, 4, 1, padding=1))),
        (4, 6, 6),
        "found none",
    ),
}


@pytest.mark.parametrize("name", APART)
def test_branches_that_stay(name: str) -> None:
    build, shape, why = APART[name]
    with pytest.raises(Unsupported, match=why):
        apply(FoldBranches(), given(build, *shape))


def weight_normed() -> nn.Module:
    norm = nn.utils.parametrizations
    return nn.Sequential(
        norm.weight_norm(nn.Conv2d(3, 4, 3)),
        nn.ReLU(),
        norm.spectral_norm(nn.Conv2d(4, 4, 1)),
        nn.Flatten(),
        norm.orthogonal(nn.Linear(64, 8)),
    )


class Tables(nn.Module):
    """Computes a table of positions, and a weight from two others."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.base = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(6, dtype=x.dtype)[:, None] / torch.arange(1, 7, dtype=x.dtype)
        return F.linear(x + torch.sin(places), self.base * self.scale)


IDLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Identity()), (4,), ["Linear"]),
    "reshapes": (lambda: Lambda(lambda m, x: m.a(x.view(-1, 2, 6).reshape(-1, 12).flatten(1)), a=nn.Linear(12, 2)), (12,), ["Linear"]),
    "neutral": (lambda: Lambda(lambda m, x: m.a((x + 0) * 1 / 1).to(x.dtype)[:], a=nn.Linear(4, 2)), (4,), ["Linear"]),
    "padding": (lambda: nn.Sequential(nn.ZeroPad2d((2, 2, 1, 1)), nn.Conv2d(3, 4, 3, padding=1, groups=1)), (3, 6, 6), ["Conv2d"]),
    "parametrized": (weight_normed, (3, 6, 6), ["Conv2d", "ReLU", "Conv2d", "Linear"]),
    "tables": (Tables, (6, 6), ["Linear"]),
}


@pytest.mark.parametrize("name", IDLE)
def test_idle_calls_disappear(name: str) -> None:
    build, shape, left = IDLE[name]
    of = given(build, *shape)
    before = {id(m): type(m) for m in of.module.modules()}
    made = exact(FoldIdle(), of)
    assert layers(made) == left
    assert before == {id(m): type(m) for m in of.module.modules()}
    calls = [n for n in made.graph.nodes if n.op == "call_function"]
    assert len(calls) == {"tables": 1, "parametrized": 1}.get(name, 0)
    assert all(p.requires_grad for p in made.parameters())


def test_the_old_weight_norm_becomes_a_layer_again() -> None:
    with pytest.warns(FutureWarning):
        of = given(lambda: nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU()), 3, 6, 6)
    made = apply(FoldIdle(), of)
    assert layers(made.module) == ["Conv2d", "ReLU"]
    np.testing.assert_allclose(forward(made, of.example)[0], forward(of, of.example)[0], atol=1e-12)


STAY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "uneven padding": (lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 1, 0)), nn.Conv2d(3, 4, 3)), (3, 6, 6)),
    "padding with ones": (lambda: nn.Sequential(nn.ConstantPad2d(1, 1.0), nn.Conv2d(3, 4, 3)), (3, 6, 6)),
    "padding read twice": (lambda: Lambda(lambda m, x: m.a(y := F.pad(x, (1, 1))).sum(-1) + y.sum(-1), a=nn.Conv1d(3, 3, 3)), (3, 6)),
    "weight read elsewhere": (lambda: Lambda(lambda m, x: m.a(x) @ (m.a.weight * 2), a=nn.Linear(4, 4)), (4,)),
    "reshape for this batch only": (lambda: Lambda(lambda m, x: m.a(x).permute(0, 2, 1), a=nn.Linear(4, 4)), (4, 4)),
}


@pytest.mark.parametrize("name", STAY)
def test_what_is_not_idle_stays(name: str) -> None:
    with pytest.raises(Unsupported, match="FoldIdle needs a call that changes nothing"):
        apply(FoldIdle(), given(*STAY[name][:1], *STAY[name][1]))


def test_dropout_can_stay_for_a_later_training() -> None:
    of = given(lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Identity()), 4)
    with pytest.raises(Unsupported):
        apply(FoldIdle(dropout=False), of)


class Standard(nn.Module):
    """Standardizes, then the body."""

    def __init__(self, body: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("mean", torch.rand(shape) + 0.5)
        self.register_buffer("std", torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.body((x / 2 - self.mean) / self.std[None] + 0.25)


def test_standardization_folds_into_the_first_layer() -> None:
    linear = exact(FoldInput(), given(lambda: Standard(nn.Sequential(nn.Linear(5, 4), nn.ReLU()), (5,)), 5))
    assert [n.op for n in linear.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    flat = exact(FoldInput(), given(lambda: Standard(nn.Sequential(nn.Flatten(), nn.Linear(24, 4)), (2, 3, 4)), 2, 3, 4))
    assert [n.op for n in flat.graph.nodes] == ["placeholder", "call_function", "call_module", "output"]
    conv = exact(FoldInput(), given(lambda: Standard(nn.Conv2d(4, 4, 3, groups=2), (4, 1, 1)), 4, 6, 6))
    assert [n.op for n in conv.graph.nodes] == ["placeholder", "call_module", "output"]


def test_zero_padding_leaves_the_shift_outside() -> None:
    made = exact(FoldInput(), given(lambda: Standard(nn.Conv2d(3, 4, 3, padding=1), (3, 1, 1)), 3, 6, 6))
    assert [n.op for n in made.graph.nodes if n.op.startswith("call")] == ["call_function", "call_module"]
    shifted = given(lambda: Lambda(lambda m, x: m.a(x - 0.5), a=nn.Conv2d(3, 4, 3, padding=1)), 3, 6, 6)
    with pytest.raises(Unsupported, match="a pads with zeros, so a shift in front of it cannot go into its bias"):
        apply(FoldInput(), shifted)


@pytest.mark.parametrize("padding", [0, 1])
def test_given_means_make_the_network_take_raw_values(padding: int) -> None:
    of = given(lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=padding), nn.ReLU()), 3, 6, 6)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    made = apply(FoldInput(mean=mean, std=std), of)
    raw = of.example[0] * np.reshape(std, (1, 3, 1, 1)) + np.reshape(mean, (1, 3, 1, 1))
    np.testing.assert_allclose(made.example[0], raw, rtol=1e-12)
    np.testing.assert_allclose(forward(made, (raw,))[0], forward(of, of.example)[0], atol=1e-12)
    assert len([n for n in made.module.graph.nodes if n.op == "call_function"]) == padding


def test_bytes_are_scaled_by_the_layer_behind_the_cast() -> None:
    torch.manual_seed(0)
    body = Lambda(lambda m, x: m.a(x.float() / 255 - 0.5), a=nn.Linear(6, 4)).eval()
    of = Network(kind="module", body=body, example=(np.arange(24, dtype=np.uint8).reshape(4, 6),))
    made = apply(FoldInput(), of)
    assert [n.op for n in made.module.graph.nodes if n.op.startswith("call")] == ["call_function", "call_module"]
    np.testing.assert_allclose(forward(made, of.example)[0], forward(of, of.example)[0], atol=1e-6)


def test_standardization_is_refused() -> None:
    for std in ((0.0,), (-1.0,), (float("nan"),)):
        with pytest.raises(ValueError, match="std finite and above 0"):
            FoldInput(std=std)
    with pytest.raises(ValueError, match="the same length, got 2 and 3"):
        FoldInput(mean=(1.0, 2.0), std=(1.0, 2.0, 3.0))
    of = given(lambda: nn.Conv2d(3, 4, 3), 3, 6, 6)
    with pytest.raises(Unsupported, match="mean must have 1 or 3 numbers, one per channel of the input, got 4"):
        apply(FoldInput(mean=(1.0, 2.0, 3.0, 4.0)), of)
    with pytest.raises(Unsupported, match="found none"):
        apply(FoldInput(), of)
    uneven = given(lambda: Lambda(lambda m, x: m.a(x * m.t.weight), a=nn.Conv1d(3, 4, 3), t=nn.Linear(6, 3)), 3, 6)
    with pytest.raises(Unsupported, match="the constants in front of a differ inside a channel"):
        apply(FoldInput(), uneven)
    bytes_ = given(lambda: Lambda(lambda m, x: m.a(x / 255), a=nn.Linear(4, 4)), 4, dtype=torch.float32)
    with pytest.raises(Unsupported, match="found none"):  # the layer would read integers
        apply(FoldInput(), Network(kind="module", body=bytes_.module, example=(np.ones((4, 4), np.uint8),)))
    with pytest.raises(Unsupported, match="one input of floats with channels, got 2"):
        apply(FoldInput(mean=(1.0,)), network("two inputs"))


class Everything(nn.Module):
    """Something for every fold: a standardization, explicit padding, branches, two linear layers in a row, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.pad = nn.ZeroPad2d(1)
        self.wide, self.narrow, self.norm = conv(6, 6, 3), conv(6, 6, 1), nn.BatchNorm2d(6)
        self.head = nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 5), nn.Linear(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first((x - 0.5) / 0.25))
        x = self.wide(self.pad(x)) + self.narrow(x) + self.norm(x)
        x = F.relu(x).mean((2, 3))
        return self.head(x)


@pytest.mark.parametrize("law", testing.STEP_LAWS, ids=lambda law: law.__name__)
def test_the_laws_hold_where_something_folds(law: testing.StepLaw) -> None:
    of = given(Everything, 3, 8, 8, dtype=torch.float32)
    told = Context(train=View(inputs=of.example), calibrate=View(inputs=of.example), original=of)
    for step in (FoldInput(), FoldIdle(), FoldLinear(), Unfold()):
        assert apply(step, of).module is not of.module
        law(step, of, told)
    padded = apply(FoldIdle(), of)  # the branches read one value once the padding is a setting
    law(FoldBranches(), padded, told)
    folded = apply(FoldLinear(), apply(FoldBranches(), apply(FoldInput(), padded)))
    assert layers(folded.module).count("Conv2d") == 2
    assert layers(folded.module).count("Linear") == 1


@pytest.mark.parametrize("step", [FoldBranches(), FoldIdle(), FoldInput()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", [n if n in ("mlp", "lstm") else pytest.param(n, marks=pytest.mark.long) for n in NETWORKS])
def test_every_network_stays_what_it_is(step: Step, name: str) -> None:
    of = network(name)
    double = Network(kind="module", body=copy.deepcopy(of.module).double(), example=tuple(floats(a, "float64") for a in of.example))
    try:
        exact(step, double)
    except Unsupported as why:
        assert str(why)
