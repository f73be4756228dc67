"""Convolutions become depthwise and pointwise ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from hasten.compress import calls, layers
from hasten.compress.factorize import ranks
from hasten.compress.fold.compose import wide
from hasten.compress.settings import whole_numbers
from hasten.core.errors import Unsupported
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Space, Stage


@dataclass(frozen=True, kw_only=True)
class DepthwiseSeparable:
    """Replaces each k×k convolution by a depthwise k×k and a pointwise 1×1 one.

    For each input channel i the slice W[:, i] (out × k²) has a nearest matrix of rank m, the `multiplier`: Σ_j p_ij ∘ d_ij from its
    singular values. The d are the kernels of m depthwise filters of the channel, the p the columns of the pointwise convolution: no
    depthwise-separable pair with m filters for each channel is nearer to W. Stride, padding and dilation go to the depthwise part, the
    bias to the pointwise one. Computed in 64 bits. The network comes back lifted; the parts of the layer `name` are called `name.0`
    and `name.1`.

    A layer whose parts would have no fewer parameters or take more multiply-adds is left alone, and so is one with groups or a 1×1
    kernel, or that is called twice, shares its weights or carries hooks. With m = 1 much is lost,
    most in a first layer of few input channels: leave that one out, and train afterwards.

    Args:
        multiplier: depthwise filters for each input channel, at least 1.
        only: patterns of layer names to take; all where it is empty.
        keep: patterns of layer names to leave out.

    Raises:
        UsageError: where a pattern meets no layer.
        Unsupported: where nothing gets smaller; where `multiplier` is above the full rank of a layer's slices.

    Reference: Jianbo Guo, Yuxi Li, Weiyao Lin, Yurong Chen, Jianguo Li, "Network Decoupling: From Regular to Depthwise Separable
    Convolutions", 2018, arXiv 1808.05517; Andrew G. Howard and others, "MobileNets: Efficient Convolutional Neural Networks for Mobile
    Vision Applications", 2017, arXiv 1704.04861.
    """

    takes: ClassVar[Kind] = "module"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    lossless: ClassVar[bool] = False
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed", "size"})
    reads_profile: ClassVar[bool] = False

    multiplier: int = 1
    only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        whole_numbers(self)
        layers.patterns("only", self.only)
        layers.patterns("keep", self.keep)
        if self.multiplier < 1:
            raise ValueError(f"multiplier must be at least 1, got {self.multiplier}")

    def apply(self, network: Network, context: Context) -> Network:
        """The network with two convolutions for one, lifted, in eval mode."""
        del context
        module = layers.lifted(network)
        own = calls.own_layers(module)
        read = calls.read_shapes(own, calls.shapes(module, network))
        known = layers.named(module, calls.CONVOLUTIONS, only=self.only, keep=self.keep)
        found = False
        for name in [n for n, layer in known.items() if n in own and ranks.is_dense(layer)]:
            parts = self._parts(name, known[name])
            if ranks.cheaper(known[name], parts, read[name]):
                calls.replace(module, own[name], parts)
                found = True
        if not found:
            raise Unsupported("DepthwiseSeparable needs a k×k convolution whose depthwise and pointwise parts are smaller, found none")
        return network.with_body(calls.finish(module))

    @classmethod
    def space(cls, network: Network) -> Space:
        """The multiplier. Raises Unsupported on a network without k×k convolutions."""
        if not any(type(m) in calls.CONVOLUTIONS and ranks.is_dense(m) for m in network.module.modules()):
            raise Unsupported("DepthwiseSeparable needs a k×k convolution without groups, found none")
        return {"multiplier": (1, 2, 3)}

    def _parts(self, name: str, layer: Any) -> list[nn.Module]:
        weight = wide(layer.weight)  # (out, in, *kernel)
        out, inner, *kernel = weight.shape
        m = self.multiplier
        left, sizes, right = torch.linalg.svd(weight.transpose(0, 1).flatten(2), full_matrices=False)  # one for each input channel
        if m > sizes.shape[1]:
            raise Unsupported(
                f"multiplier must be at most {sizes.shape[1]}, the full rank in {name}, got {m}; leave it out with keep=({name!r},)"
            )
        root = sizes[:, :m].sqrt()
        taps = (root[..., None] * right[:, :m]).reshape(inner * m, 1, *kernel)
        columns = (left[..., :m] * root[:, None]).transpose(1, 2).reshape(inner * m, out).T
        settings = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "padding_mode": layer.padding_mode}
        depthwise = calls.convolution(taps, None, like=layer, groups=inner, **settings)
        return [depthwise, calls.convolution(columns[(...,) + (None,) * len(kernel)], layer.bias, like=layer)]
