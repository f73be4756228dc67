"""Normalization layers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.core.errors import Unsupported
from hasten.load.importer.table import Call, Value, Weight, operator


@operator("BatchNormalization")
def _batch_norm(
    x: Tensor, weight: Weight, bias: Weight, running_mean: Weight, running_var: Weight, *, call: Call, epsilon: float = 1e-5,
    momentum: float = 0.9, spatial: int = 1, training_mode: int = 0, is_test: int = 1, consumed_inputs: list[int] | None = None,
) -> Value:  # fmt: skip
    if not spatial:
        raise Unsupported("expected a batch norm by channel, got one by position")
    if not training_mode and (is_test or call.opset >= 7):
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, 1 - momentum, epsilon)
    axes = [0, *range(2, x.dim())]
    mean, var = x.mean(axes), x.var(axes, correction=0)
    kept = (running_mean * momentum + mean * (1 - momentum), running_var * momentum + var * (1 - momentum))
    return (F.batch_norm(x, mean, var, weight, bias, False, 0.0, epsilon), *kept)


@operator("InstanceNormalization")
def _instance_norm(x: Tensor, weight: Weight, bias: Weight, *, epsilon: float = 1e-5) -> Tensor:
    """A group norm with one channel to a group."""
    return F.group_norm(x, x.shape[1], weight, bias, epsilon)


@operator("GroupNormalization")
def _group_norm(
    x: Tensor, weight: Weight, bias: Weight, *, call: Call, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """Before operator set 21 scale and shift were one number to a group."""
    if weight.shape[0] != x.shape[1]:
        each = x.shape[1] // num_groups
        weight, bias = weight.repeat_interleave(each), bias.repeat_interleave(each)
    return F.group_norm(x, num_groups, weight, bias, epsilon)


@operator("LayerNormalization")
def _layer_norm(
    x: Tensor, weight: Weight, bias: Weight | None = None, *, call: Call, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Value:
    first = axis % x.dim()
    sizes = list(x.shape[first:])
    kind, wide = x.dtype, x.float() if stash_type == 1 and x.dtype in (torch.float16, torch.bfloat16) else x
    if list(weight.shape) == sizes and (bias is None or list(bias.shape) == sizes) and wide is x:
        given = F.layer_norm(x, sizes, weight, bias, epsilon)
    else:
        plain = F.layer_norm(wide, sizes, None, None, epsilon).to(kind) * weight
        given = plain if bias is None else plain + bias
    if not call.reads(1) and not call.reads(2):
        return given
    axes = list(range(first, x.dim()))
    mean = x.mean(axes, keepdim=True)
    return given, mean, torch.rsqrt(x.var(axes, correction=0, keepdim=True) + epsilon)


@operator("com.microsoft.SkipLayerNormalization")
def _skip_layer_norm(
    x: Tensor, skip: Tensor, weight: Weight, bias: Weight | None = None, row: Weight | None = None, *, epsilon: float = 1e-12
) -> Value:
    total = x + skip if row is None else x + skip + row
    return F.layer_norm(total, list(weight.shape), weight, bias, epsilon), None, None, total


@operator("RMSNormalization", "SimplifiedLayerNormalization")
def _rms_norm(x: Tensor, weight: Weight, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    axes = list(range(axis % x.dim(), x.dim()))
    wide = x.float() if stash_type == 1 and x.dtype in (torch.float16, torch.bfloat16) else x
    return (wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + epsilon)).to(x.dtype) * weight


@operator("LRN")
def _local_response(x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    before, after = (size - 1) // 2, size // 2
    squares = F.pad(x.square(), [0] * (2 * x.dim() - 4) + [before, after])
    total = sum(squares[:, i : i + x.shape[1]] for i in range(size))
    return x / (bias + alpha / size * total) ** beta


@operator("LpNormalization")
def _lp_norm(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    size = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return torch.where(size == 0, torch.zeros_like(x), x / size)


@operator("MeanVarianceNormalization")
def _mean_variance(x: Tensor, *, axes: list[int] | None = None) -> Tensor:
    over = axes or [0, 2, 3]
    mean = x.mean(over, keepdim=True)
    return (x - mean) / ((x.square().mean(over, keepdim=True) - mean.square()).sqrt() + 1e-9)
