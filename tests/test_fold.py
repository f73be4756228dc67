"""Folding of batch norms: every kind of layer, every door, and what must be left alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from hasten.compress import FoldBatchNorm
from hasten.core.data import View
from hasten.core.errors import Unsupported
from hasten.core.network import Network
from hasten.core.recipe import Context, part_from_json, part_to_json
from hasten.load.lift import lift


class Residual(nn.Module):
    """The first convolution is read twice, the norm behind it must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.second_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + self.second_norm(self.second(torch.relu(self.first_norm(x))))


class Shared(nn.Module):
    """One convolution with two norms, and a pair of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.left, self.right = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.left(self.conv(x)) + self.right(self.conv(x)))


class Branching(nn.Module):
    """Its forward looks at values, so torch.fx cannot trace it; `loose` is called layer by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.loose = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = x = self.body(x)
        if x.sum() > 0:
            x = self.loose[0](x)
        return self.loose[1](x) + 1


class Reused(nn.Module):
    """Cannot be traced; calls one part twice, and another one never."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.rest = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.body(x))
        return self.rest[1](self.rest[0](x) + 1) if torch.isnan(x).any() else x


class Tied(nn.Module):
    """Reads the weight of the layer elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x)) @ self.inner.weight


class Twice(nn.Module):
    """Reads its norm twice."""

    def __init__(self, norm: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.layer = norm, layer

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.layer(x) + x


def chain(layer: nn.Module, norm: nn.Module) -> nn.Module:
    return nn.Sequential(layer, norm, nn.ReLU())


FOLDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: chain(nn.Linear(5, 7), nn.BatchNorm1d(7)), (5,), 0),
    "conv1d": (lambda: chain(nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)), (4, 9), 0),
    "conv2d": (lambda: chain(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)), (3, 7, 7), 0),
    "conv2d, norm without weights": (lambda: chain(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)), (3, 7, 7), 0),
    "conv3d": (lambda: chain(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4)), (2, 4, 4, 4), 0),
    "transposed": (lambda: chain(nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6)), (4, 5, 5), 0),
    "transposed in groups": (lambda: chain(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)), (4, 5), 0),
    "residual": (Residual, (3, 6, 6), 1),
    "shared": (Shared, (3, 6, 6), 2),
    "norm before linear": (lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 7)), (5,), 0),
    "norm before conv": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)), (4, 7, 7), 0),
    "norm before reflecting conv": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")),
        (4, 7, 7),
        0,
    ),
    "norm before a transposed, every place under all of the kernel": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3, padding=2, groups=2)),
        (4, 7, 7),
        0,
    ),
    "norm before a transposed, dilated": (
        lambda: nn.Sequential(nn.BatchNorm1d(4), nn.ConvTranspose1d(4, 6, 2, padding=3, dilation=2, bias=False)),
        (4, 9),
        0,
    ),
    "norm before a transposed, pointwise": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 1)), (4, 5, 5), 0),
    "norm on both sides": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d(6)), (4, 7), 0),
    "norm between": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.Conv1d(6, 4, 3)), (4, 9), 0),
    "branching": (Branching, (3, 9, 9), 1),
    "reused": (Reused, (3, 6, 6), 1),
}

ALONE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "no norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (3, 6, 6)),
    "norm first, zeros padded": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)), (3, 6, 6)),
    "norm before a transposed": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 4, 3)), (3, 6, 6)),
    "norm before a transposed, one tap for each place": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 4, 2, stride=2)),
        (3, 6, 6),
    ),
    "norm before a transposed, too little padding": (
        lambda: nn.Sequential(nn.BatchNorm1d(3), nn.ConvTranspose1d(3, 4, 3, padding=1)),
        (3, 6),
    ),
    "norm before, both read": (lambda: Twice(nn.BatchNorm1d(6), nn.Linear(6, 6)), (6,)),
    "norm over channels, linear over the last axis": (lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 5)), (5, 5)),
    "something between": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), (3, 6, 6)),
    "norm over the middle axis": (lambda: chain(nn.Linear(5, 5), nn.BatchNorm1d(5)), (5, 5)),
    "no running statistics": (lambda: chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), (3, 6, 6)),
    "tied": (Tied, (6,)),
    "parametrized": (lambda: chain(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)), (3, 6, 6)),
}


