"""Branches, loops and sequences. What decides must be known before the network runs: branches are chosen, loops unrolled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hasten.core.errors import Unsupported
from hasten.load.importer.nodes import Body
from hasten.load.importer.table import Call, Either, Known, Value, constants, ints, operator


@operator("If")
def _if(condition: Known, *, call: Call, then_branch: Body, else_branch: Body) -> Value:
    truth = ints(condition)[0]
    if isinstance(truth, torch.SymBool):
        raise Unsupported("its condition must be known before the network runs, got one that hangs on the size of an input")
    return tuple(call.body(then_branch if truth else else_branch, ()))


@operator("Loop")
def _loop(trips: Known | None, condition: Known | None, *states: Either, call: Call, body: Body) -> Value:
    count = None if trips is None else constants(trips, "numbers of trips")[0]
    on = True if condition is None else bool(ints(condition)[0])
    carried, step = list(states), 0
    scans: list[list[Tensor]] = [[] for _ in range(len(body.outputs) - 1 - len(carried))]
    while on and (count is None or step < count):
        given = [np.asarray(step, np.int64), np.asarray(on), *carried]
        again, *found = call.body(body, given, step)
        if isinstance(again, Tensor):
            raise Unsupported("whether it goes on must be known before the network runs, got a condition that is computed")
        on, carried = bool(ints(again)[0]), found[: len(carried)]
        for rows, row in zip(scans, found[len(carried) :], strict=True):
            rows.append(call.tensor(row))
        step += 1
    if not step and scans:
        raise Unsupported("expected a loop with at least one trip, got none")
    return (*carried, *(torch.stack(rows) for rows in scans))


@operator("Scan")
def _scan(
    *given: Either, call: Call, body: Body, num_scan_inputs: int, scan_input_axes: Sequence[int] | None = None,
    scan_input_directions: Sequence[int] | None = None, scan_output_axes: Sequence[int] | None = None,
    scan_output_directions: Sequence[int] | None = None,
) -> Value:  # fmt: skip
    if call.opset < 9:
        raise Unsupported("expected operator set 9 or newer, got an older one")
    split = len(given) - num_scan_inputs
    carried, runs = list(given[:split]), [call.tensor(v) for v in given[split:]]
    axes = list(scan_input_axes or [0] * len(runs))
    ways = list(scan_input_directions or [0] * len(runs))
    steps = runs[0].shape[axes[0]]
    if not isinstance(steps, int):
        raise Unsupported("expected a constant number of steps, got one that hangs on the size of an input")
    outputs: list[list[Tensor]] = [[] for _ in range(len(body.outputs) - split)]
    for step in range(steps):
        rows = [torch.select(r, a, steps - 1 - step if back else step) for r, a, back in zip(runs, axes, ways, strict=True)]
        found = call.body(body, [*carried, *rows], step)
        carried = found[:split]
        for kept, row in zip(outputs, found[split:], strict=True):
            kept.append(call.tensor(row))
    ends = list(scan_output_axes or [0] * len(outputs))
    turned = list(scan_output_directions or [0] * len(outputs))
    stacked = [torch.stack(kept[::-1] if back else kept, a) for kept, a, back in zip(outputs, ends, turned, strict=True)]
    return (*carried, *stacked)


@operator("SequenceConstruct")
def _construct(*xs: Tensor) -> Value:
    return list(xs)


@operator("SequenceEmpty")
def _empty(*, dtype: int = 1) -> Value:
    return []


@operator("SequenceAt")
def _at(xs: Value, position: Known) -> Value:
    return xs[constants(position, "positions")[0]]


@operator("SequenceLength")
def _length(xs: Value) -> Value:
    return np.asarray(len(xs), np.int64)


@operator("SequenceInsert")
def _insert(xs: Value, x: Tensor, position: Known | None = None) -> Value:
    at = len(xs) if position is None else constants(position, "positions")[0]
    at = at + len(xs) if at < 0 else at
    return [*xs[:at], x, *xs[at:]]


@operator("SequenceErase")
def _erase(xs: Value, position: Known | None = None) -> Value:
    at = len(xs) - 1 if position is None else constants(position, "positions")[0] % len(xs)
    return [*xs[:at], *xs[at + 1 :]]


@operator("ConcatFromSequence")
def _join(xs: Value, *, call: Call, axis: int, new_axis: int = 0) -> Tensor:
    parts = [call.tensor(x) for x in xs]
    return torch.stack(parts, axis) if new_axis else torch.cat(parts, axis)


@operator("SplitToSequence")
def _split(x: Tensor, split: Known | None = None, *, axis: int = 0, keepdims: int = 1) -> Value:
    if split is None:
        parts = torch.split(x, 1, axis)
        return list(parts) if keepdims else [p.squeeze(axis) for p in parts]
    sizes = constants(split, "sizes")
    return list(torch.split(x, sizes[0] if split.ndim == 0 else sizes, axis))
