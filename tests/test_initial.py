"""First weights: each scheme keeps what it promises, and the user's network stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hasten.compress import FoldInput
from hasten.core.data import View
from hasten.core.errors import Unsupported, UsageError
from hasten.core.recipe import Context
from hasten.load.files import from_module
from hasten.train.initial import initialized, standardized, whitened
from lessons import contents, image, plain, seeded


@pytest.mark.parametrize(("scheme", "variance"), [("kaiming", 2 / 400), ("xavier", 2 / 600), ("normal", 0.0004), ("zeros", 0.0)])
def test_schemes_have_their_variance(scheme, variance):
    module = nn.Sequential(nn.Linear(400, 200), nn.BatchNorm1d(200))
    before, state = contents(module), torch.get_rng_state()
    made = initialized(module, scheme)
    assert made[0].weight.var().item() == pytest.approx(variance, rel=0.05)
    assert not made[0].bias.any()
    assert contents(module) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert contents(initialized(module, scheme)) == contents(made)


def test_orthogonal_keeps_lengths():
    weight = initialized(nn.Linear(8, 8), "orthogonal").weight
    assert torch.allclose(weight @ weight.T, torch.eye(8), atol=1e-5)


def test_dirac_passes_channels_through():
    made = initialized(nn.Conv2d(3, 5, 3, padding=1), "dirac")
    x = torch.randn(2, 3, 6, 6)
    assert torch.allclose(made(x)[:, :3], x, atol=1e-6)
    assert made.weight[3:].std() > 0.1


def test_whitening_makes_patches_uncorrelated():
    images = F.avg_pool2d(torch.randn(200, 2, 18, 18, generator=torch.Generator().manual_seed(0)), 3, 1) + 1  # neighbours hang together
    module = nn.Sequential(nn.Conv2d(2, 40, 3), nn.ReLU())
    made = whitened(module, images, layer="0")
    values = made[0](images).detach().movedim(1, 3).flatten(0, 2)
    assert torch.allclose(values.mean(0)[:36], torch.zeros(36), atol=1e-3)
    covariance = torch.cov(values[:, :18].T)
    assert (covariance - torch.eye(18)).abs().max() < 0.25, "the added variance takes some from the least"
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() < 1e-3
    assert torch.allclose(values[:, 18:36], -values[:, :18], atol=1e-4)
    assert torch.equal(made[0].weight[36:], module[0].weight[36:])
    before = torch.cov(module[0](images).detach().movedim(1, 3).flatten(0, 2)[:, :18].T)
    assert (before - torch.diag(before.diagonal())).abs().max() > 1e-2, "without whitening they are correlated"


def test_refusals():
    with pytest.raises(UsageError, match="scheme must be one of"):
        initialized(plain(), "lecun")
    with pytest.raises(UsageError, match="no layer is named 'stem'; it has 0, 1"):
        whitened(seeded(image), torch.zeros(2, 1, 8, 8), layer="stem")
    with pytest.raises(Unsupported, match="needs a plain 2-D convolution, '1' is BatchNorm2d"):
        whitened(seeded(image), torch.zeros(2, 1, 8, 8), layer="1")
    with pytest.raises(UsageError, match=r"needs images of 1 channels, got \(2, 3, 8, 8\)"):
        whitened(seeded(image), torch.zeros(2, 3, 8, 8), layer="0")


@pytest.mark.parametrize("shape", [(500, 3), (500, 3, 5, 4)], ids=["features", "channels"])
def test_standardized_inputs_have_mean_0_and_variance_1(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    x = x * np.array([1, 50, 0], np.float32).reshape(1, 3, *[1] * (x.ndim - 2)) + np.float32(0.1)  # the last one never changes
    module = nn.Identity()
    made = standardized(module, View(inputs=(x,), labels=None))
    found = made(torch.from_numpy(x)).double()
    others = (0, *range(2, found.ndim))
    assert torch.allclose(found.mean(others), torch.zeros(3, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(found.var(others, correction=0), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64), atol=1e-4)


def test_the_standardization_folds_into_the_first_layer():
    x = (np.random.default_rng(0).normal(size=(300, 6)) * [1, 2, 3, 4, 50, 0.1] + 7).astype(np.float32)
    view = View(inputs=(x,), labels=None)
    made = standardized(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), view)
    network = from_module(made, (x[:4],))
    folded = FoldInput().apply(network, Context(train=view, calibrate=view))
    given = torch.from_numpy(x)
    assert torch.allclose(folded.module(given), made(given), atol=1e-4)
    layers = [node.target for node in folded.module.graph.nodes if node.op in ("call_function", "call_module")]
    assert len(layers) == 3, layers


def test_what_cannot_be_standardized():
    with pytest.raises(UsageError, match=r"a first input of floats, .* got int64 of shape \(4, 3\)"):
        standardized(nn.Identity(), View(inputs=(np.zeros((4, 3), np.int64),), labels=None))