def network(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> Network:
    """In double precision, with statistics and weights of its norms far from their start."""
    torch.manual_seed(0)
    module = build().double()
    for norm in (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        for values, low in ((norm.weight, 0.5), (norm.bias, -1.0), (norm.running_mean, -1.0), (norm.running_var, 0.3)):
            if values is not None:
                nn.init.uniform_(values, low, 2.0)
    return Network(kind="module", body=module.eval(), example=(torch.randn(4, *shape, dtype=torch.float64).numpy(),))


def fold(given: Network) -> nn.Module:
    view = View(inputs=given.example)
    return FoldBatchNorm().apply(given, Context(train=view, calibrate=view)).module


def outputs(module: nn.Module, given: Network) -> Tensor:
    with torch.no_grad():
        return module(torch.from_numpy(given.example[0]))


def norms(module: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())


@pytest.mark.parametrize("name", FOLDS)
def test_laws(name: str) -> None:
    build, shape, left = FOLDS[name]
    given = network(build, shape)
    before, state = repr(given.module), copy.deepcopy(given.module.state_dict())
    folded = fold(given)
    assert repr(given.module) == before, "the given module was changed"
    assert all(torch.equal(state[k], v) for k, v in given.module.state_dict().items())
    assert type(folded) is type(given.module)
    assert not folded.training
    assert norms(folded) == left
    torch.testing.assert_close(outputs(folded, given), outputs(given.module, given), rtol=1e-12, atol=1e-12)
    single = Network(kind="module", body=copy.deepcopy(given.module).float(), example=(given.example[0].astype("float32"),))
    torch.testing.assert_close(outputs(fold(single), single), outputs(single.module, single), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in FOLDS if n not in ("branching", "reused")])
def test_graph_modules_lose_the_node(name: str) -> None:
    build, shape, left = FOLDS[name]
    given = network(build, shape)
    traced = given.with_body(fx.symbolic_trace(given.module))
    folded = fold(traced)
    assert isinstance(folded, fx.GraphModule)
    assert norms(folded) == left
    assert not any(isinstance(m, nn.Identity) for m in folded.modules())
    torch.testing.assert_close(outputs(folded, given), outputs(given.module, given), rtol=1e-12, atol=1e-12)


def test_lifted_programs() -> None:
    given = network(Residual, (3, 6, 6))
    x = torch.from_numpy(given.example[0])
    program = torch.export.export(given.module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    folded = fold(given.with_body(lift(program)))
    assert norms(folded) == 1
    torch.testing.assert_close(outputs(folded, given), outputs(given.module, given), rtol=1e-12, atol=1e-12)


def test_norms_fold_through_pooling_and_flattening() -> None:
    body = nn.Sequential(nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(16, 3))
    given = network(lambda: body, (4, 6, 6))
    x = torch.from_numpy(given.example[0])
    program = torch.export.export(given.module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for form in (given.with_body(fx.symbolic_trace(given.module)), given.with_body(lift(program))):
        folded = fold(form)
        assert norms(folded) == 0
        torch.testing.assert_close(outputs(folded, given), outputs(given.module, given), rtol=1e-12, atol=1e-12)


class Averaged(nn.Module):
    """Averages over the channels of its norm, or over their places."""

    def __init__(self, axis: int, features: int) -> None:
        super().__init__()
        self.norm, self.head, self.axis = nn.BatchNorm1d(4), nn.Linear(features, 3), axis

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).mean(self.axis))


@pytest.mark.parametrize("axis", [1, -2, 2, -1])
def test_norms_fold_through_averages_over_places_only(axis: int) -> None:
    over_places = axis in (2, -1)
    given = network(lambda: Averaged(axis, 4 if over_places else 8), (4, 8))
    x = torch.from_numpy(given.example[0])
    lifted = given.with_body(lift(torch.export.export(given.module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))))
    if not over_places:
        with pytest.raises(Unsupported, match="batch norm directly behind"):
            fold(lifted)
        return
    torch.testing.assert_close(outputs(fold(lifted), given), outputs(given.module, given), rtol=1e-12, atol=1e-12)


def test_a_norm_that_only_scales_folds_into_a_padded_convolution() -> None:
    given = network(lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)), (3, 6, 6))
    nn.init.zeros_(given.module[0].bias)
    nn.init.zeros_(given.module[0].running_mean)
    folded = fold(given)
    assert norms(folded) == 0
    torch.testing.assert_close(outputs(folded, given), outputs(given.module, given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_norm_that_only_scales_folds_into_any_transposed_convolution(groups: int) -> None:
    layer = nn.ConvTranspose2d(6, 9, 3, stride=2, padding=1, output_padding=1, groups=groups)
    given = network(lambda: nn.Sequential(nn.BatchNorm2d(6), layer), (6, 5, 5))
    nn.init.zeros_(given.module[0].bias)
    nn.init.zeros_(given.module[0].running_mean)
    folded = fold(given)
    assert norms(folded) == 0
    torch.testing.assert_close(outputs(folded, given), outputs(given.module, given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ALONE)
def test_leaves_alone(name: str) -> None:
    with pytest.raises(
        Unsupported, match="batch norm directly behind a convolution or linear layer, or in front of one that pads with no zeros"
    ):
        fold(network(*ALONE[name]))


def test_hooks_are_respected() -> None:
    given = network(*FOLDS["conv2d"][:2])
    given.module[0].register_forward_hook(lambda layer, inputs, output: output + 1)
    with pytest.raises(Unsupported):
        fold(given)


def test_frozen_weights_stay_frozen() -> None:
    given = network(*FOLDS["conv2d"][:2])
    given.module.requires_grad_(False)
    assert not any(p.requires_grad for p in fold(given).parameters())


def test_keeps_no_trace_of_the_probe() -> None:
    given = network(Branching, (3, 9, 9))
    folded = fold(given)
    assert folded.last is None
    assert not any(m._forward_hooks for m in folded.modules())


def test_space_and_json() -> None:
    assert FoldBatchNorm.space(network(*FOLDS["linear"][:2])) == {}
    with pytest.raises(Unsupported, match="needs a network with batch norms, found none"):
        FoldBatchNorm.space(network(*ALONE["no norm"]))
    assert part_from_json(json.loads(json.dumps(part_to_json(FoldBatchNorm())))) == FoldBatchNorm()
