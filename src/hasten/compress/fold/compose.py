"""Two layers as one: geometry of convolutions, and the exact product of layers without anything between them.

Shapes: weights (out, in / groups, *kernel); per axis a convolution reads x at stride·j − padding + dilation·a, a < kernel.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hasten.compress.calls import CONVOLUTIONS, built, convolution, linear

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Where a convolution reads: one number per axis. `zeros`: the padding, if there is any, is zeros."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    zeros: bool

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of the constructor, kernel size aside."""
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}


def geometry(layer: Any) -> Geometry | None:
    """The geometry of a convolution; None where it pads one side more than the other."""
    padding = layer.padding
    if padding == "valid":
        padding = (0,) * len(layer.kernel_size)
    if padding == "same":
        spans = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        if any(span % 2 for span in spans):
            return None
        padding = tuple(span // 2 for span in spans)
    zeros = layer.padding_mode == "zeros"
    return Geometry(kernel=layer.kernel_size, stride=layer.stride, padding=tuple(padding), dilation=layer.dilation, zeros=zeros)


def wide(tensor: Tensor | None, size: int = 0) -> Tensor:
    """In 64 bits; zeros of this size for None."""
    return torch.zeros(size, dtype=torch.float64) if tensor is None else tensor.detach().double()


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift per channel of a batch norm in eval mode: norm(x) = scale·x + shift, in 64 bits."""
    scale = 1 / (norm.running_var.double() + norm.eps).sqrt()
    if norm.weight is not None:
        scale = scale * wide(norm.weight)
    return scale, wide(norm.bias, norm.num_features) - norm.running_mean.double() * scale


def regrouped(weight: Tensor, groups: int, fewer: int) -> Tensor:
    """The weight of a convolution in `groups` groups as one in `fewer` groups (a divisor), zeros where nothing was read."""
    out, inner = weight.shape[:2]
    if groups == fewer:
        return weight
    merged = groups // fewer
    spread = weight.new_zeros(out, inner * merged, *weight.shape[2:])
    for i in range(groups):
        rows = slice(i * out // groups, (i + 1) * out // groups)
        at = i % merged * inner
        spread[rows, at : at + inner] = weight[rows]
    return spread


def split(weight: Tensor, groups: int) -> Tensor:
    """The first axis as (groups, the rest)."""
    return weight.reshape(groups, -1, *weight.shape[1:])


def obstacle(inner: Any, outer: Any) -> str | None:
    """Why the two layers, called one after the other, are no single one; None where they are."""
    if type(outer) is nn.Linear and type(inner) in (nn.Linear, nn.Embedding):
        plain = type(inner) is nn.Linear or (inner.max_norm is None and not inner.scale_grad_by_freq and not inner.sparse)
        return None if plain else "the embedding rescales its rows"
    if type(inner) not in CONVOLUTIONS or type(outer) is not type(inner):
        return "they are layers of different kinds"
    first, second = geometry(inner), geometry(outer)
    if first is None or second is None:
        return "one of them pads its sides differently"
    padded = [p > 0 for p in second.padding]
    if any(padded) and not second.zeros:
        return "the second pads with values of the first"
    if any(padded) and any(first.padding) and not first.zeros:
        return "they pad with different values"
    if any(p and (k > 1 or q > 0) for p, k, q in zip(padded, first.kernel, first.padding, strict=True)):
        return "the second pads with zeros what the first would have filled"
    if any(padded) and inner.bias is not None and bool(inner.bias.any()):
        return "the second pads with zeros where the first would add its bias"
    return None


def product_size(inner: Any, outer: Any) -> tuple[int, int]:
    """Parameters of the product, and the multiply-adds for one of its outputs. Only where there is no obstacle."""
    if type(inner) is nn.Embedding:
        return inner.num_embeddings * outer.out_features, 0
    bias = inner.bias is not None or outer.bias is not None
    if type(outer) is nn.Linear:
        return outer.out_features * (inner.in_features + bias), inner.in_features
    made, _ = _product_geometry(inner, outer)
    per_output = inner.in_channels // math.gcd(inner.groups, outer.groups) * math.prod(made.kernel)
    return outer.out_channels * (per_output + bias), per_output


def product(inner: Any, outer: Any) -> nn.Module:
    """The one layer outer(inner(x)). Only where there is no obstacle."""
    if type(inner) is nn.Embedding:
        table = wide(inner.weight) @ wide(outer.weight).T + wide(outer.bias, outer.out_features)
        with torch.device("meta"):
            made: Any = nn.Embedding(table.shape[0], table.shape[1], padding_idx=inner.padding_idx)
        made.weight = nn.Parameter(table.to(inner.weight.dtype), requires_grad=inner.weight.requires_grad)
        return made.eval()  # type: ignore[no-any-return]
    bias = None
    mixed = wide(outer.weight).flatten(2).sum(2) if type(outer) is not nn.Linear else wide(outer.weight)
    if inner.bias is not None or outer.bias is not None:
        groups = 1 if type(outer) is nn.Linear else outer.groups
        bias = regrouped(mixed, groups, 1) @ wide(inner.bias, mixed.shape[1] * groups) + wide(outer.bias, len(mixed))
    if type(outer) is nn.Linear:
        return linear(wide(outer.weight) @ wide(inner.weight), bias, like=outer)
    made_at, step = _product_geometry(inner, outer)
    groups = math.gcd(inner.groups, outer.groups)
    weight = _product_weight(inner, outer, made_at.kernel, step)
    padded = geometry(inner)
    mode = inner.padding_mode if padded is not None and any(padded.padding) else outer.padding_mode
    return convolution(weight, bias, like=outer, groups=groups, padding_mode=mode, **made_at.settings)


def _product_geometry(inner: Any, outer: Any) -> tuple[Geometry, tuple[tuple[int, int], ...]]:
    """Geometry of the product; and, per axis, how far apart in its kernel the taps of the first and of the second lie."""
    first, second = geometry(inner), geometry(outer)
    assert first is not None
    assert second is not None
    kernel, dilation, steps = [], [], []
    for k1, d1, s1, k2, d2 in zip(first.kernel, first.dilation, first.stride, second.kernel, second.dilation, strict=True):
        apart = math.gcd(d1 if k1 > 1 else 0, d2 * s1 if k2 > 1 else 0) or 1
        kernel.append(((k1 - 1) * d1 + (k2 - 1) * d2 * s1) // apart + 1)
        dilation.append(apart)
        steps.append((max(d1 // apart, 1), max(d2 * s1 // apart, 1)))
    made = Geometry(
        kernel=tuple(kernel),
        dilation=tuple(dilation),
        stride=tuple(a * b for a, b in zip(first.stride, second.stride, strict=True)),
        padding=tuple(p + q * s for p, q, s in zip(first.padding, second.padding, first.stride, strict=True)),
        zeros=first.zeros,
    )
    return made, tuple(steps)


def _product_weight(inner: Any, outer: Any, kernel: tuple[int, ...], steps: tuple[tuple[int, int], ...]) -> Tensor:
    groups = math.gcd(inner.groups, outer.groups)
    first = split(regrouped(wide(inner.weight), inner.groups, groups), groups)  # (g, mid, in, *kernel)
    second = split(regrouped(wide(outer.weight), outer.groups, groups), groups)  # (g, out, mid, *kernel)
    made = first.new_zeros(groups, second.shape[1], first.shape[2], *kernel)
    for tap in itertools.product(*(range(k) for k in outer.kernel_size)):
        places = [
            slice(t * far, t * far + (k - 1) * near + 1, near) for t, (near, far), k in zip(tap, steps, inner.kernel_size, strict=True)
        ]
        at: tuple[Any, ...] = (slice(None), slice(None), slice(None), *places)
        here: tuple[Any, ...] = (slice(None), slice(None), slice(None), *tap)
        made[at] += torch.einsum("gom,gmi...->goi...", second[here], first)
    return made.flatten(0, 1)


def after_affine(layer: Any, scale: Tensor, shift: Tensor) -> nn.Module:
    """The layer that gives for x what `layer` gives for scale·x + shift, one number per input channel or feature.

    A convolution that pads with zeros, and most transposed ones, take no shift but zero: see `takes_shift`.
    """
    weight = wide(layer.weight)
    if type(layer) in TRANSPOSED:  # (in, out / groups, *kernel)
        return _after_affine_transposed(layer, weight, scale, shift)
    groups = 1 if type(layer) is nn.Linear else layer.groups
    by_input = [groups, 1, -1, *[1] * (weight.dim() - 2)]
    parts = split(weight, groups)
    added = (parts * shift.view(by_input)).flatten(0, 1).flatten(1).sum(1)
    scaled = (parts * scale.view(by_input)).flatten(0, 1)
    keeps = layer.bias is None and not bool(shift.any())
    bias = None if keeps else wide(layer.bias, len(weight)) + added
    if type(layer) is nn.Linear:
        return linear(scaled, bias, like=layer)
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return built(type(layer), scaled, bias, like=layer, **{name: getattr(layer, name) for name in names})


def _after_affine_transposed(layer: Any, weight: Tensor, scale: Tensor, shift: Tensor) -> nn.Module:
    by_input = [-1, 1, *[1] * (weight.dim() - 2)]
    added = split(weight * shift.view(by_input), layer.groups).flatten(3).sum((1, 3)).flatten()  # (groups, in, out, taps) → (out)
    bias = None if layer.bias is None and not bool(shift.any()) else wide(layer.bias, layer.out_channels) + added
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding", "dilation", "groups", "padding_mode")
    return built(type(layer), weight * scale.view(by_input), bias, like=layer, **{name: getattr(layer, name) for name in names})


def takes_shift(layer: Any) -> bool:
    """Whether a constant added to the input adds a constant to the output: not where zeros are padded.

    Of a transposed convolution, each place must lie under all of the kernel: a stride leaves some taps out everywhere, and at the edges
    the others are left out unless padding cuts these places off.
    """
    if type(layer) in TRANSPOSED:
        taps = zip(layer.kernel_size, layer.dilation, layer.padding, layer.stride, strict=True)
        return all(s == 1 and p >= d * k - 1 for k, d, p, s in taps)
    if type(layer) is nn.Linear or layer.padding_mode != "zeros":
        return True
    if layer.padding == "same":
        return all(k == 1 for k in layer.kernel_size)
    return layer.padding == "valid" or not any(layer.padding)
