"""Edges of the steps: pieces of one output, modules that stand in two places, frozen weights, batches of one size, writing in place."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hasten import compress
from hasten.compress import Equalize, FoldBatchNorm, PruneBlocks, PruneStructure, PruneWeights, QuantizeAware, ShareWeights
from hasten.compress.layers import lifted
from hasten.core.data import View
from hasten.core.errors import DataRefused, Unsupported, UsageError
from hasten.core.network import Network
from hasten.core.recipe import Context
from hasten.engines import OnnxRuntime
from hasten.load.lower import forward, relative_difference
from hasten.train.targets import class_axis


def network(module: nn.Module, *shape: int, **more: Any) -> Network:
    torch.manual_seed(0)
    for value in module.parameters():
        if value.ndim > 1:
            nn.init.normal_(value, std=0.3)
    return Network(kind="module", body=module.eval(), example=(example(4, *shape),), **more)


def example(n: int, *shape: int) -> np.ndarray:  # type: ignore[type-arg]
    return np.random.default_rng(0).standard_normal((n, *shape)).astype(np.float32)


def context(*shape: int, n: int = 32) -> Context:
    view = View(inputs=(example(n, *shape),), labels=np.arange(n) % 2)
    return Context(train=view, calibrate=view)


class Pieces(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.first, self.head = nn.Conv2d(3, sum(sizes), 1), nn.Conv2d(sizes[0], sizes[0], 1)
        self.last = nn.Conv2d(sum(sizes), 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.first(x).split(list(self.sizes), 1)
        return self.last(torch.cat([self.head(a), b], 1)).mean((2, 3))


@pytest.mark.parametrize("sizes", [(4, 12), (12, 4)])
def test_each_piece_of_an_output_loses_its_own_share(sizes: tuple[int, int]) -> None:
    of = network(Pieces(*sizes), 3, 4, 4)
    made = PruneStructure(ratio=0.5, multiple=1).apply(of, context(3, 4, 4)).module
    assert made.first.out_channels == 8  # type: ignore[union-attr]
    assert made.head.in_channels == sizes[0] // 2  # type: ignore[union-attr]


class Reused(nn.Module):
    """torch.fx cannot trace it, so neighbours are told by the Sequential alone."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.ReLU()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), act, nn.Conv2d(8, 8, 3), act, nn.BatchNorm2d(8))
        norm = self.body[4]
        norm.running_mean.fill_(1.0)
        norm.running_var.fill_(4.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] > 64:
            x = x[..., :64]
        return self.body(x).mean((2, 3))


def test_a_norm_behind_a_module_that_stands_twice_is_left() -> None:
    of = network(Reused(), 3, 8, 8)
    with pytest.raises(Unsupported, match="found none"):
        FoldBatchNorm().apply(of, context(3, 8, 8))


