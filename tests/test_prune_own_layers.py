"""Pruning of single weights in layers of the user's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hasten.compress import PruneWeights
from hasten.compress.prune import weight_masks as masks
from hasten.core.errors import Unsupported, UsageError
from hasten.core.network import Network
from test_prune_weights import pruned


class Rows(nn.Module):
    """A linear layer of somebody's own, its weight (in, out), as GPT-2 has them."""

    def __init__(self, inner: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inner, out)), nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Scaled(nn.Module):
    """Holds a weight without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.table)


class Named(nn.Linear):
    """A linear layer under another name."""


class Standard(nn.Linear):
    """Does something of its own with its weight: zeros in it would not be zeros in what it multiplies by."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight - self.weight.mean(), self.bias)


def own_layers() -> Network:
    torch.manual_seed(0)
    body = nn.Sequential(
        Named(12, 16), nn.ReLU(), Rows(16, 8), nn.ReLU(), Scaled(), nn.ReLU(), Standard(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    return Network(kind="module", body=body.eval(), example=(torch.randn(4, 12).numpy(),))


def test_layers_of_the_users_own_are_not_passed_over() -> None:
    made = pruned(PruneWeights(amount=0.5), own_layers())
    zeros = {name: masks.zeros([p]) for name, p in made.named_parameters() if p.ndim > 1}
    assert zeros == {"0.weight": 0.5, "2.weight": 0.5, "4.table_linear.weight": 0.5, "6.weight": 0.0, "8.weight": 0.5}


def test_layers_of_the_users_own_go_by_the_names_that_he_gave_them() -> None:
    of = own_layers()
    for name in ("2", "4"):
        made = pruned(PruneWeights(only=(name,)), of)
        assert [n[0] for n, p in made.named_parameters() if p.ndim > 1 and masks.zeros([p])] == [name]
    made = pruned(PruneWeights(keep=("2", "4")), of)
    assert [n for n, p in made.named_parameters() if p.ndim > 1 and masks.zeros([p])] == ["0.weight", "8.weight"]
    with pytest.raises(UsageError, match="no layer is named '7a'"):
        pruned(PruneWeights(only=("7a",)), of)


def test_a_pattern_runs_along_the_inputs_of_such_layers_too() -> None:
    made = pruned(PruneWeights(pattern=(1, 4), only=("2",)), own_layers())
    weight = made.get_parameter("2.weight")
    assert (weight.view(4, 4, 8) != 0).sum(1).eq(1).all()


def test_zeros_of_such_layers_are_held_in_training() -> None:
    made = pruned(PruneWeights(amount=0.5, schedule="gradual", epochs=2), own_layers())
    assert masks.zeros([made.get_parameter("2.weight")]) == 0.5
    with pytest.raises(Unsupported, match=r"needs to see a layer's input, that of '2' \(Module\)"):
        pruned(PruneWeights(saliency="activation"), own_layers())


def test_what_cannot_be_exported_is_pruned_as_it_stands() -> None:
    class Choosy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.last = Rows(12, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.own(x)) if float(x.sum()) > 1e9 else self.last(self.own(x)) * 2

    torch.manual_seed(0)
    of = Network(kind="module", body=Choosy().eval(), example=(torch.randn(4, 12).numpy(),))
    made = pruned(PruneWeights(), of)
    assert masks.zeros([made.get_parameter("last.weight")]) == 0.5
