"""Thin layers: as near to the layer as the theorem says, as small as told, and left alone where they are not smaller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hasten.compress import DepthwiseSeparable, FactorizeConv, FactorizeLinear, calls
from hasten.compress.factorize import linear, ranks, tensors
from hasten.core.data import View
from hasten.core.errors import Unsupported, UsageError
from hasten.core.network import Network
from hasten.core.recipe import Context, Step
from hasten.load.lower import forward
from hasten.measure import counts
from networks import NETWORKS, equal, network
from test_fold_more import given, layers

STEPS: tuple[Step, ...] = (
    FactorizeLinear(multiple=1),
    FactorizeConv(multiple=1),
    FactorizeConv(method="cp", multiple=1),
    DepthwiseSeparable(),
)


def apply(step: Step, of: Network, *, data: np.ndarray | None = None) -> Network:
    view = View(inputs=of.example if data is None else (data,))
    return step.apply(of, Context(train=view, calibrate=view))


def error(step: Step, of: Network, name: str = "0") -> float:
    """Squared distance between the weight of a linear layer and the product of its factors."""
    made = apply(step, of).module
    first, second = made.get_submodule(f"{name}.0"), made.get_submodule(f"{name}.1")
    whole = of.module.get_submodule(name).weight.detach().flatten(1)
    product = second.weight.detach().flatten(1) @ first.weight.detach().flatten(1)
    return float((whole - product).square().sum())


def test_the_product_is_the_nearest_of_its_rank() -> None:
    """Eckart and Young: what is lost is the sum of the squares of the singular values left out."""
    of = given(lambda: nn.Sequential(nn.Linear(20, 30), nn.ReLU()), 20)
    values = np.linalg.svd(of.module[0].weight.detach().numpy(), compute_uv=False)
    for rank in (1, 5, 11):
        assert error(FactorizeLinear(rank=rank, whiten=False), of) == pytest.approx((values[rank:] ** 2).sum(), rel=1e-10)


def test_energy_and_budget_choose_the_rank() -> None:
    of = given(lambda: nn.Sequential(nn.Linear(40, 40), nn.ReLU()), 40)
    share = np.cumsum(np.linalg.svd(of.module[0].weight.detach().numpy(), compute_uv=False) ** 2)
    share /= share[-1]
    for energy in (0.3, 0.5, 0.7):
        made = apply(FactorizeLinear(energy=energy, multiple=1, whiten=False), of).module
        rank = made.get_submodule("0.0").out_features
        assert share[rank - 1] >= energy > share[rank - 2]
    assert apply(FactorizeLinear(energy=0.3, multiple=8), of).module.get_submodule("0.0").out_features % 8 == 0
    for budget, multiple, rank in ((0.5, 1, 10), (0.5, 8, 8), (0.35, 8, 7), (0.9, 8, 16)):
        made = apply(FactorizeLinear(budget=budget, multiple=multiple), of).module
        assert made.get_submodule("0.0").out_features == rank
        assert sum(p.weight.numel() for p in made.get_submodule("0")) <= budget * 1600


def test_whitened_factors_are_the_best_for_what_the_layer_sees() -> None:
    """Against the formula: the weighted singular value decomposition by the square root of the covariance, in numpy."""
    of = given(lambda: nn.Sequential(nn.Linear(12, 10, bias=False), nn.Identity()), 12)
    draws = np.random.default_rng(0)
    data = draws.standard_normal((400, 4)) @ draws.standard_normal((4, 12)) + 0.1 * draws.standard_normal((400, 12)) + 3.0
    whole = of.module[0].weight.detach().numpy()
    lost = {}
    for whiten in (True, False):
        made = apply(FactorizeLinear(rank=3, whiten=whiten), of, data=data)
        lost[whiten] = float(((forward(made, (data,))[0] - data @ whole.T) ** 2).sum() / len(data))
        if whiten:
            np.testing.assert_allclose(forward(made, (data,))[0].mean(0), (data @ whole.T).mean(0), atol=1e-10)
    spread = np.cov(data.T, bias=True)
    spread += 1e-3 * np.diag(spread).mean() * np.eye(12)
    values, vectors = np.linalg.eigh(spread)
    root = vectors * np.sqrt(values) @ vectors.T
    p, s, q = np.linalg.svd(whole @ root)
    best = p[:, :3] * s[:3] @ q[:3] @ np.linalg.inv(root)
    centred = data - data.mean(0)
    assert lost[True] == pytest.approx(((centred @ (whole - best).T) ** 2).sum() / len(data), rel=1e-8)
    assert lost[True] < 0.2 * lost[False]


def test_pointwise_convolutions_are_matrices() -> None:
    of = given(lambda: nn.Sequential(nn.Conv2d(24, 20, 1, stride=2, padding=1), nn.ReLU()), 24, 5, 5)
    with torch.no_grad():
        of.module[0].weight.copy_((torch.randn(20, 3).double() @ torch.randn(3, 24).double())[..., None, None])
    for whiten in (True, False):
        made = apply(FactorizeLinear(rank=3, whiten=whiten), of)
        np.testing.assert_allclose(forward(made, of.example)[0], forward(of, of.example)[0], atol=1e-9)
        assert layers(made.module) == ["Conv2d", "Conv2d", "ReLU"]
        assert made.module.get_submodule("0.0").stride == (2, 2)


def test_tucker_against_the_formula() -> None:
    torch.manual_seed(0)
    weight = torch.randn(9, 7, 3, 3).double()
    np.testing.assert_allclose(tensors.tucker(weight, 9, 7).whole(), weight, atol=1e-12)
    # Truncated higher-order SVD, naively; iteration can only come nearer.
    array = weight.numpy()
    out = np.linalg.svd(array.reshape(9, -1))[0][:, :4]
    inner = np.linalg.svd(array.transpose(1, 0, 2, 3).reshape(7, -1))[0][:, :3]
    core = np.einsum("oikl,or,is->rskl", array, out, inner)
    start = ((np.einsum("rskl,or,is->oikl", core, out, inner) - array) ** 2).sum()
    made = tensors.tucker(weight, 4, 3)
    lost = float((made.whole() - weight).square().sum())
    assert lost < start
    assert lost == pytest.approx(float(weight.square().sum() - made.core.square().sum()), rel=1e-10)
    # At the end each basis is the best one for the other: the largest eigenvalues hold what the core holds.
    for seen, rank in ((torch.einsum("oi...,is->os...", weight, made.inner), 4), (torch.einsum("oi...,or->ir...", weight, made.out), 3)):
        held = np.linalg.svd(seen.flatten(1).numpy(), compute_uv=False)[:rank]
        assert float(made.core.square().sum()) == pytest.approx((held**2).sum(), rel=1e-6)
    # Where the tensor has these ranks, nothing is lost.
    low = tensors.Tucker(core=torch.randn(4, 3, 3, 3).double(), out=torch.randn(9, 4).double(), inner=torch.randn(7, 3).double()).whole()
    np.testing.assert_allclose(tensors.tucker(low, 4, 3).whole(), low, atol=1e-10)


def test_cp_finds_the_terms_of_a_tensor_that_has_them() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(size, 3).double() for size in (8, 6, 3, 3)]
    weight = torch.einsum("or,ir,hr,wr->oihw", *parts)
    made = tensors.polyads(weight, 3, seed=0)
    assert made.fit > 1 - 1e-5
    np.testing.assert_allclose(made.whole(), weight, atol=0.05)
    noise = torch.randn(8, 6, 3, 3).double()
    fits = [tensors.polyads(noise, rank, seed=0).fit for rank in (1, 4, 16)]
    assert fits == sorted(fits)
    assert fits[1] == pytest.approx(1 - float((noise - tensors.polyads(noise, 4, seed=0).whole()).square().sum() / noise.square().sum()))
    lengths = torch.stack([f.norm(dim=0) for f in tensors.polyads(noise, 16, seed=0).factors])
    torch.testing.assert_close(lengths, lengths[:1].expand_as(lengths))


GEOMETRY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(12, 10, 5, stride=2, padding=2), (12, 11)),
    "2d": (lambda: nn.Conv2d(10, 12, 3, stride=(2, 1), padding=(0, 1), dilation=(1, 2)), (10, 9, 8)),
    "2d, no bias, circular": (lambda: nn.Conv2d(10, 12, 3, padding=1, padding_mode="circular", bias=False), (10, 7, 7)),
    "2d, one side": (lambda: nn.Conv2d(10, 12, (1, 3), padding="same"), (10, 7, 7)),
    "3d": (lambda: nn.Conv3d(8, 8, 3, padding=1), (8, 4, 5, 3)),
}


@pytest.mark.parametrize("name", GEOMETRY)
@pytest.mark.parametrize("method", ["tucker", "cp", "separable"])
def test_the_chain_is_the_convolution_with_the_approximated_weight(method: Any, name: str) -> None:
    of = given(lambda: nn.Sequential(GEOMETRY[name][0](), nn.ReLU()), *GEOMETRY[name][1])
    layer = of.module[0]
    weight = layer.weight.detach()
    if method == "separable":
        made = DepthwiseSeparable()._parts("0", layer)
        near = torch.stack([_rank_one(weight[:, i]) for i in range(weight.shape[1])], 1)
    else:
        step = FactorizeConv(method=method, rank=4)
        near = (tensors.tucker(weight, 4, 4) if method == "tucker" else tensors.polyads(weight, 4, seed=0)).whole()
        made = step._tucker("0", layer) if method == "tucker" else step._cp("0", layer, 0)
    x = torch.from_numpy(of.example[0])
    with torch.no_grad():
        chained = nn.Sequential(*made)(x)
        layer.weight.copy_(near)
        torch.testing.assert_close(chained, layer(x), rtol=0, atol=1e-10)


def _rank_one(slice_: torch.Tensor) -> torch.Tensor:
    left, sizes, right = np.linalg.svd(slice_.flatten(1).numpy(), full_matrices=False)
    return torch.from_numpy(sizes[0] * np.outer(left[:, 0], right[0])).view(slice_.shape)


def test_a_separable_convolution_is_found_again() -> None:
    of = given(lambda: nn.Sequential(nn.Conv2d(6, 16, 3, padding=1), nn.ReLU()), 6, 8, 8)
    with torch.no_grad():
        of.module[0].weight.copy_(torch.einsum("oi,ihw->oihw", torch.randn(16, 6).double(), torch.randn(6, 3, 3).double()))
    made = apply(DepthwiseSeparable(), of)
    np.testing.assert_allclose(forward(made, of.example)[0], forward(of, of.example)[0], atol=1e-12)
    assert made.module.get_submodule("0.0").groups == 6
    layer = given(lambda: nn.Conv2d(4, 16, 3), 4, 8, 8).module
    for m in (1, 2, 4):
        depthwise, pointwise = DepthwiseSeparable(multiplier=m)._parts("0", layer)
        near = torch.einsum("oim,imhw->oihw", pointwise.weight.view(16, 4, m), depthwise.weight.view(4, m, 3, 3))
        left_out = [np.linalg.svd(layer.weight[:, i].detach().flatten(1).numpy(), compute_uv=False)[m:] for i in range(4)]
        assert float((near - layer.weight).detach().square().sum()) == pytest.approx(float(np.square(left_out).sum()), rel=1e-10)


@pytest.mark.parametrize(("method", "energy"), [("tucker", 0.7), ("cp", 0.4)])
def test_energy_of_convolutions_is_kept(method: Any, energy: float) -> None:
    of = given(lambda: nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()), 16, 6, 6)
    weight = of.module[0].weight.detach()
    step = FactorizeConv(method=method, energy=energy, multiple=2)
    if method == "cp":
        made = step._polyads("0", weight, 0)
        assert made is not None
        assert made.fit >= energy > tensors.polyads(weight, made.factors[0].shape[1] - 2, 0).fit
        assert step._cp("0", of.module[0], 0)
        assert not FactorizeConv(method="cp", energy=1.0, multiple=32)._cp("0", of.module[0], 0)
        return
    sides = step._sides("0", weight)
    for mode in (0, 1):
        share = np.cumsum(np.linalg.svd(weight.transpose(0, mode).flatten(1).numpy(), compute_uv=False) ** 2)
        assert share[sides[mode] - 1] / share[-1] >= energy > share[sides[mode] - 3] / share[-1]


def test_ranks() -> None:
    assert ranks.down(19.7, 8) == 16
    assert ranks.down(7.9, 8) == 7
    assert ranks.down(0.3, 8) == 1
    assert ranks.by_energy(torch.tensor([3.0, 2.0, 1.0]), 1.0, 1) == 3
    assert ranks.by_energy(torch.tensor([3.0, 2.0, 1.0]), 9 / 14, 1) == 1
    assert ranks.most(lambda share: share**2, 0.25) == pytest.approx(0.5)


@pytest.mark.parametrize("step", STEPS, ids=lambda s: f"{type(s).__name__} {getattr(s, 'method', '')}")
@pytest.mark.parametrize("name", [n if n in ("cnn", "mlp") else pytest.param(n, marks=pytest.mark.long) for n in NETWORKS])
def test_the_network_gets_smaller_and_cheaper(step: Step, name: str) -> None:
    of = network(name)
    try:
        made = apply(step, of)
    except Unsupported as why:
        assert "found none" in str(why)
        return
    assert counts.parameters(made) < counts.parameters(of)
    assert (counts.macs(made) or 0) <= (counts.macs(of) or 0)
    assert all(p.requires_grad for p in made.module.parameters())


@pytest.mark.parametrize("step", STEPS, ids=lambda s: f"{type(s).__name__} {getattr(s, 'method', '')}")
def test_neighbours_are_replaced_both(step: Step) -> None:
    kind = (lambda: nn.Linear(16, 16)) if isinstance(step, FactorizeLinear) else (lambda: nn.Conv1d(16, 16, 3, padding=1))
    of = given(lambda: nn.Sequential(kind(), kind(), nn.ReLU()), 16, 16)
    parts = layers(apply(step, of).module)
    assert parts.count("Linear") + parts.count("Conv1d") >= 4


@pytest.mark.parametrize("kind", [FactorizeLinear, FactorizeConv])
def test_settings_are_checked(kind: Any) -> None:
    for settings, why in (
        ({"energy": 0.0}, r"energy must be in \(0, 1\], got 0.0"),
        ({"budget": 1.0}, r"budget must be in \(0, 1\), got 1.0"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": 2, "energy": 0.5}, "give one, got energy=0.5 and rank=2"),
        ({"multiple": 0}, "multiple must be at least 1, got 0"),
        ({"faster": 1.0}, r"faster must be in \(0, 1\), got 1.0"),
        ({"faster": 0.5, "rank": 2}, "give one, got rank=2 and faster=0.5"),
    ):
        with pytest.raises(ValueError, match=why):
            kind(**settings)
    with pytest.raises(TypeError, match="only must be a tuple"):
        kind(only="0")


def test_a_rank_above_the_full_one_names_the_layer() -> None:
    for step, why in (
        (FactorizeLinear(rank=11), r"rank must be at most 10, the full rank of 9, got 11; leave the layer out with keep=\('9',\)"),
        (FactorizeConv(rank=4), "rank must be at most 3, the full rank of 0, got 4"),
        (FactorizeConv(rank=28, method="cp"), "rank must be at most 27, the full rank of 0, got 28"),
        (DepthwiseSeparable(multiplier=10), "multiplier must be at most 9, the full rank in 0, got 10"),
    ):
        with pytest.raises(Unsupported, match=why):
            apply(step, network("cnn"))
    assert layers(apply(FactorizeConv(rank=4, keep=("0",)), network("cnn")).module).count("Conv2d") == 4
    with pytest.raises(ValueError, match="method must be 'tucker' or 'cp', got 'svd'"):
        FactorizeConv(method="svd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiplier must be at least 1, got 0"):
        DepthwiseSeparable(multiplier=0)


def test_layers_can_be_chosen_and_small_ones_stay() -> None:
    of = network("mlp")
    assert layers(apply(FactorizeLinear(only=("1",)), of).module).count("Linear") == 4
    assert layers(apply(FactorizeLinear(keep=("1",), multiple=1), of).module).count("Linear") == 5
    assert "6.0" not in dict(apply(FactorizeLinear(), of).module.named_modules())  # ten classes
    with pytest.raises(UsageError, match="no layer is named 'head'"):
        apply(FactorizeLinear(only=("head",)), of)
    with pytest.raises(Unsupported, match="factors are smaller than it, found none"):
        apply(FactorizeLinear(only=("6",), rank=10), of)
    for step in STEPS[1:]:
        with pytest.raises(Unsupported, match="k×k convolution"):
            apply(step, of)
        with pytest.raises(Unsupported, match="k×k convolution without groups, found none"):
            type(step).space(of)


def test_parts_that_save_nothing_are_left_out() -> None:
    with pytest.raises(Unsupported, match="smaller than it, found none"):  # 8·(16 + 16) = 16·16
        apply(FactorizeLinear(rank=8, whiten=False), given(lambda: nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU()), 16))
    far = given(lambda: nn.Sequential(nn.Conv2d(16, 16, 3, stride=4, padding=1), nn.ReLU()), 16, 8, 8)
    with pytest.raises(Unsupported, match="smaller than it, found none"):  # the first part would run at every place, the layer at few
        apply(FactorizeConv(rank=12), far)


def test_values_that_are_not_finite_are_refused() -> None:
    of = network("mlp")
    data = np.full((4, 1, 8, 8), np.nan, np.float32)
    with pytest.raises(Unsupported, match="whiten needs finite values in front of 1 on the calibration data"):
        apply(FactorizeLinear(), of, data=data)
    with pytest.raises(Unsupported, match="whiten needs 1 rows of calibration data at least, got 0"):
        apply(FactorizeLinear(), of, data=data[:0])


def test_layers_that_read_too_much_are_not_whitened(monkeypatch: pytest.MonkeyPatch) -> None:
    """The covariance of VGG-16's 25,088 inputs takes 5 GB."""
    of = given(lambda: nn.Sequential(nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 20)), 40)
    monkeypatch.setattr(linear, "_WIDEST", 20)
    plain, white = (apply(FactorizeLinear(multiple=2, whiten=whiten), of).module for whiten in (False, True))
    assert torch.equal(white.get_submodule("0.0").weight, plain.get_submodule("0.0").weight)
    assert not torch.equal(white.get_submodule("2.0").weight, plain.get_submodule("2.0").weight)


