"""Weights rounded up or down so that each layer's outputs, not its weights, stay closest.

For one layer with weights W (out, in), scales s and inputs x as the engine will see them (rounded), the squared error of the
outputs is Σ over rows of Δ H Δᵀ with Δ = s·q − W and H = E[x xᵀ]. Every q is the integer below or above W/s. The search has a
bounded length and draws nothing: it starts from the nearest integers and from those that error feedback gives (each column's
error is made up for in the columns that follow), flips single weights while that helps, and takes the better end of each row;
so no row is worse on the calibration data than rounded to the nearest.

Shapes: weights (groups, out, in), moments (groups, in, in), rows of inputs (groups, rows, in).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnx import NodeProto

from hasten.compress.quantize.insert import Numbers, Points, along, highest, weight_and_bias, weight_scale
from hasten.compress.quantize.observe import watch
from hasten.compress.quantize.place import Placement, channel_axis
from hasten.compress.quantize.wiring import Array, Wiring, attribute
from hasten.core.data import View
from hasten.core.recipe import Progress

_SWEEPS = 20
_ROWS = 2048  # of inputs that one batch adds to the moments
_WIDEST = 4608  # columns that are rounded together; a wider layer is cut into such pieces
_HELD = 40_000_000  # numbers in the moments that are held at a time
_DAMPING = 0.01  # of the mean diagonal, so that error feedback can divide


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The examples and how they are run.

    Args:
        view: the calibrate view.
        batch: examples in one run.
        progress: called with the share done of this work, in [0, 1].
    """

    view: View
    batch: int
    progress: Progress

    def during(self, start: float, end: float) -> Calibration:
        """The same for a part of the work: its progress goes from `start` to `end`."""
        return replace(self, progress=lambda share, words: self.progress(start + share * (end - start), words))


def adapt(wiring: Wiring, placement: Placement, points: Points, numbers: Numbers, seen: Calibration, *, centred: bool) -> dict[str, Array]:
    """Integer weights (int8) by name of the layer. Transposed convolutions are left out: they stay with the nearest integers.

    Args:
        centred: the layer's mean error does not count, because its bias will be corrected: H is the covariance.
    """
    layers = [n for n in wiring.nodes if n.name in set(placement.layers) and n.op_type != "ConvTranspose"]
    model, done = wiring.model(), dict[str, Array]()
    for part in _parts(wiring, layers):
        moments = {n.name: _Moments(wiring, n) for n in part}
        for values in watch(model, [n.input[0] for n in part], seen.view, batch=seen.batch):
            for node in part:
                point = points[placement.scale_of[node.input[0]]]
                moments[node.name].add(_rounded(values[node.input[0]], point))
        for node in part:
            scale = float(points[placement.scale_of[node.input[0]]][0])
            done[node.name] = _layer(wiring, node, moments[node.name].taken(centred=centred), scale, numbers)
            seen.progress(len(done) / len(layers), f"rounding {node.name}")
    return done


def round_rows(weight: Array, scale: Array, moment: Array, top: int) -> Array:
    """Integers in [−top, top] next to weight / scale, with the least error that the search finds.

    Args:
        weight: (groups, out, in).
        scale: broadcasts against it.
        moment: H, (groups, in, in).
    """
    real = weight / scale
    low = np.clip(np.floor(real), -top, top)
    high = np.clip(low + 1, -top, top)
    starts = (np.clip(np.round(real), low, high), _fed_back(weight, scale, moment, low, high))
    ends = [_descended(weight, scale, moment, start, low + high) for start in starts]
    errors = [_error(weight, scale, moment, end) for end in ends]
    return np.where((errors[1] < errors[0])[..., None], ends[1], ends[0])


def _error(weight: Array, scale: Array, moment: Array, integers: Array) -> Array:
    gap = integers * scale - weight
    error: Array = np.einsum("goi,goi->go", gap @ moment, gap)
    return error


