"""Structured pruning: what hangs together goes together, and what is left computes the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hasten.compress import PruneStructure
from hasten.compress.prune import rewrite, saliency, shares
from hasten.compress.prune.structure import Structure, analyse
from hasten.core.data import View
from hasten.core.errors import Unsupported, UsageError
from hasten.core.network import Network
from hasten.core.recipe import Context
from hasten.load.lower import forward
from networks import NETWORKS, QUICK, network

NAMES = [pytest.param(name, marks=() if name in (*QUICK, "resnet", "encoder") else pytest.mark.long) for name in NETWORKS]


def seen(of: Network, classes: int | None = None) -> Context:
    """What a step may see: the example over and over, labelled where `classes` is given."""
    rows = np.arange(32) % len(of.example[0])
    labels = None if classes is None else np.arange(32) % classes
    view = View(inputs=tuple(a[rows] for a in of.example), labels=labels)
    return Context(train=view, calibrate=view, original=of, loss="original" if classes is None else "classes")


def given(module: nn.Module, *example: Tensor) -> Network:
    """A network with random statistics."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return Network(kind="module", body=module.eval(), example=tuple(x.numpy() for x in example))


def half(structure: Structure) -> np.ndarray:  # type: ignore[type-arg]
    return np.concatenate([f.units[::2][: len(f) - 1] for f in structure.families])


@pytest.mark.parametrize("name", NAMES)
def test_zero_units_leave_without_a_trace(name: str) -> None:
    """The law of structured pruning: units whose weights are zero change no output when they go."""
    structure = analyse(network(name))
    of = network(name).with_body(structure.silenced(half(structure)))
    made = PruneStructure(ratio=0.5, multiple=1).apply(of, seen(of))
    before, after = (sum(p.numel() for p in n.module.parameters()) for n in (of, made))
    assert after < before
    for a, b in zip(forward(of, of.example), forward(made, of.example), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * max(1.0, float(np.abs(a).max())))


class Block(nn.Module):
    """Every way in which channels hang together, one `kind` at a time."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        groups = {"grouped": 4, "depthwise": 16}.get(kind, 1)
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.middle = nn.Conv2d(16, 32 if kind == "depthwise" else 16, 3, padding=1, groups=groups)
        self.last = nn.Conv2d({"concatenated": 32, "depthwise": 32, "split": 8}.get(kind, 16), 8, 1)
        self.norm = nn.GroupNorm(4, 16)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2, groups=16 if kind == "transposed" else 1)
        self.head = nn.Linear(8 * (256 if kind == "transposed" else 64), 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.middle(x)
        if self.kind == "residual":
            y = y + x
        if self.kind == "concatenated":
            y = torch.cat([x, y], 1)
        if self.kind == "shuffled":
            b, c, h, w = y.shape
            y = y.view(b, 4, c // 4, h, w).transpose(1, 2).reshape(b, c, h, w)
        if self.kind == "split":
            y, gate = y.chunk(2, 1)
            y = y * gate.sigmoid()
        if self.kind == "normed":
            y = self.norm(y)
        if self.kind == "transposed":
            y = self.up(y)
        if self.kind == "padded":
            y = F.pad(x, (0, 0, 0, 0, 0, 0)) + y
        return self.head(self.last(F.relu(y)).flatten(1))


KINDS = ("plain", "residual", "concatenated", "grouped", "depthwise", "shuffled", "split", "normed", "transposed", "padded")


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_hanging_together(kind: str) -> None:
    torch.manual_seed(0)
    of = given(Block(kind), torch.randn(2, 3, 8, 8))
    structure = analyse(of)
    assert set(structure.refused) == {"head"}
    assert structure.exact(half(structure)) is None
    made = PruneStructure(multiple=2).apply(of, seen(of))
    assert made.module.get_submodule("first.0").out_channels == 8
    assert made.module.get_submodule("last").out_channels == 4
    assert made.module.get_submodule("head").in_features == of.module.head.in_features // 2


def test_pieces_that_go_ways_of_their_own_all_keep_some() -> None:
    """One half passes, the other is convolved: with the weakest units all in one half, both halves shrink alike."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.first(x).chunk(2, 1)
            return self.last(torch.cat([left, self.second(right)], 1))

    of = given(Halves(), torch.randn(2, 3, 4, 4))
    with torch.no_grad():
        of.module.first.weight[8:] *= 0.01
    made = PruneStructure(multiple=1).apply(of, seen(of)).module
    assert (made.first.out_channels, made.second.in_channels, made.last.in_channels) == (8, 4, 8)