def test_moments_are_taken_in_turns_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    of = given(lambda: nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 30), nn.ReLU(), nn.Linear(30, 20)), 20)
    at_once = apply(FactorizeLinear(multiple=2), of)
    most, moments = [], linear._moments
    monkeypatch.setattr(linear, "_BYTES", 8 * 24 * 24)
    monkeypatch.setattr(linear, "_moments", lambda module, nodes, *rest: most.append(len(nodes)) or moments(module, nodes, *rest))
    assert equal(forward(apply(FactorizeLinear(multiple=2), of), of.example), forward(at_once, of.example))
    assert most == [1, 1, 1]


def by_work(monkeypatch: pytest.MonkeyPatch, fixed: float = 0.0) -> None:
    """A clock that no other process disturbs: a second for each multiply-add, and a fixed time for each layer."""

    def seconds(runs: list[nn.Sequential], x: torch.Tensor) -> list[float]:
        found = []
        for run in runs:
            value, work = x, 0.0
            for part in run:
                value = part(value)
                work += fixed + calls.multiply_adds(part, tuple(value.shape)) / getattr(part, "groups", 1)
            found.append(work)
        return found

    monkeypatch.setattr(ranks, "seconds", seconds)


@pytest.mark.parametrize(("faster", "rank"), [(0.9, 24), (0.6, 16), (0.36, 11), (0.21, 6)])
def test_the_largest_rank_within_the_time(monkeypatch: pytest.MonkeyPatch, faster: float, rank: int) -> None:
    """Of 64·64 weights a rank r takes 128·r, and is a multiple of 8 where it is as large."""
    by_work(monkeypatch)
    of = given(lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU()), 64)
    made = apply(FactorizeLinear(faster=faster, multiple=8 if rank > 11 else 1), of).module
    assert made.get_submodule("0.0").out_features == rank


