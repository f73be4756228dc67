"""Convolutions become chains of smaller ones: Tucker-2 and CP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hasten.compress import calls, layers
from hasten.compress.factorize import ranks, tensors
from hasten.compress.fold.compose import wide
from hasten.core.errors import Unsupported
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Space, Stage


@dataclass(frozen=True, kw_only=True)
class FactorizeConv:
    """Replaces each k×k convolution by a chain of smaller ones.

    - "tucker": W ≈ core ×₁ U ×₂ V becomes 1×1 (in → r_in), k×k (r_in → r_out), 1×1 (r_out → out). Higher-order SVD, then higher-order
      orthogonal iteration. A side with fewer than 2·`multiple` channels stays whole, and its 1×1 convolution is left out.
    - "cp": W ≈ Σ_r u_r ∘ v_r ∘ a_r ∘ b_r becomes 1×1 (in → r), k×1 and 1×k depthwise, 1×1 (r → out). Alternating least squares; the
      start is from the singular vectors of each axis, and from `context.seed` where the rank is larger than an axis.

    Stride, padding and dilation go to the k×k part, the bias to the last. One and three spatial axes work the same. Computed in 64
    bits. The network comes back lifted; the parts of the layer `name` are called `name.0`, `name.1`, ….

    A layer whose parts would have no fewer parameters or take more multiply-adds is left alone, and so is one with groups, with a
    1×1 kernel (see `FactorizeLinear`), or that is called twice, shares its weights or carries hooks. A chain is deeper than the layer, so
    fine-tuning at a low learning rate should follow.

    Ranks are multiples of `multiple`. By time they are chosen with `faster`: the layer and its parts at four ranks are run in PyTorch on
    one row of the example, and the largest ranks that are fast enough are taken; a layer that no ranks make fast enough stays, and
    `progress` names it. Such a choice may differ from machine to machine and from day to day, and an engine may like other ranks
    better; a search compares budgets by the time of the whole network in the engine.

    Args:
        method: "tucker" or "cp".
        energy: share in (0, 1] of the squared weights that is kept: for "tucker" by each of the two sides alone, for "cp" by the whole,
            where the smallest rank that reaches it is found by bisection (several decompositions for each layer).
        budget: share in (0, 1) of each layer's weights that its parts may have, where neither energy nor rank is given.
        rank: of every chosen layer, as given; for "tucker" of both sides.
        faster: share in (0, 1) of the layer's own measured time that its parts may take, in the place of the others.
        multiple: ranks by energy are rounded up to a multiple of this, ranks by budget down, where they are that large.
        only: patterns of layer names to take; all where it is empty.
        keep: patterns of layer names to leave out.

    Raises:
        UsageError: where a pattern meets no layer.
        Unsupported: where nothing gets smaller; where `rank` is above the full rank of a layer.

    Reference: Yong-Deok Kim, Eunhyeok Park, Sungjoo Yoo, Taelim Choi, Lu Yang, Dongjun Shin, "Compression of Deep Convolutional Neural
    Networks for Fast and Low Power Mobile Applications", 2015, arXiv 1511.06530; Vadim Lebedev, Yaroslav Ganin, Maksim Rakhuba,
    Ivan Oseledets, Victor Lempitsky, "Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition", 2014, arXiv
    1412.6553.
    """

    takes: ClassVar[Kind] = "module"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    lossless: ClassVar[bool] = False
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed", "size"})
    reads_profile: ClassVar[bool] = False

    method: Literal["tucker", "cp"] = "tucker"
    energy: float | None = None
    budget: float = 0.5
    rank: int | None = None
    faster: float | None = None
    multiple: int = 8
    only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in ("tucker", "cp"):
            raise ValueError(f"method must be 'tucker' or 'cp', got {self.method!r}")
        ranks.check(self)

    def apply(self, network: Network, context: Context) -> Network:
        """The network with chains of convolutions, lifted, in eval mode."""
        module = layers.lifted(network)
        own = calls.own_layers(module)
        read = calls.read_shapes(own, calls.shapes(module, network))
        known = layers.named(module, calls.CONVOLUTIONS, only=self.only, keep=self.keep)
        chosen = {name: layer for name, layer in known.items() if name in own and ranks.is_dense(layer)}
        found, slow = False, list[str]()
        for i, (name, layer) in enumerate(chosen.items()):
            context.progress(i / len(chosen), name)
            step = self._timed(name, layer, read[name])
            if step is None:
                slow.append(name)
                context.progress((i + 1) / len(chosen), ranks.stays(name, self.faster))
                continue
            parts = step._tucker(name, layer) if self.method == "tucker" else step._cp(name, layer, context.seed)
            if parts and ranks.cheaper(layer, parts, read[name]):
                calls.replace(module, own[name], parts)
                found = True
        if not found:
            wanted = f"FactorizeConv needs a k×k convolution whose {self.method} parts are smaller than it, found none"
            raise Unsupported(wanted + ranks.too_slow(slow, self.faster))
        return network.with_body(calls.finish(module))

    @classmethod
    def space(cls, network: Network) -> Space:
        """Budget and method. Raises Unsupported on a network without k×k convolutions."""
        if not any(type(m) in calls.CONVOLUTIONS and ranks.is_dense(m) for m in network.module.modules()):
            raise Unsupported("FactorizeConv needs a k×k convolution without groups, found none")
        return {"budget": (0.5, 0.35, 0.7), "method": ("tucker", "cp")}

    def _timed(self, name: str, layer: Any, shape: tuple[int, ...]) -> FactorizeConv | None:
        """The step with the budget that `faster` chooses for this layer; None where none is fast enough."""
        if self.faster is None:
            return self
        budget = ranks.within(layer, lambda share: replace(self, budget=share, faster=None)._sketch(name, layer), shape, self.faster)
        return None if budget is None else replace(self, budget=budget, faster=None)

    def _sketch(self, name: str, layer: Any) -> list[nn.Module]:
        """Parts as large as the budget makes them, all zeros."""
        size = layer.weight.shape
        if self.method == "cp":
            rank = self._terms(layer.weight)
            return _polyadic(layer, [torch.zeros(axis, rank) for axis in size])
        out, inner = self._sides(name, layer.weight)
        blank = tensors.Tucker(core=torch.zeros(out, inner, *size[2:]), out=torch.zeros(size[0], out), inner=torch.zeros(size[1], inner))
        return _chain(layer, blank)

    def _tucker(self, name: str, layer: Any) -> list[nn.Module]:
        weight = wide(layer.weight)
        return _chain(layer, tensors.tucker(weight, *self._sides(name, weight)))

    def _sides(self, name: str, weight: Tensor) -> tuple[int, int]:
        """The ranks of the two sides, out and in."""
        out, inner = weight.shape[:2]
        if self.rank is not None:
            rank = ranks.below(name, self.rank, min(out, inner))
            return rank, rank
        whole = [size < 2 * self.multiple for size in (out, inner)]
        if self.energy is not None:
            found = [ranks.by_energy(tensors.sizes(weight, mode), self.energy, self.multiple) for mode in (0, 1)]
            return out if whole[0] else found[0], inner if whole[1] else found[1]

        def sides(share: float) -> tuple[int, int]:
            a, b = (size if w else ranks.down(share * size, self.multiple) for size, w in zip((out, inner), whole, strict=True))
            return a, b

        def cost(share: float) -> float:
            a, b = sides(share)
            return (out * a if a < out else 0) + (inner * b if b < inner else 0) + a * b * math.prod(weight.shape[2:])

        return sides(ranks.most(cost, self.budget * weight.numel()))

    def _cp(self, name: str, layer: Any, seed: int) -> list[nn.Module]:
        made = self._polyads(name, wide(layer.weight), seed)
        return [] if made is None else _polyadic(layer, made.factors)

    def _terms(self, weight: Tensor) -> int:
        """The rank within the budget. No tensor of this shape has a larger one than its entries along all axes but the longest."""
        return min(ranks.down(self.budget * weight.numel() / sum(weight.shape), self.multiple), weight.numel() // max(weight.shape))

    def _polyads(self, name: str, weight: Tensor, seed: int) -> tensors.Polyads | None:
        """The terms; None where even the largest rank that pays holds too little energy."""
        highest = weight.numel() // max(weight.shape)  # no tensor of this shape has a larger rank
        if self.rank is not None:
            return tensors.polyads(weight, ranks.below(name, self.rank, highest), seed)
        if self.energy is None:
            return tensors.polyads(weight, self._terms(weight), seed)
        low, high = 0, max(min(weight.numel() // sum(weight.shape), highest) // self.multiple, 1)
        best = tensors.polyads(weight, min(high * self.multiple, highest), seed)
        if best.fit < self.energy:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            made = tensors.polyads(weight, middle * self.multiple, seed)
            best, low, high = (made, low, middle) if made.fit >= self.energy else (best, middle, high)
        return best


def _chain(layer: Any, made: tensors.Tucker) -> list[nn.Module]:
    """1×1, k×k and 1×1 convolution; a side that stays whole has none of its own."""
    ones = (...,) + (None,) * (made.core.dim() - 2)
    settings = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "padding_mode": layer.padding_mode}
    narrows, widens = made.inner.shape[1] < layer.in_channels, made.out.shape[1] < layer.out_channels
    parts = [calls.convolution(made.inner.T[ones], None, like=layer)] if narrows else []
    parts.append(calls.convolution(made.core, None if widens else layer.bias, like=layer, **settings))
    return [*parts, calls.convolution(made.out[ones], layer.bias, like=layer)] if widens else parts


def _polyadic(layer: Any, factors: Sequence[Tensor]) -> list[nn.Module]:
    """1×1, a depthwise convolution along each axis, and 1×1, from factors (axis, rank)."""
    out, inner, *kernels = factors
    axes, rank = len(kernels), out.shape[1]
    ones = (...,) + (None,) * axes
    parts = [calls.convolution(inner.T[ones], None, like=layer)]
    for axis, taps in enumerate(kernels):
        shape = [rank, 1, *[1] * axes]
        shape[2 + axis] = len(taps)
        settings = {"padding_mode": layer.padding_mode} | _along(layer, axis, axes)
        parts.append(calls.convolution(taps.T.reshape(shape), None, like=layer, groups=rank, **settings))
    return [*parts, calls.convolution(out[ones], layer.bias, like=layer)]


def _along(layer: Any, axis: int, axes: int) -> dict[str, Any]:
    """Stride, padding and dilation of the layer along one axis, none along the others."""
    found: dict[str, Any] = {}
    for name, idle in (("stride", 1), ("padding", 0), ("dilation", 1)):
        value = getattr(layer, name)
        found[name] = value if isinstance(value, str) else tuple(value[i] if i == axis else idle for i in range(axes))
    return found
