"""Structured pruning through the rarer operators: each goes through, and what is left computes the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hasten.compress import PruneStructure
from hasten.compress.prune.structure import analyse
from hasten.core.errors import Unsupported
from hasten.load.lower import forward
from test_prune_structure import given, half, seen


class Between(nn.Module):
    """A layer, what stands between, a layer."""

    def __init__(self, first: nn.Module, what: Callable[[Tensor], Tensor], last: nn.Module, *parts: nn.Module) -> None:
        super().__init__()
        self.first, self.what, self.last, self.parts = first, what, last, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.what(self.first(x)))


class Weighted(nn.Module):
    """Products by `torch.einsum` with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight, self.last = nn.Linear(12, 16), nn.Parameter(torch.randn(16, 4, 8) * 0.2), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("btc,chd->bhtd", F.relu(self.first(x)), self.weight)
        scores = torch.einsum("bhid, bhjd -> bhij", y, y).softmax(-1)
        return self.last(torch.einsum("bhij,bhjd->bihd", scores, y).flatten(2))


class Cells(nn.Module):
    """A recurrent layer step by step, between two linear ones."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.first, self.cell, self.last = nn.Linear(12, 12), cell, nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), 16)
        if isinstance(self.cell, nn.LSTMCell):
            cells = state
            for t in range(x.shape[1]):
                state, cells = self.cell(self.first(x[:, t]), (state, cells))
        else:
            for t in range(x.shape[1]):
                state = self.cell(self.first(x[:, t]), state)
        return self.last(state)


PICTURE, TOKENS = (2, 3, 8, 8), (2, 6, 12)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "pixel_shuffle": (lambda: Between(nn.Conv2d(3, 32, 3), nn.PixelShuffle(2), nn.Conv2d(8, 4, 1)), PICTURE, {"first": 16, "last": 4}),
    "pixel_unshuffle": (lambda: Between(nn.Conv2d(3, 8, 1), nn.PixelUnshuffle(2), nn.Conv2d(32, 4, 1)), PICTURE, {"first": 4, "last": 4}),
    "channel_shuffle": (
        lambda: Between(nn.Conv2d(3, 16, 3), nn.ChannelShuffle(4), nn.Conv2d(16, 8, 1, groups=2)),
        PICTURE,
        {"first": 8},
    ),
    "instance_norm": (
        lambda: Between(nn.Conv2d(3, 16, 3), nn.InstanceNorm2d(16, affine=True), nn.Conv2d(16, 4, 1)),
        PICTURE,
        {"first": 8},
    ),
    "instance_norm with statistics": (
        lambda: Between(nn.Conv2d(3, 16, 3), nn.InstanceNorm2d(16, track_running_stats=True), nn.Conv2d(16, 4, 1)),
        PICTURE,
        {"first": 8},
    ),
    "rms_norm": (
        lambda: Between(nn.Linear(12, 16), nn.Sequential(nn.RMSNorm(16), nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 3)),
        TOKENS,
        {"first": 8, "what.1": 8},
    ),
    "rms_norm, a large eps": (lambda: Between(nn.Linear(12, 16), nn.RMSNorm(16, eps=0.5), nn.Linear(16, 3)), TOKENS, {"first": 8}),
    "mean": (lambda: Between(nn.Linear(12, 16), lambda x: x * x.pow(2).mean(-1, keepdim=True), nn.Linear(16, 3)), TOKENS, {"first": 8}),
    "mean over all": (lambda: Between(nn.Conv2d(3, 16, 3), lambda x: x - x.mean(), nn.Conv2d(16, 4, 1)), PICTURE, {"first": 8}),
    "norm": (lambda: Between(nn.Linear(12, 16), lambda x: F.normalize(x, dim=-1), nn.Linear(16, 3)), TOKENS, {"first": 8}),
    "zeros": (
        lambda: Between(nn.Linear(12, 16), lambda x: torch.cat([x, torch.zeros(x.shape[0], 6, 16)], 1), nn.Linear(16, 3)),
        TOKENS,
        {"first": 8},
    ),
    "zeros_like": (
        lambda: Between(nn.Linear(12, 16), lambda x: torch.cat([x, torch.zeros_like(x)], 1), nn.Linear(16, 3)),
        TOKENS,
        {"first": 8},
    ),
    "LSTMCell": (lambda: Cells(nn.LSTMCell(12, 16)), TOKENS, {}),
    "GRUCell": (lambda: Cells(nn.GRUCell(12, 16, bias=False)), TOKENS, {}),
    "RNNCell": (lambda: Cells(nn.RNNCell(12, 16, nonlinearity="relu")), TOKENS, {}),
    "repeat_interleave": (
        lambda: Between(nn.Linear(12, 16), lambda x: x.repeat_interleave(2, -1), nn.Linear(32, 3)),
        TOKENS,
        {"first": 8},
    ),
    "einsum": (Weighted, TOKENS, {"first": 8}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_zero_leaves_without_a_trace(name: str) -> None:
    torch.manual_seed(0)
    make, shape, widths = CASES[name]
    of = given(make(), torch.randn(shape))
    structure = analyse(of)
    assert structure.exact(half(structure)) is None
    silent = of.with_body(structure.silenced(half(structure)))
    made = PruneStructure(ratio=0.5, multiple=1).apply(silent, seen(silent))
    for a, b in zip(forward(silent, silent.example), forward(made, silent.example), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * max(1.0, float(np.abs(a).max())))
    for layer, width in widths.items():
        assert len(made.module.get_submodule(layer).weight) == width, layer


class Mirrored(nn.Module):
    """Codes of half the width, read back with the weight that made them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(16, 12) * 0.2), nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.weight, self.bias)), self.weight.t())


