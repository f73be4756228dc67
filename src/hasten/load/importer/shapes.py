"""Operators that move elements and leave their values: reshape, slice, gather, scatter, pad, …."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.core.errors import Unsupported
from hasten.load.importer.sizes import sized_array
from hasten.load.importer.table import (
    Array,
    Call,
    Either,
    Known,
    Value,
    bounded,
    constants,
    ints,
    operator,
    scalar,
    sym_int,
    sym_max,
    sym_min,
    to_tensor,
)


@operator("Shape")
def _shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Array:
    return sized_array(list(x.shape[start:end]))


@operator("Size")
def _size(x: Tensor) -> Array:
    return sized_array(math.prod(x.shape))


@operator("Reshape")
def _reshape(x: Tensor, shape: Known, *, allowzero: int = 0) -> Tensor:
    sizes = [x.shape[i] if s == 0 and not allowzero else s for i, s in enumerate(_whole(ints(shape)))]
    return x.reshape(sizes)


def _whole(sizes: list[Any]) -> list[Any]:
    """Sizes as integers where a graph computed them in floats."""
    return [sym_int(s) if isinstance(s, (float, torch.SymFloat)) else s for s in sizes]


@operator("Flatten")
def _flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    if axis == 1 and x.dim() > 1:
        return torch.flatten(x, 1)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("Transpose")
def _transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    return x.permute(*(perm or reversed(range(x.dim())))) if x.dim() else x


@operator("Unsqueeze")
def _unsqueeze(x: Tensor, axes_: Known | None = None, *, axes: Sequence[int] = ()) -> Tensor:
    chosen = list(axes) if axes_ is None else constants(axes_, "axes")
    total = x.dim() + len(chosen)
    for axis in sorted(a % total for a in chosen):
        x = x.unsqueeze(axis)
    return x


@operator("Squeeze")
def _squeeze(x: Tensor, axes_: Known | None = None, *, axes: Sequence[int] | None = None) -> Tensor:
    chosen = axes if axes_ is None else constants(axes_, "axes")
    if chosen is None:
        chosen = [a for a, s in enumerate(x.shape) if isinstance(s, int) and s == 1]
    for axis in sorted((a % x.dim() for a in chosen), reverse=True):
        x = x.squeeze(axis)
    return x


@operator("Concat")
def _concat(*xs: Tensor, axis: int = 1) -> Tensor:
    return torch.cat(xs, axis) if len(xs) > 1 else xs[0]


@operator("Split")
def _split(
    x: Tensor, split_: Known | None = None, *, call: Call, axis: int = 0, split: Sequence[int] | None = None, num_outputs: int | None = None
) -> tuple[Tensor, ...]:
    sizes = split if split_ is None else _whole(ints(split_))
    if sizes is None:
        count = num_outputs or len(call.node.outputs)
        part = -(-x.shape[axis] // count)
        sizes = [part] * (count - 1) + [x.shape[axis] - part * (count - 1)]
    return torch.split(x, list(sizes), axis)


@operator("Slice")
def _slice(
    x: Tensor, starts_: Known | None = None, ends_: Known | None = None, axes_: Known | None = None, steps_: Known | None = None,
    *, starts: Sequence[int] = (), ends: Sequence[int] = (), axes: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    first, last = (given if value is None else _whole(ints(value)) for value, given in ((starts_, starts), (ends_, ends)))
    chosen = axes if axes_ is None else constants(axes_, "axes")
    steps = [1] * len(first) if steps_ is None else constants(steps_, "steps")
    for axis, a, b, step in zip(range(len(first)) if chosen is None else chosen, first, last, steps, strict=True):
        x = _cut(x, axis % x.dim(), a, b, step)
    return x


def _cut(x: Tensor, axis: int, start: Any, end: Any, step: int) -> Tensor:
    if step > 0:
        return x[(slice(None),) * axis + (slice(start, end, step),)]
    size = x.shape[axis]
    # Backwards from `start` to above `end` is forwards in the flipped tensor.
    start, end = (v + size if v < 0 else v for v in (start, end))
    begin = max(size - 1 - start, 0) if isinstance(start, int) and isinstance(size, int) else sym_max(size - 1 - start, 0)
    return torch.flip(x, [axis])[(slice(None),) * axis + (slice(begin, sym_min(size, size - 1 - end), -step),)]


@operator("Gather")
def _gather(x: Either, indices: Either, *, call: Call, axis: int = 0) -> Tensor:
    """Rows of a constant table by number are an embedding."""
    if isinstance(x, np.ndarray) and x.ndim == 2 and axis == 0 and x.dtype.kind == "f" and isinstance(indices, Tensor):
        return F.embedding(indices.long(), call.weight("weight", x))
    x = call.tensor(x)
    axis = axis % x.dim()
    if isinstance(scalar(indices), (int, torch.SymInt)):
        return torch.select(x, axis, scalar(indices))
    where, table = call.tensor(indices), call.tensor(x)
    return table[(slice(None),) * axis + (where.long(),)]


def _positive(indices: Tensor, size: Any) -> Tensor:
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


@operator("GatherElements")
def _gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return torch.gather(x, axis, _positive(indices, x.shape[axis]))


@operator("GatherND")
def _gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    depth = indices.shape[-1]
    where: list[Tensor] = []
    for axis in range(batch_dims):
        shape = [1] * (indices.dim() - 1)
        shape[axis] = -1
        where.append(torch.arange(x.shape[axis]).reshape(shape))
    where += [indices[..., i].long() for i in range(int(depth))]
    return x[tuple(where)]


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@operator("ScatterElements", "Scatter")
def _scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    where = _positive(indices, x.shape[axis])
    if reduction == "none":
        return torch.scatter(x, axis, where, updates)
    return torch.scatter_reduce(x, axis, where, updates, _REDUCTIONS[reduction])


@operator("ScatterND")
def _scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    depth = int(indices.shape[-1])
    if reduction in ("none", "add"):
        return torch.index_put(x, tuple(indices[..., i].long() for i in range(depth)), updates, accumulate=reduction == "add")
    rows = math.prod(x.shape[:depth])
    flat = torch.zeros(indices.shape[:-1], dtype=torch.long)
    for i in range(depth):
        flat = flat * x.shape[i] + _positive(indices[..., i], x.shape[i])
    inner = math.prod(x.shape[depth:])
    where = flat.reshape(-1, 1).expand(-1, inner)
    moved = torch.scatter_reduce(x.reshape(rows, inner), 0, where, updates.reshape(-1, inner), _REDUCTIONS[reduction])
    return moved.reshape(x.shape)


@operator("TensorScatter")
def _tensor_scatter(cache: Tensor, update: Tensor, starts: Tensor | None = None, *, axis: int = -2, mode: str = "linear") -> Tensor:
    axis = axis % cache.dim()
    rows = torch.arange(update.shape[axis]).reshape([-1 if a == axis else 1 for a in range(cache.dim())])
    if starts is not None:
        rows = rows + starts.reshape([-1] + [1] * (cache.dim() - 1))
    rows = rows % cache.shape[axis] if mode == "circular" else rows
    return torch.scatter(cache, axis, rows.expand(update.shape), update)


@operator("Expand")
def _expand(given: Either, shape: Known, *, call: Call) -> Tensor:
    """Zeros are noted, which is how a recurrent layer is seen to start from nothing."""
    zeros = isinstance(given, np.ndarray) and given.dtype != object and given.size == 1 and not given.any()
    x = to_tensor(given) if zeros else call.tensor(given)
    wanted = _whole(ints(shape))
    sizes = list(x.shape)
    total = max(len(wanted), len(sizes))
    wanted, sizes = [1] * (total - len(wanted)) + wanted, [1] * (total - len(sizes)) + sizes
    new = bounded([w if isinstance(s, int) and s == 1 else s for s, w in zip(sizes, wanted, strict=True)])
    return call.zero(torch.zeros(list(new), dtype=x.dtype)) if zeros and new else x.expand(*new)


@operator("Tile")
def _tile(x: Tensor, repeats: Known) -> Tensor:
    counts = ints(repeats)
    bounded([s * c for s, c in zip(x.shape, counts, strict=True)])
    return x.repeat(*counts)


@operator("Where")
def _where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(condition, x, y)


@operator("ConstantOfShape")
def _constant_of_shape(shape: Known, *, call: Call, value: Array | None = None) -> Tensor:
    fill = torch.zeros(1) if value is None else to_tensor(value)
    number = 0.0 if value is None else value.reshape(-1)[0].item()
    sizes = bounded(ints(shape))
    made = torch.full(list(sizes), number, dtype=fill.dtype)
    return call.zero(made) if number == 0 else made


@operator("Range")
def _range(start: Either, limit: Either, delta: Either) -> Tensor:
    if any(isinstance(v, Tensor) for v in (start, limit, delta)):
        raise Unsupported("its bounds must be known before the network runs, got some that are computed")
    first, last, step = (v.reshape(-1)[0] if v.dtype == object else v.reshape(-1)[0].item() for v in (start, limit, delta))
    if all(isinstance(v, (int, float)) for v in (first, last, step)):
        bounded([max(0, math.ceil((last - first) / step))])
    kinds = [to_tensor(v).dtype for v in (start, limit, delta) if v.dtype != object]
    return torch.arange(first, last, step, dtype=kinds[0] if kinds else torch.int64)


@operator("EyeLike")
def _eye_like(x: Tensor, *, k: int = 0, dtype: int | None = None) -> Tensor:
    from hasten.load.importer.types import kind

    rows, columns = torch.arange(x.shape[0]).unsqueeze(1), torch.arange(x.shape[1]).unsqueeze(0)
    return (columns - rows == k).to(x.dtype if dtype is None else kind(dtype))


@operator("Trilu")
def _trilu(x: Tensor, k: Known | None = None, *, upper: int = 1) -> Tensor:
    return (torch.triu if upper else torch.tril)(x, 0 if k is None else int(k.reshape(-1)[0]))


@operator("OneHot")
def _one_hot(indices: Tensor, depth: Known, values: Tensor, *, axis: int = -1) -> Tensor:
    count = constants(depth, "numbers of classes")[0]
    bounded([count])
    axis = axis % (indices.dim() + 1)
    classes = torch.arange(count).reshape([-1 if a == axis else 1 for a in range(indices.dim() + 1)])
    where = indices.long().unsqueeze(axis)
    return torch.where(torch.where(where < 0, where + count, where) == classes, values[1], values[0])


@operator("Pad")
def _pad(
    x: Tensor, pads_: Known | None = None, value_: Either = None, axes: Known | None = None,
    *, mode: str = "constant", pads: Sequence[int] = (), paddings: Sequence[int] = (), value: float = 0.0,
) -> Tensor:  # fmt: skip
    given = list(pads or paddings) if pads_ is None else _whole(ints(pads_))
    chosen = range(x.dim()) if axes is None else [a % x.dim() for a in constants(axes, "axes")]
    half, around = len(given) // 2, [0] * (2 * x.dim())
    for i, axis in enumerate(chosen):
        around[2 * (x.dim() - 1 - axis) : 2 * (x.dim() - axis)] = [given[i], given[half + i]]
    fill: Any = (
        value if value_ is None else scalar(value_) if isinstance(value_, np.ndarray) and value_.ndim == 0 else value_.reshape(-1)[0]
    )
    if isinstance(fill, Tensor):
        raise Unsupported("the value that it pads with must be known before the network runs, got one that is computed")
    fill = fill.item() if isinstance(fill, np.generic) else fill
    if mode == "constant":
        while len(around) > 2 and not any(around[-2:]):
            around = around[:-2]
        return F.pad(x, around, value=fill) if x.dtype != torch.bool else F.pad(x.to(torch.uint8), around, value=int(fill)).bool()
    for axis in range(x.dim()):
        before, after = around[2 * (x.dim() - 1 - axis)], around[2 * (x.dim() - 1 - axis) + 1]
        if before or after:
            x = _filled(x, axis, before, after, mode)
    return x


def _filled(x: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    """One axis longer, by its own values."""
    size = x.shape[axis]
    where = torch.arange(-before, size + after)
    if mode == "edge":
        where = where.clamp(0, size - 1)
    elif mode == "wrap":
        where = where % size
    else:
        period = max(2 * (size - 1), 1) if isinstance(size, int) else 2 * (size - 1)
        where = where.abs() % period
        where = torch.where(where > size - 1, period - where, where)
    return torch.index_select(x, axis, where)


@operator("DepthToSpace")
def _depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    n, c, h, w = x.shape
    b = blocksize
    if mode == "CRD":
        return F.pixel_shuffle(x, b)
    return x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // (b * b), h * b, w * b)


@operator("SpaceToDepth")
def _space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    n, c, h, w = x.shape
    b = blocksize
    parts = x.reshape(n, c, h // b, b, w // b, b)
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return parts.permute(*order).reshape(n, c * b * b, h // b, w // b)


@operator("ReverseSequence")
def _reverse_sequence(x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    steps = torch.arange(x.shape[time_axis])
    shape = [-1 if a == time_axis else 1 for a in range(x.dim())]
    length = lengths.reshape([-1 if a == batch_axis else 1 for a in range(x.dim())])
    step = steps.reshape(shape)
    where = torch.where(step < length, length - 1 - step, step)
    return torch.gather(x, time_axis, where.expand(x.shape))


@operator("NonZero")
def _non_zero(x: Tensor) -> Tensor:
    return torch.nonzero(x).t()


@operator("Compress")
def _compress(x: Tensor, condition: Known, *, axis: int | None = None) -> Tensor:
    x, axis = (x.reshape(-1), 0) if axis is None else (x, axis)
    return torch.index_select(x, axis, torch.tensor(np.flatnonzero(condition).tolist(), dtype=torch.long))


@operator("TopK")
def _top_k(x: Tensor, k_: Known | None = None, *, k: int = 1, axis: int = -1, largest: int = 1, sorted: int = 1) -> Value:
    count = k if k_ is None else ints(k_)[0]
    kind = x.dtype
    x = x.to(torch.int64) if kind in (torch.uint16, torch.uint32, torch.uint64) else x
    # Ties go to the lower index, so all are sorted.
    values, indices = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    where = (slice(None),) * (axis % x.dim()) + (slice(0, count),)
    return values[where].to(kind), indices[where]


@operator("Unique")
def _unique(x: Tensor, *, axis: int | None = None, sorted: int = 1) -> Value:
    if not sorted:
        raise Unsupported("expected unique values in order, got them as they come")
    values, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True, dim=axis)
    inverse = inverse.reshape(-1)
    places = torch.arange(inverse.shape[0])
    first = torch.full((counts.shape[0],), inverse.shape[0]).scatter_reduce(0, inverse, places, "amin")
    return values, first, inverse, counts
