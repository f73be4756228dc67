"""Convolutions, pooling and resizing. Shapes: x (batch, channels, …space)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.core.errors import Unsupported
from hasten.load.importer.table import Call, Either, Known, Value, Weight, constants, ints, operator, sym_max

_CONV = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_MAXIMUM = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVERAGE = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def _spread(value: Sequence[int] | None, axes: int, default: int = 1) -> list[int]:
    return list(value) if value else [default] * axes


def around(
    x: Tensor, window: Sequence[int], stride: Sequence[int], pads: Sequence[int] | None, auto_pad: str
) -> tuple[list[Any], list[Any]]:
    """Zeros before and after each axis of space. `window`: the reach of the kernel, dilation counted."""
    axes = len(window)
    if auto_pad in ("NOTSET", ""):
        given = _spread(pads, 2 * axes, 0)
        return given[:axes], given[axes:]
    if auto_pad == "VALID":
        return [0] * axes, [0] * axes
    before, after = [], []
    for size, reach, step in zip(x.shape[2:], window, stride, strict=True):
        total = reach - 1 if step == 1 else sym_max((-(-size // step) - 1) * step + reach - size, 0)
        small = total // 2
        before.append(small if auto_pad == "SAME_UPPER" else total - small)
        after.append(total - small if auto_pad == "SAME_UPPER" else small)
    return before, after


def _reach(kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    return [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]


def _padded(x: Tensor, before: Sequence[Any], after: Sequence[Any], value: float = 0.0) -> Tensor:
    pairs = [p for b, a in zip(reversed(before), reversed(after), strict=True) for p in (b, a)]
    return F.pad(x, pairs, value=value)


@operator("Conv")
def _conv(
    x: Tensor, weight: Weight, bias: Weight | None = None, *, auto_pad: str = "NOTSET", dilations: Sequence[int] | None = None,
    group: int = 1, kernel_shape: Sequence[int] | None = None, pads: Sequence[int] | None = None, strides: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    return convolve(x, weight, bias, (strides, dilations), auto_pad=auto_pad, group=group, pads=pads)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, steps: tuple[Sequence[int] | None, Sequence[int] | None], *, auto_pad: str = "NOTSET",
    group: int = 1, pads: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """A convolution in ONNX's words, `steps` being strides and dilations; zeros that differ before and after are put there first."""
    axes, (strides, dilations) = weight.dim() - 2, steps
    if not 1 <= axes <= 3:
        raise Unsupported(f"expected a convolution over 1 to 3 axes, got {axes}")
    stride, dilation = _spread(strides, axes), _spread(dilations, axes)
    before, after = around(x, _reach([int(s) for s in weight.shape[2:]], dilation), stride, pads, auto_pad)
    if before != after or any(p < 0 for p in before if isinstance(p, int)):
        x, before = _padded(x, before, after), [0] * axes
    return _CONV[axes - 1](x, weight, bias, tuple(stride), tuple(before), tuple(dilation), group)