def _fed_back(weight: Array, scale: Array, moment: Array, low: Array, high: Array) -> Array:
    """Column by column; the error goes into the columns to come, as much as they can make up for."""
    width = moment.shape[-1]
    diagonal = np.einsum("gii->gi", moment).mean(-1)[:, None, None]
    damped = moment + (_DAMPING * diagonal + 1e-12) * np.eye(width)
    spread = np.swapaxes(np.linalg.cholesky(np.linalg.inv(damped)), 1, 2)  # upper triangles
    work, integers = weight.copy(), np.empty_like(weight)
    steps = np.broadcast_to(scale, weight.shape)
    for i in range(width):
        integers[..., i] = np.clip(np.round(work[..., i] / steps[..., i]), low[..., i], high[..., i])
        gap = (work[..., i] - integers[..., i] * steps[..., i]) / spread[:, None, i, i]
        work[..., i + 1 :] -= gap[..., None] * spread[:, None, i, i + 1 :]
    return integers


def _descended(weight: Array, scale: Array, moment: Array, start: Array, both: Array) -> Array:
    """Flips one weight at a time between its two integers, whose sum is `both`, while the error falls."""
    integers, steps = start.copy(), np.broadcast_to(scale, weight.shape)
    slope = (integers * scale - weight) @ moment
    for _ in range(_SWEEPS):
        flipped = 0
        for i in range(weight.shape[-1]):
            change = (both[..., i] - 2 * integers[..., i]) * steps[..., i]
            gain = change * (2 * slope[..., i] + change * moment[:, None, i, i])
            rows: tuple[Any, ...] = np.nonzero(gain < -1e-9 * np.abs(change * slope[..., i]))
            if not len(rows[0]):
                continue
            integers[(*rows, i)] = both[(*rows, i)] - integers[(*rows, i)]
            slope[rows] += change[rows][:, None] * moment[rows[0], i]
            flipped += len(rows[0])
        if not flipped:
            break
    return integers


def _layer(wiring: Wiring, node: NodeProto, moments: list[Array], input_scale: float, numbers: Numbers) -> Array:
    weight, bias = weight_and_bias(wiring, node)
    axis = channel_axis(node)
    scale = weight_scale(weight, bias, axis=axis, input_scale=input_scale, numbers=numbers)
    rows = _as_rows(node, weight).astype(np.float64)
    steps = _as_rows(node, np.broadcast_to(along(scale, weight.ndim, axis), weight.shape)).astype(np.float64)
    pieces = [slice(at, at + _WIDEST) for at in range(0, rows.shape[-1], _WIDEST)]
    made = [round_rows(rows[..., p], steps[..., p], m, highest(numbers)) for p, m in zip(pieces, moments, strict=True)]
    integers = np.concatenate(made, axis=-1).astype(np.int8)
    if axis == 0:
        return integers.reshape(weight.shape)
    return np.ascontiguousarray(integers[0].T)


