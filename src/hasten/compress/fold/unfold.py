"""A linear layer becomes two with nothing between them: the inverse of FoldLinear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hasten.compress import calls, layers
from hasten.compress.fold.compose import wide
from hasten.compress.settings import whole_numbers
from hasten.core.errors import Unsupported
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Space, Stage

_KINDS = (nn.Linear, *calls.CONVOLUTIONS)


@dataclass(frozen=True, kw_only=True)
class Unfold:
    """Splits each linear layer and each 1×1 convolution into two exact factors, W = (U√S)(√S Vᵀ), from its singular values.

    The outputs stay equal; trained, the two layers move differently from the one (gradient descent on a product favours directions
    that the layer already uses), and `FoldLinear` makes them one again, so a network can be trained wide and run narrow. The bias
    goes to the second factor, stride and padding of a convolution to the first. The network comes back lifted; the factors of the
    layer `name` are called `name.0` and `name.1`.

    Args:
        only: patterns of layer names; all linear layers and 1×1 convolutions without groups where it is empty.
        rank: width between the factors, at least the rank of every chosen matrix; None for the smaller side of each matrix.

    Raises:
        UsageError: where a pattern meets no layer.
        Unsupported: where nothing can be split; where `rank` is above the smaller side of a layer, or below the rank of its matrix.

    Reference: Sanjeev Arora, Nadav Cohen, Elad Hazan, "On the Optimization of Deep Networks: Implicit Acceleration by
    Overparameterization", 2018, arXiv 1802.06509.
    """

    takes: ClassVar[Kind] = "module"
    stage: ClassVar[Stage] = Stage.FOLD
    lossless: ClassVar[bool] = True
    aims: ClassVar[frozenset[Aim]] = frozenset({"score"})
    reads_profile: ClassVar[bool] = False

    only: tuple[str, ...] = ()
    rank: int | None = None

    def __post_init__(self) -> None:
        whole_numbers(self)
        layers.patterns("only", self.only)
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    def apply(self, network: Network, context: Context) -> Network:
        """The network with two layers for one, lifted, in eval mode."""
        del context
        module = layers.lifted(network)
        own = calls.own_layers(module)
        chosen = [n for n, m in layers.named(module, _KINDS, only=self.only).items() if n in own and is_matrix(m)]
        if not chosen:
            raise Unsupported("Unfold needs a linear layer or a 1×1 convolution without groups, found none")
        for name in chosen:
            layer = module.get_submodule(name)
            calls.replace(module, own[name], two_layers(layer, *self._factors(name, layer)))
        return network.with_body(calls.finish(module))

    @classmethod
    def space(cls, network: Network) -> Space:
        """Nothing to vary. Raises Unsupported on a network without linear layers and 1×1 convolutions."""
        if not any(type(m) in _KINDS and is_matrix(m) for m in network.module.modules()):
            raise Unsupported("Unfold needs a linear layer or a 1×1 convolution without groups, found none")
        return {}

    def _factors(self, name: str, layer: Any) -> tuple[Tensor, Tensor]:
        left, sizes, right = torch.linalg.svd(matrix(layer), full_matrices=False)
        full = len(sizes)
        rank = full if self.rank is None else self.rank
        if rank > full:
            raise Unsupported(f"rank must be at most {full}, the smaller side of {name}, got {rank}")
        tolerance = max(layer.weight.shape[:2]) * torch.finfo(layer.weight.dtype).eps
        needed = int((sizes > sizes[0] * tolerance).sum())
        if rank < needed:
            raise Unsupported(f"rank must be at least {needed}, the rank of the matrix of {name}, to leave it exact, got {rank}")
        root = sizes[:rank].sqrt()
        return root[:, None] * right[:rank], left[:, :rank] * root


def is_matrix(layer: Any) -> bool:
    """Whether the layer is a product with one matrix: linear, or a 1×1 convolution without groups."""
    return type(layer) is nn.Linear or (layer.groups == 1 and all(k == 1 for k in layer.kernel_size))


def matrix(layer: Any) -> Tensor:
    """The matrix (out, in) of such a layer, in 64 bits."""
    return wide(layer.weight).flatten(1)


def two_layers(layer: Any, inner: Tensor, outer: Tensor) -> list[nn.Module]:
    """Layers for outer (out, rank) · inner (rank, in) in the place of `layer`."""
    if type(layer) is nn.Linear:
        return [calls.linear(inner, None, like=layer), calls.linear(outer, layer.bias, like=layer)]
    ones = (...,) + (None,) * (layer.weight.dim() - 2)
    where = {"stride": layer.stride, "padding": layer.padding, "padding_mode": layer.padding_mode}
    return [calls.convolution(inner[ones], None, like=layer, **where), calls.convolution(outer[ones], layer.bias, like=layer)]