class Heads(nn.Module):
    """Attention with fewer key and value heads than query heads, and rotations of its queries."""

    def __init__(self, heads: int = 4, shared: int = 2, width: int = 8) -> None:
        super().__init__()
        self.heads, self.shared, self.width = heads, shared, width
        self.query = nn.Linear(32, heads * width)
        self.key, self.value = nn.Linear(32, shared * width), nn.Linear(32, shared * width)
        self.out = nn.Linear(heads * width, 32)
        self.register_buffer("turn", torch.randn(6, width))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.query(x).view(b, t, self.heads, self.width).transpose(1, 2) * self.turn.cos()
        k, v = (f(x).view(b, t, self.shared, self.width).transpose(1, 2) for f in (self.key, self.value))
        k, v = (a[:, :, None].expand(-1, -1, self.heads // self.shared, -1, -1).reshape(b, self.heads, t, self.width) for a in (k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(b, t, -1))


def test_heads_go_whole_and_with_the_heads_that_share_their_keys() -> None:
    torch.manual_seed(0)
    of = given(nn.Sequential(Heads(), Heads(8, 8, 4)), torch.randn(2, 6, 32))
    structure = analyse(of)
    assert [(f.name, len(f)) for f in structure.families] == [("0.query", 2), ("1.query", 8)]
    made = PruneStructure(ratio=0.5).apply(of, seen(of)).module
    assert [made.get_submodule(n).out_features for n in ("0.query", "0.key", "1.query", "1.value")] == [16, 8, 16, 16]


def test_weights_that_two_layers_share_stay_shared() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    module[4].weight = module[2].weight
    of = given(module, torch.randn(4, 6))
    made = PruneStructure().apply(of, seen(of)).module
    assert sum(p.numel() for p in made.parameters()) == 6 * 8 + 8 + 8 * 8 + 8 + 8 + 8 * 3 + 3
    linear = [m for m in made.modules() if isinstance(m, nn.Linear)]
    assert len({id(m.weight) for m in linear}) == 3


def test_by_hand() -> None:
    """The naive way: slice a convolution's filters, its norm and the next layer's inputs."""
    torch.manual_seed(0)
    conv, norm, last = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 3)
    of = given(nn.Sequential(conv, norm, nn.ReLU(), last), torch.randn(2, 3, 9, 9))
    stays = torch.sort(torch.topk(conv.weight.abs().sum((1, 2, 3)), 8).indices).values
    x = torch.from_numpy(of.example[0])
    y = F.conv2d(x, conv.weight[stays], conv.bias[stays])
    y = F.batch_norm(y, norm.running_mean[stays], norm.running_var[stays], norm.weight[stays], norm.bias[stays])
    expected = F.conv2d(F.relu(y), last.weight[:, stays], last.bias)
    made = PruneStructure(saliency="l1").apply(of, seen(of))
    np.testing.assert_allclose(forward(made, of.example)[0], expected.detach().numpy(), atol=1e-5)


def test_what_cannot_shrink_is_named_with_its_reason() -> None:
    of = network("transformer")
    with pytest.raises(Unsupported, match=r"mlp\.3 cannot shrink: norm1 takes its mean"):
        PruneStructure(only=("mlp.3",)).apply(of, seen(of))
    with pytest.raises(UsageError, match=r"no layer is named 'mpl\.0'; the nearest are mlp\.0"):
        PruneStructure(only=("mpl.0",)).apply(of, seen(of))
    alone = given(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    with pytest.raises(Unsupported, match=r"nothing in this network can shrink \(0: the network gives it out\)"):
        PruneStructure.space(alone)


def test_an_unknown_operator_is_pruned_around_never_through() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(self.b(torch.sort(self.a(x), dim=1).values)))

    of = given(Sorted(), torch.randn(3, 4))
    structure = analyse(of)
    assert "aten.sort" in structure.refused["a"]
    made = PruneStructure().apply(of, seen(of)).module
    assert (made.a.out_features, made.b.out_features) == (16, 8)


def test_a_wrong_cut_is_caught_before_it_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fault in the cutting, nothing comes out."""
    of = network("cnn")
    whole = rewrite._slice

    def off_by_one(module, trace, gone):  # type: ignore[no-untyped-def]
        whole(module, trace, gone)
        with torch.no_grad():
            next(iter(module.parameters())).copy_(next(iter(module.parameters())).roll(1, 0))

    monkeypatch.setattr(rewrite, "_slice", off_by_one)
    with pytest.raises(Unsupported, match="its outputs differ by"):
        PruneStructure().apply(of, seen(of))


@pytest.mark.parametrize("rule", saliency.SALIENCIES)
def test_saliencies(rule: str) -> None:
    """Each against its formula, written out, on the two convolutions of a small network."""
    of = network("cnn")
    context = seen(of, classes=10)
    structure = analyse(of)
    found = saliency.scores(structure, list(structure.families), rule, context)[0]  # type: ignore[arg-type]
    conv, norm = of.module[0], of.module[1]
    rows = conv.weight.detach().flatten(1)
    expected = {
        "l1": rows.abs().sum(1),
        "l2": rows.norm(dim=1),
        "fpgm": torch.stack([(rows - row).norm(dim=1).sum() for row in rows]),
        "bn": norm.weight.detach().abs(),
        "taylor": _taylor(of, context),
    }.get(rule)
    if expected is None:
        assert not np.array_equal(found, saliency.scores(structure, list(structure.families), "random", replace(context, seed=1))[0])
        return
    scale = 1.0 if rule == "bn" else float(expected.mean())
    np.testing.assert_allclose(found, expected.numpy() / scale, rtol=2e-4)


def _taylor(of: Network, context: Context) -> Tensor:
    conv = of.module[0]
    assert context.train.labels is not None
    loss = F.cross_entropy(of.module(torch.from_numpy(context.train.inputs[0])), torch.from_numpy(context.train.labels))
    (gradient,) = torch.autograd.grad(loss, conv.weight)
    return (gradient * conv.weight).detach().flatten(1).sum(1).square()


def test_the_saliency_of_batch_norms_needs_batch_norms() -> None:
    of = network("mlp")
    with pytest.raises(Unsupported, match="needs a batch norm behind 1, it has none"):
        PruneStructure(saliency="bn").apply(of, seen(of))


@pytest.mark.parametrize("scope", ["layer", "global", "sensitivity"])
def test_scopes_reach_about_the_ratio(scope: str) -> None:
    of = network("resnet")
    made = PruneStructure(ratio=0.5, scope=scope, multiple=1).apply(of, seen(of))  # type: ignore[arg-type]
    before, after = (sum(p.numel() for p in n.module.parameters()) for n in (of, made))
    assert 0.15 < after / before < 0.75


def test_a_sensitive_layer_is_spared() -> None:
    """What the outputs hang on stays; what they do not hang on goes first."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        module[0].weight[8:] *= 1e-3  # most units of the first layer do nothing
        module[0].bias[8:] = 0
    of = Network(kind="module", body=module.eval(), example=(torch.randn(8, 8).numpy(),))
    made = PruneStructure(ratio=0.3, scope="sensitivity", multiple=1).apply(of, seen(of)).module
    assert made.get_submodule("0").out_features < made.get_submodule("2").out_features


def test_widths_stay_multiples() -> None:
    of = given(nn.Sequential(nn.Linear(5, 48), nn.ReLU(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 3)), torch.randn(4, 5))
    made = PruneStructure(ratio=0.4, multiple=16).apply(of, seen(of)).module
    assert [made.get_submodule(n).out_features for n in ("0", "2")] == [32, 12]  # 20 is below twice 16


def test_in_rounds_with_training_between() -> None:
    of = network("cnn")
    made = PruneStructure(ratio=0.5, rounds=2, multiple=1, epochs=1).apply(of, seen(of)).module
    assert [made.get_submodule(n).out_channels for n in ("0", "4")] == [8, 12]
    once = PruneStructure(ratio=0.5, multiple=1).apply(of, seen(of)).module
    assert not torch.equal(made.get_submodule("9").bias, once.get_submodule("9").bias)


@pytest.mark.parametrize(
    ("width", "ratio", "rounds", "multiple", "left"),
    [(16, 0.5, 2, 8, 8), (40, 0.5, 2, 8, 16), (32, 0.875, 7, 8, 8), (2, 0.75, 2, 1, 1)],
)
def test_rounds_end_at_the_widths_of_one_round(width: int, ratio: float, rounds: int, multiple: int, left: int) -> None:
    """Also where a round takes nothing out, where widths fall below twice the multiple on the way, or one unit is left early."""
    of = given(nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)), torch.randn(4, 4))
    for turns in (1, rounds):
        made = PruneStructure(ratio=ratio, rounds=turns, multiple=multiple, epochs=0.1).apply(of, seen(of)).module
        assert made.get_submodule("0").out_features == left