def _as_rows(node: NodeProto, weight: Array) -> Array:
    """(groups, out, in): the weights that one output sums over in a row."""
    if node.op_type == "Conv":
        groups = int(attribute(node, "group", 1))
        return weight.reshape(groups, weight.shape[0] // groups, -1)
    return (weight if channel_axis(node) == 0 else weight.T)[None]


def _rounded(values: Array, point: tuple[Array, Array]) -> Array:
    """What the integers of an activation stand for."""
    scale, zero = float(point[0]), int(point[1])
    ends = np.iinfo(point[1].dtype)
    return ((np.clip(np.round(values / scale) + zero, ends.min, ends.max) - zero) * scale).astype(np.float32)


def _parts(wiring: Wiring, layers: list[NodeProto]) -> Iterator[list[NodeProto]]:
    """The layers in turn, as many together as their moments may take."""
    part: list[NodeProto] = []
    held = 0
    for node in layers:
        groups, _, width = _as_rows(node, weight_and_bias(wiring, node)[0]).shape
        size = groups * width * min(width, _WIDEST)
        if part and held + size > _HELD:
            yield part
            part, held = [], 0
        part.append(node)
        held += size
    if part:
        yield part


class _Moments:
    """E[x xᵀ] of what a layer's outputs sum over, in pieces of at most `_WIDEST` columns."""

    def __init__(self, wiring: Wiring, node: NodeProto) -> None:
        self.node = node
        weight = weight_and_bias(wiring, node)[0]
        self.kernel = weight.shape[2:]
        groups, _, width = _as_rows(node, weight).shape
        self.groups = groups
        self.pieces = [slice(at, min(at + _WIDEST, width)) for at in range(0, width, _WIDEST)]
        self.squares = [np.zeros((groups, p.stop - p.start, p.stop - p.start)) for p in self.pieces]
        self.sums = [np.zeros((groups, p.stop - p.start)) for p in self.pieces]
        self.count = 0

    def add(self, values: Array) -> None:
        rows = self._rows(values)
        for piece, squares, sums in zip(self.pieces, self.squares, self.sums, strict=True):
            part = rows[..., piece]
            squares += np.swapaxes(part, 1, 2) @ part
            sums += part.sum(1)
        self.count += rows.shape[1]

    def taken(self, *, centred: bool) -> list[Array]:
        found = []
        for squares, sums in zip(self.squares, self.sums, strict=True):
            mean = sums / self.count
            found.append(squares / self.count - (mean[:, :, None] * mean[:, None, :] if centred else 0.0))
        return found

    def _rows(self, values: Array) -> Array:
        if self.node.op_type != "Conv":
            rows = values.reshape(-1, values.shape[-1])
            return rows[_spaced(len(rows), _ROWS)][None]
        return patches(self.node, values, self.kernel, self.groups, most=_ROWS)


def patches(node: NodeProto, values: Array, kernel: tuple[int, ...], groups: int, *, most: int) -> Array:
    """What each output of a convolution sums over, (groups, rows, in / groups · kernel), at evenly spaced places."""
    axes = len(kernel)
    strides, dilations = (attribute(node, name, [1] * axes) for name in ("strides", "dilations"))
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    padded = np.pad(values, [(0, 0), (0, 0), *padding(node, values.shape[2:], reach, strides)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, 2 + axes)))
    steps: tuple[Any, ...] = (*(slice(None, None, by) for by in strides), *(slice(None, None, by) for by in dilations))
    windows = windows[(slice(None), slice(None), *steps)]
    places = np.unravel_index(_spaced(math.prod(windows.shape[2 : 2 + axes]), max(1, most // len(values))), windows.shape[2 : 2 + axes])
    at: tuple[Any, ...] = (slice(None), *places)
    taken = np.moveaxis(windows, 1, 1 + axes)[at]  # (batch, places, channels, *kernel)
    rows = taken.reshape(-1, groups, values.shape[1] // groups * math.prod(kernel))
    return np.ascontiguousarray(np.moveaxis(rows, 1, 0))


def padding(node: NodeProto, size: tuple[int, ...], reach: list[int], strides: list[int]) -> list[tuple[int, int]]:
    """Zeros in front of and behind each spatial axis."""
    how = attribute(node, "auto_pad", b"NOTSET")
    if how in (b"NOTSET", b"VALID"):
        pads = attribute(node, "pads", [0] * 2 * len(size)) if how == b"NOTSET" else [0] * 2 * len(size)
        return list(zip(pads[: len(size)], pads[len(size) :], strict=True))
    totals = [max((-(-n // s) - 1) * s + r - n, 0) for n, r, s in zip(size, reach, strides, strict=True)]
    return [(t // 2, t - t // 2) if how == b"SAME_UPPER" else (t - t // 2, t // 2) for t in totals]


def _spaced(count: int, most: int) -> Array:
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))