@pytest.mark.parametrize("method", ["tucker", "cp"])
def test_convolutions_within_the_time(monkeypatch: pytest.MonkeyPatch, method: Any) -> None:
    by_work(monkeypatch)
    of = given(lambda: nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()), 32, 6, 6)
    sizes = {}
    for faster in (0.8, 0.4):
        made = apply(FactorizeConv(method=method, faster=faster), of)
        assert (counts.macs(made) or 0) <= faster * (counts.macs(of) or 0)
        sizes[faster] = counts.parameters(made)
    assert sizes[0.4] < sizes[0.8]


def test_a_layer_that_no_rank_makes_faster_stays_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    of = given(lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 256)), 64)
    by_work(monkeypatch, fixed=4096.0)  # what a call takes counts more in the smaller layer
    said: list[str] = []
    view = View(inputs=of.example)
    context = Context(train=view, calibrate=view, progress=lambda share, words: said.append(words))
    made = FactorizeLinear(faster=0.7).apply(of, context).module
    assert layers(made) == ["Linear", "ReLU", "Linear", "Linear"]
    assert "0 stays: no rank takes at most 70% of its time" in said
    with pytest.raises(Unsupported, match="found none; no rank takes at most 30% of the time of 0, 2"):
        FactorizeLinear(faster=0.3).apply(of, context)
    with pytest.raises(Unsupported, match="found none; no rank takes at most 1% of the time of 0"):
        apply(FactorizeConv(faster=0.01), given(lambda: nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU()), 32, 6, 6))


def test_times_are_measured() -> None:
    small, large = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 8))
    with pytest.raises(RuntimeError):
        ranks.seconds([small, large], torch.zeros(4, 8))
    found = ranks.seconds([nn.Sequential(nn.Linear(1024, 8)), large], torch.zeros(64, 1024))
    assert 0 < found[0] < found[1]
