"""First weights: schemes that keep the size of activations and gradients from layer to layer, and what the data say before the first step.

Shapes: images (n, channels, height, width).
"""

from __future__ import annotations

import copy
from typing import Literal, get_args

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from hasten.core.data import View
from hasten.core.errors import Unsupported, UsageError

Scheme = Literal["kaiming", "xavier", "orthogonal", "dirac", "normal", "zeros"]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LEAST_VARIANCE = 5e-4  # added to the patches' variances: directions that hardly occur are not blown up


def initialized(module: nn.Module, scheme: Scheme, *, seed: int = 0) -> nn.Module:
    """A copy whose linear layers and convolutions begin anew; biases are 0, norms stay.

    Args:
        scheme: "kaiming": normal with variance 2/fan_in, for ReLU; "xavier": uniform with variance 2/(fan_in + fan_out), for
            tanh; "orthogonal": W Wᵀ = I; "normal": with deviation 0.02; "zeros"; "dirac": convolutions pass their
            channels through as far as there are as many, what is left and linear layers as in "kaiming".
        seed: of the draws.

    Raises:
        UsageError: on an unknown scheme.

    References:
        K. He et al., "Delving Deep into Rectifiers", 2015, arXiv:1502.01852.
        X. Glorot, Y. Bengio, "Understanding the Difficulty of Training Deep Feedforward Neural Networks", 2010.
        A. Saxe et al., "Exact Solutions to the Nonlinear Dynamics of Learning in Deep Linear Neural Networks", 2013, arXiv:1312.6120.
        S. Zagoruyko, N. Komodakis, "DiracNets", 2017, arXiv:1706.00388.
    """
    if scheme not in get_args(Scheme):
        raise UsageError(f"scheme must be one of {list(get_args(Scheme))}, got {scheme!r}")
    made = copy.deepcopy(module)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for layer in [m for m in made.modules() if isinstance(m, (nn.Linear, *_CONVOLUTIONS))]:
            _draw(layer, scheme)
            if layer.bias is not None:
                layer.bias.zero_()
    return made


def _draw(layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d, scheme: Scheme) -> None:
    weight = layer.weight
    if scheme == "xavier":
        nn.init.xavier_uniform_(weight)
    elif scheme == "orthogonal":
        nn.init.orthogonal_(weight)
    elif scheme == "normal":
        nn.init.normal_(weight, std=0.02)
    elif scheme == "zeros":
        nn.init.zeros_(weight)
    else:
        nn.init.kaiming_normal_(weight, nonlinearity="relu")
    if scheme == "dirac" and isinstance(layer, _CONVOLUTIONS) and layer.groups == 1:
        passed = min(weight.shape[:2])
        nn.init.dirac_(weight[:passed])


class Standardized(nn.Module):
    """A network behind (x − mean)/std on its first input, one pair per channel or feature. `FoldInput` folds it into the first layer.

    Args:
        body: the network.
        mean, std: shaped like an input, with 1 along the axes that share a number; std above 0.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, body: nn.Module, mean: torch.Tensor, std: torch.Tensor) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> object:
        return self.body((x - self.mean) / self.std, *others)


def standardized(module: nn.Module, view: View) -> Standardized:
    """The network behind a standardization that these examples give: mean 0 and variance 1 for each channel or feature (axis 1).

    Give it the training examples alone. A feature that never changes is only shifted.

    Raises:
        UsageError: where the first input is not of floats with an axis behind that of the examples.
    """
    x = view.inputs[0]
    if x.dtype.kind != "f" or x.ndim < 2:
        raise UsageError(f"standardizing needs a first input of floats, (examples, features, …), got {x.dtype} of shape {x.shape}")
    others = (0, *range(2, x.ndim))
    mean = x.mean(others, dtype=np.float64, keepdims=True)
    std = x.std(others, dtype=np.float64, keepdims=True)
    std = np.where(std > np.abs(mean) * np.finfo(x.dtype).eps, std, 1.0)  # what never changes has no more than rounding
    return Standardized(copy.deepcopy(module), *(torch.from_numpy(a[0].astype(x.dtype)) for a in (mean, std)))


def whitened(module: nn.Module, images: torch.Tensor, *, layer: str) -> nn.Module:
    """A copy in which a convolution that reads the images turns their patches into uncorrelated values of variance 1.

    The kernels are the eigenvectors of the patches' covariance over the roots of their variances, the largest first, then the
    same with the sign turned: W = [V/√(λ + 0.0005); −V/√(λ + 0.0005)]. Where there are more channels, the others stay.
    Train with `freeze=(layer,)` to keep it so.

    Raises:
        UsageError: no layer of that name, or images of another number of channels.
        Unsupported: the layer is no plain 2-D convolution.

    References:
        K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024, arXiv:2404.00498.
    """
    made = copy.deepcopy(module)
    found = dict(made.named_modules()).get(layer)
    if found is None:
        raise UsageError(f"no layer is named {layer!r}; it has {', '.join(n for n, _ in made.named_modules() if n)[:200]}")
    if not isinstance(found, nn.Conv2d) or found.groups != 1 or found.dilation != (1, 1):
        raise Unsupported(f"whitening needs a plain 2-D convolution, {layer!r} is {type(found).__name__}")
    if images.ndim != 4 or images.shape[1] != found.in_channels:
        raise UsageError(f"whitening {layer!r} needs images of {found.in_channels} channels, got {tuple(images.shape)}")
    with torch.no_grad():
        patches = F.unfold(images, found.kernel_size).movedim(1, 2).flatten(0, 1).double()  # (places, values)
        variances, vectors = torch.linalg.eigh(torch.cov(patches.T))
        kernels = (vectors / (variances + _LEAST_VARIANCE).sqrt()).T.flip(0)
        kernels = torch.cat([kernels, -kernels])[: found.out_channels].to(found.weight)
        found.weight[: len(kernels)] = kernels.view(-1, *found.weight.shape[1:])
        if found.bias is not None:
            found.bias[: len(kernels)] = -(kernels @ patches.mean(0).to(kernels))
    return made
