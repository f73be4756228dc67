"""Integers that stand for real numbers: x ≈ scale · (q − zero)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.core.errors import Unsupported
from hasten.load.importer.convolution import convolve
from hasten.load.importer.table import Value, operator
from hasten.load.importer.types import kind


def _shaped(value: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or zero point so that it fits x: one number, one for each position along `axis`, or one for each block."""
    if value.dim() == 0 or value.numel() == 1:
        return value.reshape([])
    if value.dim() == 1 and not block_size:
        return value.reshape([-1 if a == axis % x.dim() else 1 for a in range(x.dim())])
    axis = axis % x.dim()
    return value.repeat_interleave(block_size, axis)[(slice(None),) * axis + (slice(0, x.shape[axis]),)]


@operator("QuantizeLinear")
def _quantize(
    x: Tensor, scale: Tensor, zero: Tensor | None = None, *, axis: int = 1, block_size: int = 0, output_dtype: int = 0, precision: int = 0,
    saturate: int = 1,
) -> Tensor:  # fmt: skip
    target = zero.dtype if zero is not None else kind(output_dtype) if output_dtype else torch.uint8
    if target.is_floating_point:
        raise Unsupported(f"expected integers, got {target}")
    return quantized(x, _shaped(scale, x, axis, block_size), None if zero is None else _shaped(zero, x, axis, block_size), target)


def quantized(x: Tensor, scale: Tensor, zero: Tensor | None, target: torch.dtype) -> Tensor:
    """round(x / scale) + zero, clamped to the integers of `target`."""
    info = torch.iinfo(target)
    steps = torch.round(x / scale)
    return torch.clamp(steps if zero is None else steps + zero.to(steps.dtype), info.min, info.max).to(target)


@operator("DequantizeLinear")
def dequantized(
    q: Tensor, scale: Tensor, zero: Tensor | None = None, *, axis: int = 1, block_size: int = 0, output_dtype: int = 0
) -> Tensor:
    """(q − zero) · scale."""
    wide = scale.dtype if scale.dtype == torch.float64 else torch.float32
    steps = q.to(wide) if zero is None else q.to(wide) - _shaped(zero, q, axis, block_size).to(wide)
    return (steps * _shaped(scale, q, axis, block_size).to(wide)).to(kind(output_dtype) if output_dtype else scale.dtype)


@operator("DynamicQuantizeLinear")
def _dynamic(x: Tensor) -> Value:
    low, high = torch.clamp(x.amin(), max=0), torch.clamp(x.amax(), min=0)
    scale = (high - low) / 255
    zero = torch.clamp(torch.round(-low / torch.where(scale == 0, torch.ones_like(scale), scale)), 0, 255)
    return torch.clamp(torch.round(x / scale) + zero, 0, 255).to(torch.uint8), scale, zero.to(torch.uint8)


def _centred(q: Tensor, zero: Tensor | None, axis: int) -> Tensor:
    """q − zero in float64, where sums of products of 8-bit integers are exact."""
    wide = q.to(torch.float64)
    if zero is None:
        return wide
    where = zero.to(torch.float64)
    return wide - (
        where.reshape([])
        if where.numel() == 1
        else where.reshape([-1 if a == axis % q.dim() else 1 for a in range(q.dim())])
        if where.dim() == 1
        else where
    )


@operator("MatMulInteger")
def _matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    return torch.matmul(_centred(a, a_zero, -2), _centred(b, b_zero, -1)).to(torch.int32)


@operator("ConvInteger")
def _conv_integer(
    x: Tensor, w: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None, *, auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None, group: int = 1, kernel_shape: Sequence[int] | None = None, pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    given: dict[str, Any] = {"auto_pad": auto_pad, "group": group, "pads": pads}
    return convolve(_centred(x, x_zero, 1), _centred(w, w_zero, 0), None, (strides, dilations), **given).to(torch.int32)


@operator("QLinearMatMul")
def _qlinear_matmul(
    a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor, y_scale: Tensor, y_zero: Tensor
) -> Tensor:
    product = torch.matmul(_centred(a, a_zero, -2), _centred(b, b_zero, -1))
    left = (
        a_scale.reshape([-1, 1]) if a_scale.dim() == 1 and a_scale.numel() > 1 else a_scale.reshape([]) if a_scale.numel() == 1 else a_scale
    )
    return quantized(product, y_scale.double() / (left.double() * b_scale.double()), y_zero, y_zero.dtype)


@operator("QLinearConv")
def _qlinear_conv(
    x: Tensor, x_scale: Tensor, x_zero: Tensor, w: Tensor, w_scale: Tensor, w_zero: Tensor, y_scale: Tensor, y_zero: Tensor,
    bias: Tensor | None = None, *, auto_pad: str = "NOTSET", dilations: Sequence[int] | None = None, group: int = 1,
    kernel_shape: Sequence[int] | None = None, pads: Sequence[int] | None = None, strides: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    given: dict[str, Any] = {"auto_pad": auto_pad, "group": group, "pads": pads}
    sums = convolve(_centred(x, x_zero, 1), _centred(w, w_zero, 0), None if bias is None else bias.double(), (strides, dilations), **given)
    each = _shaped(w_scale.double(), sums, 1, 0)
    return quantized(sums, y_scale.double() / (x_scale.double() * each), y_zero, y_zero.dtype)


@operator("com.microsoft.QLinearAdd")
def _qlinear_add(
    a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor, y_scale: Tensor, y_zero: Tensor
) -> Tensor:
    total = (a.float() - a_zero.float()) * a_scale + (b.float() - b_zero.float()) * b_scale
    return quantized(total, y_scale, y_zero, y_zero.dtype)