@operator("DeformConv")
def _deform_conv(
    x: Tensor, weight: Weight, offset: Tensor, bias: Weight | None = None, mask: Tensor | None = None, *,
    dilations: Sequence[int] | None = None, group: int = 1, kernel_shape: Sequence[int] | None = None, offset_group: int = 1,
    pads: Sequence[int] | None = None, strides: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """What the kernel sees at each place is sampled and laid out window by window; an ordinary convolution steps from window to window."""
    if weight.dim() != 4:
        raise Unsupported(f"expected a convolution over 2 axes, got {weight.dim() - 2}")
    kernel, sizes, seen = [int(s) for s in weight.shape[2:]], x.shape[2:], offset.shape[2:]
    moved = offset.reshape(-1, *kernel, 2, *seen).permute(3, 0, 4, 1, 5, 2)  # (2, batch · groups, rows, kernel, columns, kernel)
    grid = []
    for axis, (step, width, pad) in enumerate(zip(_spread(strides, 2), _spread(dilations, 2), _spread(pads, 4, 0)[:2], strict=True)):
        places = torch.arange(seen[axis], dtype=x.dtype)[:, None] * step + torch.arange(kernel[axis], dtype=x.dtype) * width - pad
        where = moved[axis] + (places[:, :, None, None] if axis == 0 else places)
        grid.append(((2 * where + 1) / sizes[axis] - 1).flatten(3, 4).flatten(1, 2))
    given = F.grid_sample(x.reshape(-1, x.shape[1] // offset_group, *sizes), torch.stack(grid[::-1], -1), align_corners=False)
    if mask is not None:
        given = given * mask.reshape(-1, *kernel, *seen).permute(0, 3, 1, 4, 2).flatten(3, 4).flatten(1, 2)[:, None]
    return F.conv2d(given.reshape(-1, x.shape[1], *given.shape[2:]), weight, bias, tuple(kernel), groups=group)


@operator("ConvTranspose")
def _conv_transpose(
    x: Tensor, weight: Weight, bias: Weight | None = None, *, auto_pad: str = "NOTSET", dilations: Sequence[int] | None = None,
    group: int = 1, kernel_shape: Sequence[int] | None = None, output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None, strides: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    axes = weight.dim() - 2
    stride, dilation, extra = _spread(strides, axes), _spread(dilations, axes), _spread(output_padding, axes, 0)
    reach = _reach([int(s) for s in weight.shape[2:]], dilation)
    if output_shape or auto_pad.startswith("SAME"):
        wanted = list(output_shape or [s * step for s, step in zip(x.shape[2:], stride, strict=True)])[-axes:]
        before, after = [], []
        for size, step, r, e, w in zip(x.shape[2:], stride, reach, extra, wanted, strict=True):
            total = step * (size - 1) + e + r - w
            small = total // 2
            before.append(total - small if auto_pad == "SAME_LOWER" or auto_pad == "NOTSET" else small)
            after.append(small if auto_pad == "SAME_LOWER" or auto_pad == "NOTSET" else total - small)
    else:
        before, after = around(x, reach, stride, pads, auto_pad)
    even = before == after and all(p >= 0 for p in before) and all(e < max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True))
    if even:
        return _TRANSPOSED[axes - 1](x, weight, bias, tuple(stride), tuple(before), tuple(extra), group, tuple(dilation))
    whole = _TRANSPOSED[axes - 1](x, weight, bias, tuple(stride), 0, 0, group, tuple(dilation))
    return _padded(whole, [-b for b in before], [e - a for e, a in zip(extra, after, strict=True)])


def _ceiled(x: Tensor, reach: Sequence[int], stride: Sequence[int], before: list[Any], after: list[Any]) -> list[Any]:
    """Padding behind each axis that makes the last, partial window whole; a window that would begin in the padding is left out."""
    found = []
    for size, r, step, b, a in zip(x.shape[2:], reach, stride, before, after, strict=True):
        steps = -(-(size + b + a - r) // step)
        steps = steps - 1 if isinstance(steps, int) and steps * step >= size + b else steps
        found.append(steps * step + r - size - b)
    return found


@operator("MaxPool")
def _max_pool(
    x: Tensor, *, call: Call, kernel_shape: Sequence[int], auto_pad: str = "NOTSET", ceil_mode: int = 0,
    dilations: Sequence[int] | None = None, pads: Sequence[int] | None = None, storage_order: int = 0, strides: Sequence[int] | None = None,
) -> Value:  # fmt: skip
    axes = len(kernel_shape)
    kind, x = x.dtype, x if x.is_floating_point() else x.float()
    stride, dilation = _spread(strides, axes), _spread(dilations, axes)
    reach = _reach(kernel_shape, dilation)
    before, after = around(x, reach, stride, pads, auto_pad)
    indexed = call.reads(1)
    plain = before == after and all(isinstance(b, int) and 2 * b <= k for b, k in zip(before, kernel_shape, strict=True))
    if plain and not indexed:
        given = _MAXIMUM[axes - 1](x, list(kernel_shape), stride, before, dilation, bool(ceil_mode))
        return given.to(kind)
    last = _ceiled(x, reach, stride, before, after) if ceil_mode else after
    wide = _padded(x, before, last, -math.inf)
    if not indexed:
        return _MAXIMUM[axes - 1](wide, list(kernel_shape), stride, 0, dilation).to(kind)
    given, where = _MAXIMUM[axes - 1](wide, list(kernel_shape), stride, 0, dilation, return_indices=True)
    return given.to(kind), _flat(where, wide.shape, x.shape, before, storage_order)


def _flat(where: Tensor, wide: Sequence[int], shape: Sequence[int], before: Sequence[int], column_major: int) -> Tensor:
    """Indices into one padded plane as indices into the whole tensor."""
    places = []
    for axis in reversed(range(2, len(shape))):
        places.append(where % wide[axis] - before[axis - 2])
        where = torch.div(where, wide[axis], rounding_mode="floor")
    order = range(2, len(shape)) if not column_major else reversed(range(2, len(shape)))
    flat = torch.zeros_like(where)
    for axis in order:
        flat = flat * shape[axis] + places[len(shape) - 1 - axis]
    planes = torch.arange(shape[0] * shape[1]).reshape(shape[0], shape[1], *[1] * (len(shape) - 2))
    return planes * math.prod(shape[2:]) + flat


@operator("MaxUnpool")
def _max_unpool(
    x: Tensor, indices: Tensor, output_shape: Known | None = None, *, kernel_shape: Sequence[int], pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    axes = len(kernel_shape)
    stride, around_ = _spread(strides, axes), _spread(pads, 2 * axes, 0)
    sizes = [
        (s - 1) * step - around_[i] - around_[axes + i] + k
        for i, (s, step, k) in enumerate(zip(x.shape[2:], stride, kernel_shape, strict=True))
    ]
    small = [*x.shape[:2], *sizes]
    given = torch.zeros(math.prod(small), dtype=x.dtype).scatter(0, indices.reshape(-1), x.reshape(-1)).reshape(small)
    if output_shape is None:
        return given
    return _padded(given, [0] * axes, [w - s for w, s in zip(constants(output_shape, "sizes")[2:], sizes, strict=True)])


@operator("AveragePool")
def _average_pool(
    x: Tensor, *, kernel_shape: Sequence[int], auto_pad: str = "NOTSET", ceil_mode: int = 0, count_include_pad: int = 0,
    dilations: Sequence[int] | None = None, pads: Sequence[int] | None = None, strides: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    axes = len(kernel_shape)
    stride, dilation = _spread(strides, axes), _spread(dilations, axes)
    reach = _reach(kernel_shape, dilation)
    before, after = around(x, reach, stride, pads, auto_pad)
    plain = (
        before == after
        and set(dilation) == {1}
        and all(isinstance(b, int) and 2 * b <= k for b, k in zip(before, kernel_shape, strict=True))
    )
    if plain:
        return _AVERAGE[axes - 1](x, list(kernel_shape), stride, before, bool(ceil_mode), bool(count_include_pad))
    last = _ceiled(x, reach, stride, before, after) if ceil_mode else after
    counted = torch.ones_like(x[:1, :1])
    counted = _padded(
        _padded(counted, before, after, float(count_include_pad)), [0] * axes, [b - a for a, b in zip(after, last, strict=True)]
    )
    return _summed(_padded(x, before, last), kernel_shape, stride, dilation) / _summed(counted, kernel_shape, stride, dilation)


def _summed(x: Tensor, kernel: Sequence[int], stride: list[int], dilation: list[int]) -> Tensor:
    """The sum over each window."""
    planes = x.reshape(-1, 1, *x.shape[2:])
    sums = _CONV[len(kernel) - 1](planes, torch.ones(1, 1, *kernel, dtype=x.dtype), None, tuple(stride), 0, tuple(dilation))
    return sums.reshape(*x.shape[:2], *sums.shape[2:])


@operator("LpPool")
def _lp_pool(
    x: Tensor, *, kernel_shape: Sequence[int], auto_pad: str = "NOTSET", ceil_mode: int = 0, dilations: Sequence[int] | None = None,
    p: int = 2, pads: Sequence[int] | None = None, strides: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    axes = len(kernel_shape)
    stride, dilation = _spread(strides, axes), _spread(dilations, axes)
    reach = _reach(kernel_shape, dilation)
    before, after = around(x, reach, stride, pads, auto_pad)
    last = _ceiled(x, reach, stride, before, after) if ceil_mode else after
    return _summed(_padded(x.abs() ** p, before, last), kernel_shape, stride, dilation) ** (1 / p)


@operator("GlobalAveragePool")
def _global_average(x: Tensor) -> Tensor:
    pools = {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}
    return pools[x.dim()](x, 1) if x.dim() in pools else x.mean(tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def _global_max(x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalLpPool")
def _global_lp(x: Tensor, *, p: int = 2) -> Tensor:
    return (x.abs() ** p).sum(tuple(range(2, x.dim())), keepdim=True) ** (1 / p)


@operator("Upsample")
def _upsample(
    x: Tensor, scales_: Known | None = None, *, call: Call, mode: str = "nearest", scales: Sequence[float] | None = None
) -> Tensor:
    given = np.asarray(scales, np.float32) if scales_ is None else scales_
    made: Tensor = _resize(x, None, given, None, call=call, mode=mode, coordinate_transformation_mode="asymmetric", nearest_mode="floor")
    return made


@operator("Resize")
def _resize(
    x: Tensor, roi: Either = None, scales: Known | None = None, sizes: Known | None = None, *, call: Call, antialias: int = 0,
    axes: Sequence[int] | None = None, coordinate_transformation_mode: str = "half_pixel", cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0, extrapolation_value: float = 0.0, keep_aspect_ratio_policy: str = "stretch", mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:  # fmt: skip
    """torch's own resizing where it means the same, else axis by axis with a constant matrix."""
    from hasten.load.importer import resizing

    if isinstance(scales, np.ndarray) and scales.size == 0:
        scales = None
    if sizes is not None and sizes.size == 0:
        sizes = None
    if scales is None and roi is not None and sizes is None and call.opset < 11:
        scales = roi
    plan = resizing.plan(
        x, None if scales is None else ints(scales), None if sizes is None else ints(sizes), axes, keep_aspect_ratio_policy
    )
    if (given := resizing.native(x, plan, mode, coordinate_transformation_mode, nearest_mode, bool(antialias), cubic_coeff_a)) is not None:
        return given
    region = roi if isinstance(roi, np.ndarray) and roi.size and coordinate_transformation_mode == "tf_crop_and_resize" else None
    rule = resizing.Rule(
        mode=mode, place=coordinate_transformation_mode, nearest=nearest_mode, cubic=cubic_coeff_a, antialias=bool(antialias),
        exclude=bool(exclude_outside), outside=extrapolation_value,
    )  # fmt: skip
    return resizing.by_matrices(x, plan, rule, region, axes)


@operator("GridSample")
def _grid_sample(x: Tensor, grid: Tensor, *, mode: str = "bilinear", padding_mode: str = "zeros", align_corners: int = 0) -> Tensor:
    words = {"linear": "bilinear", "cubic": "bicubic"}
    return F.grid_sample(x, grid, mode=words.get(mode, mode), padding_mode=padding_mode, align_corners=bool(align_corners))


@operator("AffineGrid")
def _affine_grid(theta: Tensor, size: Known, *, align_corners: int = 0) -> Tensor:
    return F.affine_grid(theta, ints(size), align_corners=bool(align_corners))


@operator("Col2Im")
def _col2im(
    x: Tensor, image: Known, block: Known, *, dilations: Sequence[int] | None = None, pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    axes = len(block)
    given = _spread(pads, 2 * axes, 0)
    if axes != 2:
        raise Unsupported(f"expected images of two axes, got {axes}")
    sizes = [s + given[i] + given[axes + i] for i, s in enumerate(ints(image))]
    whole = F.fold(x, tuple(sizes), tuple(ints(block)), tuple(_spread(dilations, axes)), 0, tuple(_spread(strides, axes)))
    return _padded(whole, [-p for p in given[:axes]], [-p for p in given[axes:]])