def test_rounds_that_take_nothing_at_all_are_refused() -> None:
    of = given(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(4, 4))
    with pytest.raises(Unsupported, match="no unit can go at this ratio and multiple: the widest layer, 0, has 16 units"):
        PruneStructure(ratio=0.1, rounds=2).apply(of, seen(of))


def test_ties_among_all_units_are_shared_out() -> None:
    """Norms that were never trained: all scales are alike, and no layer has a lower one than another."""
    body = [nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 4, 1)]
    of = Network(kind="module", body=nn.Sequential(*body).eval(), example=(torch.randn(2, 3, 4, 4).numpy(),))
    made = PruneStructure(ratio=0.5, saliency="bn", scope="global", multiple=1).apply(of, seen(of)).module
    assert [made.get_submodule(n).out_channels for n in ("0", "3")] == [8, 16]


def test_of_all_units_the_least_go() -> None:
    assert shares.together([np.array([1.0, 3.0]), np.array([1.0, 2.0, 3.0, 6.0])], 0.5) == [0.5, 0.5]
    assert shares.together([np.ones(4), np.full(8, 0.1)], 0.5) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ratio": 1.0}, r"ratio must be in \(0, 1\), got 1.0"),
        ({"ratio": 0.0}, r"ratio must be in \(0, 1\), got 0.0"),
        ({"saliency": "l3"}, "saliency must be one of l1"),
        ({"scope": "here"}, "scope must be one of layer"),
        ({"multiple": 0}, "multiple must be at least 1, got 0"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"epochs": 0.0}, "epochs must be above 0, got 0.0"),
    ],
)
def test_bad_settings(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PruneStructure(**settings)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="only must be a tuple"):
        PruneStructure(only="conv")  # type: ignore[arg-type]
