"""Folding of layers without anything between them and of branches: exact in 64 bits, refused where it is not exact or adds work."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hasten.compress import FoldLinear, Unfold
from hasten.compress.fold import compose
from hasten.core.data import View
from hasten.core.errors import Unsupported, UsageError
from hasten.core.network import Network
from hasten.core.recipe import Context, Step
from hasten.load.lower import forward
from hasten.measure import counts
from networks import NETWORKS, network

Built = Callable[[], nn.Module]


def given(build: Built, *shape: int, dtype: torch.dtype = torch.float64) -> Network:
    """In double precision, with random statistics of its norms."""
    torch.manual_seed(0)
    module = build().to(dtype)
    for norm in (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        for values, low in ((norm.weight, 0.5), (norm.bias, -1.0), (norm.running_mean, -1.0), (norm.running_var, 0.3)):
            nn.init.uniform_(values, low, 2.0)
    return Network(kind="module", body=module.eval(), example=(torch.randn(4, *shape, dtype=dtype).numpy(),))


def apply(step: Step, of: Network) -> Network:
    view = View(inputs=of.example)
    return step.apply(of, Context(train=view, calibrate=view))


def exact(step: Step, of: Network) -> nn.Module:
    """What the step makes, after a check to 1e-10 in 64 bits and 1e-5 in 32."""
    made = apply(step, of)
    for expected, got in zip(forward(of, of.example), forward(made, made.example), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10 * np.abs(expected).max())
    single = Network(kind="module", body=copy.deepcopy(of.module).float(), example=tuple(floats(a, "float32") for a in of.example))
    again = apply(step, single)
    for expected, got in zip(forward(single, single.example), forward(again, again.example), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    return made.module


def floats(array: np.ndarray, kind: str) -> np.ndarray:
    return array.astype(kind) if array.dtype.kind == "f" else array


def layers(module: nn.Module) -> list[str]:
    """Kinds of its layers in the order of the calls."""
    return [type(module.get_submodule(n.target)).__name__ for n in module.graph.nodes if n.op == "call_module"]


def chain(*parts: nn.Module) -> Built:
    return lambda: nn.Sequential(*(copy.deepcopy(p) for p in parts))


PRODUCTS: dict[str, tuple[Built, tuple[int, ...]]] = {
    "linear": (chain(nn.Linear(6, 8), nn.Linear(8, 4, bias=False)), (6,)),
    "linear, no bias inside, three axes": (chain(nn.Linear(6, 8, bias=False), nn.Linear(8, 4)), (5, 6)),
    "three linear": (chain(nn.Linear(16, 2), nn.Linear(2, 16), nn.Linear(16, 2)), (16,)),
    "1x1 then 3x3": (chain(nn.Conv2d(4, 12, 1), nn.Conv2d(12, 5, 3)), (4, 7, 7)),
    "1x1 then padded, no bias inside": (chain(nn.Conv2d(4, 12, 1, bias=False), nn.Conv2d(12, 5, 3, padding=1)), (4, 7, 7)),
    "strided 1x1 then padded": (chain(nn.Conv2d(4, 12, 1, stride=2, bias=False), nn.Conv2d(12, 5, 3, padding=1)), (4, 8, 7)),
    "padded then 1x1": (chain(nn.Conv2d(4, 12, 3, padding=1, stride=2), nn.Conv2d(12, 5, 1)), (4, 7, 8)),
    "reflecting then 1x1": (chain(nn.Conv1d(4, 12, 3, padding=1, padding_mode="circular"), nn.Conv1d(12, 5, 1)), (4, 9)),
    "1x1 then strided 1x1": (chain(nn.Conv3d(4, 8, 1), nn.Conv3d(8, 4, 1, stride=2)), (4, 3, 4, 5)),
    "wide and narrow": (chain(nn.Conv2d(2, 32, 3), nn.Conv2d(32, 2, 3)), (2, 8, 8)),
    "dilated after strided": (
        chain(nn.Conv1d(2, 40, 3, stride=2, padding=2, dilation=3), nn.Conv1d(40, 2, 2, stride=3, dilation=2)),
        (2, 40),
    ),
    "groups": (chain(nn.Conv2d(8, 16, 1, groups=4), nn.Conv2d(16, 8, 3, groups=2)), (8, 6, 6)),
    "depthwise twice": (chain(nn.Conv2d(4, 4, (3, 1), groups=4), nn.Conv2d(4, 4, (1, 2), groups=4)), (4, 6, 6)),
    "one channel in, then depthwise": (chain(nn.Conv2d(1, 6, 1), nn.Conv2d(6, 6, 3, groups=6)), (1, 6, 6)),
    "same padding": (chain(nn.Conv1d(4, 8, 3, padding="same"), nn.Conv1d(8, 4, 1, padding="valid")), (4, 9)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_exact(name: str) -> None:
    build, shape = PRODUCTS[name]
    before = sum(isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) for m in build().modules())
    if name == "depthwise twice":  # 3 + 2 taps against 6
        of = given(build, *shape)
        made = compose.product(of.module[0], of.module[1])
        x = torch.from_numpy(of.example[0])
        torch.testing.assert_close(made(x), of.module(x), rtol=0, atol=1e-12)
        with pytest.raises(Unsupported, match=r"as one would take 480 multiply-adds instead of 448"):
            apply(FoldLinear(), given(build, *shape))
        return
    made = exact(FoldLinear(), given(build, *shape))
    assert len(layers(made)) == 1 < before


REFUSED: dict[str, tuple[Built, tuple[int, ...], str]] = {
    "depthwise then pointwise": (
        chain(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1)),
        (8, 6, 6),
        "18,432 multiply-adds instead of 3,200 and 1,168",
    ),
    "narrow between": (chain(nn.Linear(16, 2), nn.Linear(2, 16)), (16,), "would take 256 multiply-adds instead of 64"),
    "bias under zeros": (chain(nn.Conv2d(3, 9, 1), nn.Conv2d(9, 3, 3, padding=1)), (3, 6, 6), "0 and 1 stay apart: .* would add its bias"),
    "kernel under zeros": (
        chain(nn.Conv2d(2, 40, 3, padding=1, bias=False), nn.Conv2d(40, 2, 3, padding=1)),
        (2, 6, 6),
        "would have filled",
    ),
    "activation": (chain(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), (4,), "found none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_or_adds_work_is_refused(name: str) -> None:
    build, shape, why = REFUSED[name]
    with pytest.raises(Unsupported, match=why):
        apply(FoldLinear(), given(build, *shape))


class Wired(nn.Module):
    """Two linear layers; `how` says what keeps them apart."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(4, 4), nn.Linear(4, 4), how
        if how == "tied":
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.how == "read twice":
            return self.b(y) + y
        if self.how == "weight read":
            return self.b(y) @ self.a.weight
        return self.b(y) if self.how != "called twice" else self.b(self.a(torch.relu(y)))


