"""Factors and widths held against the libraries for them: tensorly and Torch-Pruning."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from hasten.compress import PruneStructure
from hasten.compress.factorize import tensors
from hasten.core.data import View
from hasten.core.recipe import Context
from hasten.measure import counts
from networks import network

SHAPES = [(24, 16, 3, 3), (12, 20, 5, 5), (16, 9, 7)]


def kernel(shape: tuple[int, ...]) -> torch.Tensor:
    """Smooth enough to have something to factor, and noise."""
    draws = torch.Generator().manual_seed(sum(shape))
    terms = [[torch.randn(n, generator=draws, dtype=torch.float64) for n in shape] for _ in range(6)]
    whole = torch.zeros(shape, dtype=torch.float64)
    for first, *rest in terms:
        term = first
        for vector in rest:
            term = term.unsqueeze(-1) * vector
        whole += term
    return whole + 0.3 * torch.randn(shape, generator=draws, dtype=torch.float64)


def relative(weight: torch.Tensor, other: np.ndarray | torch.Tensor) -> float:
    return float((weight - torch.as_tensor(other)).norm() / weight.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tucker_is_as_near_as_that_of_tensorly(shape: tuple[int, ...]) -> None:
    import tensorly
    from tensorly.decomposition import partial_tucker

    weight = kernel(shape)
    for ranks in ((4, 4), (7, 3)):
        (core, factors), _ = partial_tucker(weight.numpy(), rank=ranks, modes=[0, 1], init="svd", n_iter_max=200, tol=1e-9)
        theirs = relative(weight, tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1]))
        assert relative(weight, tensors.tucker(weight, *ranks).whole()) <= theirs * 1.0001


@pytest.mark.filterwarnings("ignore:Trying to compute SVD:UserWarning")  # tensorly says where it fills up with random vectors
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cp_is_as_near_as_that_of_tensorly(shape: tuple[int, ...]) -> None:
    import tensorly
    from tensorly.decomposition import parafac

    weight = kernel(shape)
    for rank in (3, 6):
        theirs = relative(weight, tensorly.cp_to_tensor(parafac(weight.numpy(), rank, n_iter_max=300, init="svd", tol=1e-9)))
        assert relative(weight, tensors.polyads(weight, rank, 0).whole()) <= theirs * 1.05  # each stops in a valley of its own


@pytest.mark.parametrize("name", ["cnn", "resnet", "mobilenet", "dilated"])
def test_as_many_parameters_stay_as_in_torch_pruning(name: str) -> None:
    """Half of every family, in ordinary networks: the dependency graphs agree on what goes together."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch_pruning

    of = network(name)
    view = View(inputs=of.example, labels=np.zeros(len(of.example[0]), np.int64))
    ours = PruneStructure(ratio=0.5, multiple=1).apply(of, Context(train=view, calibrate=view))
    theirs = network(name).module
    last = [m for m in theirs.modules() if isinstance(m, nn.Linear)][-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = torch_pruning.pruner.MetaPruner(
            theirs,
            tuple(map(torch.from_numpy, of.example)),
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=[last],
        )
        pruner.step()
    assert counts.parameters(ours) == sum(p.numel() for p in theirs.parameters())
