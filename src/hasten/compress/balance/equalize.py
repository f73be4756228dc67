"""Cross-layer equalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from hasten.compress import layers
from hasten.compress.balance.chains import LAYERS, Pair, incoming, outgoing, pairs, scale_input, scale_output
from hasten.core.errors import Unsupported
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Space, Stage

_SWEEPS = 50
_STILL = 1e-4  # a sweep whose factors are all this near to 1 is the last


@dataclass(frozen=True, kw_only=True)
class Equalize:
    """Gives the channels between two layers the same range on both sides, so that one scale for all loses little.

    W₁ ← W₁ / s, b₁ ← b₁ / s, W₂ ← W₂ · s per channel, with s = √(r₁ / r₂), r₁ = max |W₁| of the channel's outputs and r₂ = max |W₂| of
    the weights that read it; again over all pairs until nothing moves. The function stays: between the layers lie only ReLU,
    LeakyReLU, PReLU, dropout, pooling and flattening (not ReLU6, whose end would have to move with the channel). Batch norms must be
    folded first. A layer that is called more than once, shares its weights or has several readers keeps its outputs. Channels without
    weight on one side stay. The result is in the lifted form.

    Args:
        only: patterns of layer names; a pair counts where both its layers are meant. All where it is empty.
        keep: patterns of layer names to leave alone.

    Reference:
        Markus Nagel, Mart van Baalen, Tijmen Blankevoort, Max Welling, "Data-Free Quantization Through Weight Equalization and Bias
        Correction", 2019, arXiv 1906.04721, section 4.1.
    """

    takes: ClassVar[Kind] = "module"
    stage: ClassVar[Stage] = Stage.BALANCE
    lossless: ClassVar[bool] = True
    aims: ClassVar[frozenset[Aim]] = frozenset({"score"})
    reads_profile: ClassVar[bool] = False

    only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        layers.patterns("only", self.only)
        layers.patterns("keep", self.keep)

    def apply(self, network: Network, context: Context) -> Network:
        """The network with equal ranges.

        Raises:
            Unsupported: where no two layers follow each other in such a way, or torch.export cannot follow the module.
            UsageError: where a pattern meets no layer.
        """
        del context
        made = layers.lifted(network)
        meant = layers.named(made, LAYERS, only=self.only, keep=self.keep)
        found = [pair for pair in pairs(made, network.example) if pair.first in meant and pair.second in meant]
        if not found:
            raise Unsupported(
                "Equalize needs two layers with only ReLU, LeakyReLU, PReLU, dropout, pooling or flattening between them, found none; "
                "batch norms must be folded first"
            )
        for _ in range(_SWEEPS):
            if max([_equalized(made, pair) for pair in found]) < _STILL:
                break
        return network.with_body(made)

    @classmethod
    def space(cls, network: Network) -> Space:
        """Nothing to vary. Raises Unsupported on a network without two layers."""
        if sum(type(m) in LAYERS for m in network.module.modules()) < 2:
            raise Unsupported("Equalize needs two convolutions or linear layers, found fewer")
        return {}


def _equalized(module: fx.GraphModule, pair: Pair) -> float:
    """Equalizes one pair; how far the largest factor was from 1."""
    first, second = module.get_submodule(pair.first), module.get_submodule(pair.second)
    ours, theirs = outgoing(first), incoming(second, pair.block)
    alive = (ours > 0) & (theirs > 0)
    factor = torch.where(alive, (ours / theirs.where(alive, 1.0)).sqrt(), 1.0)
    scale_output(first, 1 / factor)
    scale_input(second, factor, pair.block)
    return float((factor.log()).abs().max())