class Hidden(nn.Module):
    """Reads a layer's weight where no trace sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.body[1].running_var.fill_(4.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] > 64:
            x = x[..., :64]
        return nn.functional.linear(self.body(x), self.body[0].weight.t())


def test_a_fold_that_changes_the_outputs_is_refused() -> None:
    with pytest.raises(Unsupported, match="changed its outputs"):
        FoldBatchNorm().apply(network(Hidden(), 4), context(4))


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(4), requires_grad=False)
        self.layer = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x + self.table)


def test_what_does_not_train_stays_so_when_lifted() -> None:
    def learns(module: nn.Module) -> dict[str, bool]:
        return {name: p.requires_grad for name, p in lifted(network(module, 4)).named_parameters()}

    assert learns(Table()) == {"table": False, "layer.weight": True, "layer.bias": True}
    assert set(learns(Table().requires_grad_(False)).values()) == {True}  # made ready to be used, not to be kept


class Eights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x.view(8, 8))))


def test_shares_by_sensitivity_are_told_in_batches_that_the_network_takes() -> None:
    of = Network(kind="module", body=network(Eights(), 8).body, example=(example(8, 8),), fixed_batch=8)
    made = PruneStructure(ratio=0.5, scope="sensitivity", multiple=1).apply(of, context(8))
    assert forward(made, (example(8, 8),))[0].shape == (8, 2)


def test_gradients_need_batches() -> None:
    of = Network(kind="module", body=nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), example=(example(1, 8),), fixed_batch=1)
    with pytest.raises(Unsupported, match="one example at a time"):
        PruneStructure(saliency="taylor").apply(of, context(8))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        x += self.b(x)
        return x.mean((2, 3))


def test_a_block_that_is_added_in_place_goes_as_well() -> None:
    of = network(InPlace(), 3, 6, 6)
    made = PruneBlocks(blocks=1).apply(of, context(3, 6, 6))
    assert [name for name, m in made.module.named_modules() if isinstance(m, nn.Conv2d)] == ["a"]
    with torch.no_grad():
        expected = of.module.a(torch.from_numpy(of.example[0])).mean((2, 3)).numpy()  # type: ignore[operator]
    assert relative_difference(expected, forward(made, of.example)[0]) < 1e-6


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start, self.enc, self.dec = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.dec.weight = self.enc.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.enc(torch.relu(self.start(x)))
        return nn.functional.linear(h, self.dec.weight.t())


def test_a_weight_that_another_layer_holds_keeps_its_scale() -> None:
    of = network(Tied(), 4)
    try:
        made = Equalize().apply(of, context(4))
    except Unsupported:
        return
    assert relative_difference(forward(of, of.example)[0], forward(made, of.example)[0]) < 1e-5


def test_rounded_training_needs_a_batch_to_calibrate_by() -> None:
    of = Network(kind="module", body=network(Eights(), 8).body, example=(example(8, 8),), fixed_batch=8)
    few = context(8, n=32)
    few = Context(train=few.train, calibrate=few.train.take(slice(0, 4)), original=of, profile=OnnxRuntime().profile)
    with pytest.raises(DataRefused, match="at least 8 examples"):
        QuantizeAware().apply(of, few)


def test_training_reads_the_axis_of_classes_as_the_scores_do() -> None:
    assert class_axis(torch.zeros(5, 3, 3), (5, 3)) == -1
    assert class_axis(torch.zeros(5, 4, 3), (5, 3)) == 1
    assert class_axis(torch.zeros(5, 4), (5,)) == -1


def deep(blocks: int) -> Network:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(blocks))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + torch.relu(layer(x))
            return x

    return network(Added(), 4)


@pytest.mark.parametrize(
    ("depth", "numbers"), [(1, (1,)), (3, (1, 2, 3)), (8, (1, 2, 3, 4)), (16, (1, 2, 3, 4, 8)), (24, (1, 2, 3, 6, 12))]
)
def test_of_a_deep_network_more_blocks_may_go(depth: int, numbers: tuple[int, ...]) -> None:
    assert PruneBlocks.space(deep(depth)) == {"blocks": numbers}


def whole_fields() -> list[tuple[type, str]]:
    """Every field of every step of the room that holds whole numbers alone, by its annotation."""
    steps = [getattr(compress, name) for name in compress.__all__ if dataclasses.is_dataclass(getattr(compress, name))]
    return [(s, f.name) for s in steps for f in dataclasses.fields(s) if str(f.type) in ("int", "int | None", "Literal[8, 4]")]


@pytest.mark.parametrize(("step", "name"), [*whole_fields(), (PruneWeights, "pattern")], ids=str)
@pytest.mark.parametrize("wrong", [4.5, 8.0, "8", True])
def test_numbers_that_are_not_whole_are_refused_at_once(step: type, name: str, wrong: object) -> None:
    with pytest.raises(UsageError, match=f"{name} must be .*whole number.*, got"):
        step(**{name: (wrong, 16) if name == "pattern" else wrong})


def test_there_are_fields_to_check() -> None:
    assert {"rounds", "multiple", "bits", "groups", "rank", "weight_bits", "batch", "block", "multiplier"} <= {n for _, n in whole_fields()}
    assert ShareWeights(bits=np.int64(4)) == ShareWeights(bits=4)  # type: ignore[arg-type]