@pytest.mark.parametrize("how", ["read twice", "tied", "weight read", "called twice"])
def test_layers_that_others_read_are_left_alone(how: str) -> None:
    with pytest.raises(Unsupported, match="found none"):
        apply(FoldLinear(), given(lambda: Wired(how), 4))


def test_embedding_and_linear_become_one_table() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Embedding(10, 16, padding_idx=3), nn.Linear(16, 8)).double().eval()
    of = Network(kind="module", body=body, example=(np.arange(12).reshape(4, 3) % 10,))
    made = exact(FoldLinear(), of)
    assert layers(made) == ["Embedding"]
    assert made.get_submodule("1").padding_idx == 3
    wide = Network(kind="module", body=nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 64)), example=of.example)
    with pytest.raises(Unsupported, match="640 parameters instead of 360"):
        apply(FoldLinear(), wide)


@pytest.mark.parametrize("name", ["linear", "1x1"])
def test_folding_undoes_unfolding(name: str) -> None:
    build, shape = {
        "linear": (chain(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3, bias=False)), (6,)),
        "1x1": (chain(nn.Conv2d(6, 4, 1, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3)), (6, 9, 9)),
    }[name]
    of = given(build, *shape)
    unfolded = exact(Unfold(), of)
    assert len(layers(unfolded)) == (5 if name == "linear" else 4)
    again = apply(FoldLinear(), of.with_body(unfolded)).module
    assert layers(again) == [type(m).__name__ for m in of.module]
    first, again = of.module[0], again.get_submodule("0.1")
    torch.testing.assert_close(again.weight, first.weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(again.bias, first.bias, rtol=0, atol=1e-12)


def test_unfold_takes_the_rank_that_leaves_the_matrix_exact() -> None:
    of = given(chain(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5)), 8)
    with torch.no_grad():
        of.module[0].weight.copy_(torch.randn(6, 2).double() @ torch.randn(2, 8).double())
    made = exact(Unfold(only=("0",), rank=3), of)
    assert made.get_submodule("0.0").out_features == 3
    assert layers(made) == ["Linear", "Linear", "ReLU", "Linear"]
    with pytest.raises(Unsupported, match="rank must be at least 2, the rank of the matrix of 0, to leave it exact, got 1"):
        apply(Unfold(only=("0",), rank=1), of)
    with pytest.raises(Unsupported, match="rank must be at most 5, the smaller side of 2, got 6"):
        apply(Unfold(only=("2",), rank=6), of)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        Unfold(rank=0)
    with pytest.raises(UsageError, match="no layer is named 'head'"):
        apply(Unfold(only=("head",)), of)
    with pytest.raises(Unsupported, match="Unfold needs a linear layer"):
        apply(Unfold(), given(chain(nn.Conv2d(3, 4, 3), nn.ReLU()), 3, 6, 6))


@pytest.mark.parametrize("step", [Unfold(), FoldLinear()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", [n if n in ("cnn", "lstm", "mlp") else pytest.param(n, marks=pytest.mark.long) for n in NETWORKS])
def test_every_network_stays_what_it_is(step: Step, name: str) -> None:
    of = network(name)
    double = Network(kind="module", body=of.module.double(), example=tuple(floats(a, "float64") for a in of.example))
    try:
        exact(step, double)
    except Unsupported as why:
        assert str(why)


def test_products_cost_less() -> None:
    of = given(PRODUCTS["1x1 then 3x3"][0], 4, 7, 7, dtype=torch.float32)
    made = apply(FoldLinear(), of)
    assert counts.parameters(made) < counts.parameters(of)
    assert (counts.macs(made) or 0) < (counts.macs(of) or 0)