def test_weights_of_the_network_itself_shrink_and_are_meant_by_their_names() -> None:
    of = given(Mirrored(), torch.randn(4, 12))
    for only in ((), ("weight",)):
        assert PruneStructure(ratio=0.5, multiple=1, only=only).apply(of, seen(of)).module.get_parameter("weight").shape == (8, 12)
    with pytest.raises(Unsupported):
        PruneStructure(ratio=0.5, multiple=1, keep=("weight",)).apply(of, seen(of))


class Placed(nn.Module):
    """Attention with a bias for each head, looked up by how far apart two tokens are; the places are stored."""

    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.table = nn.Linear(12, 48), nn.Linear(16, 3), nn.Linear(1, 4)
        self.register_buffer("places", (torch.arange(6)[:, None] - torch.arange(6)).abs())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        table = self.table(torch.arange(6.0)[:, None])  # (6, heads)
        bias = table[self.places.view(-1)].view(6, 6, 4).permute(2, 0, 1)
        return self.out(((q @ k.transpose(-1, -2) / 2 + bias).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_stored_places_are_no_units() -> None:
    torch.manual_seed(0)
    of = given(Placed(), torch.randn(TOKENS))
    made = PruneStructure(ratio=0.5, multiple=1).apply(of, seen(of)).module
    assert made.get_submodule("table").out_features == 2
    assert made.get_submodule("out").in_features == 8


def test_the_weight_of_a_product_shrinks_as_a_layer_does() -> None:
    torch.manual_seed(0)
    of = given(nn.Sequential(Weighted()), torch.randn(TOKENS))
    made = PruneStructure(ratio=0.5, multiple=1).apply(of, seen(of)).module
    assert made.get_parameter("0.weight").shape == (8, 4, 4)
    assert made.get_submodule("0.last").in_features == 16


def test_cells_shrink_with_what_stands_before_them() -> None:
    torch.manual_seed(0)
    for cell, gates in ((nn.LSTMCell(12, 16), 4), (nn.GRUCell(12, 16), 3), (nn.RNNCell(12, 16), 1)):
        of = given(Cells(cell), torch.randn(TOKENS))
        made = PruneStructure(ratio=0.5, multiple=1).apply(of, seen(of)).module
        shapes = [tuple(made.get_parameter(f"cell.{name}").shape) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        assert shapes == [(gates * 8, 6), (gates * 8, 8), (gates * 8,), (gates * 8,)]


def test_what_a_norm_takes_the_mean_of_stays_for_that_reason() -> None:
    """Not because a cut that was tried came out wrong."""
    structure = analyse(given(Between(nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 3)), torch.randn(TOKENS)))
    assert "takes its mean" in structure.refused["first"]


class Centred(nn.Module):
    """A layer norm written out: what is gone was not zero once the mean was taken off it."""

    def forward(self, x: Tensor) -> Tensor:
        y = x - x.mean(-1, keepdim=True)
        return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)


def test_a_mean_over_what_is_not_zero_keeps_its_axis_even_where_it_hardly_shows() -> None:
    torch.manual_seed(0)
    first = nn.Linear(12, 16, bias=False)
    with torch.no_grad():
        first.weight[2::4], first.weight[3::4] = -first.weight[::4], -first.weight[1::4]  # the mean is zero, of every other unit too
        first.weight[0, 0] += 1e-3
    structure = analyse(given(Between(first, Centred(), nn.Linear(16, 3)), torch.randn(TOKENS)))
    assert structure.families == ()


def test_the_smallest_of_a_vector_sees_zeros() -> None:
    structure = analyse(
        given(Between(nn.Linear(12, 16), lambda x: x * x.norm(-1, -1, keepdim=True), nn.Linear(16, 3)), torch.randn(TOKENS))
    )
    assert "runs over it" in structure.refused["first"]


class Standardized(nn.Conv2d):
    """Every filter has mean 0 and variance 1 whenever it is used."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (self.weight.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        return self._conv_forward(x, weight, self.bias)


def test_weights_that_hold_their_inputs_are_made_once_for_all() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), Standardized(16, 32, 3), nn.ReLU(), Standardized(32, 16, 3), nn.Flatten(), nn.Linear(64, 4))
    of = given(net, torch.randn(PICTURE))
    structure = analyse(of)
    assert [len(f) for f in structure.families] == [16, 32, 16]
    made = PruneStructure(ratio=0.5, multiple=1).apply(of, seen(of)).module
    assert [tuple(p.shape) for p in made.parameters() if p.dim() == 4] == [(8, 3, 3, 3), (16, 8, 3, 3), (8, 16, 3, 3)]


class Adapted(nn.Linear):
    """A weight and what was added to it in training, as two thin factors."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.up @ self.down, self.bias)


def test_weights_that_shrink_as_they_are_stay_computed() -> None:
    torch.manual_seed(0)
    of = given(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), Adapted(16, 3)), torch.randn(2, 12))
    made = PruneStructure(ratio=0.5, multiple=1).apply(of, seen(of)).module
    assert {n: tuple(p.shape) for n, p in made.named_parameters()} == {
        "0.weight": (8, 12), "0.bias": (8,), "2.weight": (3, 8), "2.bias": (3,), "2.down": (2, 8), "2.up": (3, 2),
    }  # fmt: skip
