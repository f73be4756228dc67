"""Arithmetic on sizes: the operators by which a graph computes shapes, on NumPy arrays of (symbolic) integers.

Entries are Python numbers or torch's symbolic ones, so that a size that the file leaves open stays open.
"""

from __future__ import annotations

import functools
import math
import operator as op
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hasten.core.errors import Unsupported
from hasten.load.importer.table import SIZES, Array, Call, bounded, ints, sym_int, sym_max, sym_min, sym_not

_END = 2**63


def _entry(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        SIZES.update(dict.fromkeys(names, function))
        return function

    return enter


def sized_array(value: Any) -> Array:
    """An array of objects; NumPy gives back a bare number where there is no axis."""
    made = np.empty(np.shape(value), object)
    made[...] = value
    return made


def _pointwise(function: Callable[..., Any]) -> Callable[..., Array]:
    many = np.frompyfunc(lambda a, b: _held(function(a, b)), 2, 1)
    return lambda _, *given: sized_array(functools.reduce(many, (sized_array(g) for g in given)))


def _single(function: Callable[[Any], Any]) -> Callable[..., Array]:
    return lambda _, x: sized_array(np.frompyfunc(function, 1, 1)(sized_array(x)))


def _float(value: Any) -> bool:
    return isinstance(value, (float, torch.SymFloat))


def _held(value: Any) -> Any:
    """The value, refused where ONNX's integers would not hold it: Python's grow until there is no memory left."""
    if isinstance(value, int) and abs(value) >= _END:
        raise Unsupported("expected sizes of 64 bits, got a larger one")
    return value


def _power(a: Any, b: Any) -> Any:
    """a^b, with a look at how long it will be before it is computed."""
    if isinstance(a, int) and isinstance(b, int) and abs(a) > 1 and b * a.bit_length() > 2 * _END.bit_length():
        return _held(_END)
    return a**b


def _divide(a: Any, b: Any) -> Any:
    return a / b if _float(a) or _float(b) else a // b


for _name, _function in {
    "Add": op.add, "Sub": op.sub, "Mul": op.mul, "Div": _divide, "Mod": op.mod, "Pow": _power, "Max": sym_max, "Min": sym_min,
    "Equal": op.eq, "Less": op.lt, "Greater": op.gt, "LessOrEqual": op.le, "GreaterOrEqual": op.ge, "And": op.and_, "Or": op.or_,
}.items():  # fmt: skip
    SIZES[_name] = _pointwise(_function)
for _name, _single_function in {
    "Neg": op.neg, "Abs": abs, "Not": sym_not, "Ceil": lambda v: math.ceil(v) if _float(v) else v,
    "Floor": lambda v: math.floor(v) if _float(v) else v, "Sqrt": torch.sym_sqrt,
}.items():  # fmt: skip
    SIZES[_name] = _single(_single_function)


@_entry("Identity")
def _identity(call: Call, x: Array) -> Array:
    return x


@_entry("Cast")
def _cast(call: Call, x: Array, *, to: int, saturate: int = 1, round_mode: str = "") -> Array:
    if to in (1, 10, 11, 16):
        return _single(torch.sym_float)(call, x)
    return x if to == 9 else _single(lambda v: sym_int(v) if _float(v) else v)(call, x)


@_entry("CastLike")
def _cast_like(call: Call, x: Array, like: Array, *, saturate: int = 1, round_mode: str = "") -> Array:
    floats = like.dtype.kind == "f" or (like.dtype == object and any(_float(v) for v in ints(like)))
    made: Array = _cast(call, x, to=1 if floats else 7)
    return made


@_entry("Shape")
def _shape(call: Call, x: Array, *, start: int = 0, end: int | None = None) -> Array:
    return sized_array(list(x.shape[start:end]))


@_entry("Size")
def _size(call: Call, x: Array) -> Array:
    return sized_array(x.size)


@_entry("Gather")
def _gather(call: Call, x: Array, indices: Array, *, axis: int = 0) -> Any:
    if indices.dtype == object and any(isinstance(i, torch.SymInt) for i in ints(indices)):
        return NotImplemented
    return sized_array(np.take(x, indices.astype(np.int64), axis))


@_entry("Concat")
def _concat(call: Call, *xs: Array, axis: int) -> Array:
    return np.concatenate([x.astype(object) for x in xs], axis)


@_entry("Slice")
def _slice(call: Call, x: Array, starts: Array, ends: Array, axes: Array | None = None, steps: Array | None = None) -> Any:
    if x.dtype != object and any(isinstance(v, torch.SymInt) for v in (*ints(starts), *ints(ends))):
        return NotImplemented
    where = [slice(None)] * x.ndim
    count = len(ints(starts))
    for a, b, axis, step in zip(
        ints(starts),
        ints(ends),
        ints(axes) if axes is not None else range(count),
        ints(steps) if steps is not None else [1] * count,
        strict=True,
    ):
        where[axis] = slice(int(a), None if step < 0 and b < -x.shape[axis] else int(b), step)
    return x[tuple(where)]


@_entry("Unsqueeze")
def _unsqueeze(call: Call, x: Array, axes_: Array | None = None, *, axes: Sequence[int] = ()) -> Array:
    return np.expand_dims(x, tuple(axes) if axes_ is None else tuple(ints(axes_)))


@_entry("Squeeze")
def _squeeze(call: Call, x: Array, axes_: Array | None = None, *, axes: Sequence[int] | None = None) -> Array:
    chosen = tuple(ints(axes_)) if axes_ is not None else axes
    return sized_array(np.squeeze(x, None if chosen is None else tuple(chosen)))


@_entry("Reshape")
def _reshape(call: Call, x: Array, shape: Array, *, allowzero: int = 0) -> Any:
    if x.dtype != object or any(isinstance(s, torch.SymInt) for s in ints(shape)):
        return NotImplemented
    return x.reshape([int(s) or x.shape[i] for i, s in enumerate(ints(shape))])


@_entry("Transpose")
def _transpose(call: Call, x: Array, *, perm: Sequence[int] | None = None) -> Array:
    return x.transpose(perm)


@_entry("Where")
def _where(call: Call, condition: Array, x: Array, y: Array) -> Array:
    return sized_array(np.frompyfunc(lambda c, a, b: a if c else b, 3, 1)(sized_array(condition), sized_array(x), sized_array(y)))


@_entry("Expand")
def _expand(call: Call, x: Array, shape: Array) -> Any:
    wanted = ints(shape)
    if x.dtype != object or any(isinstance(s, torch.SymInt) for s in wanted):
        return NotImplemented
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(bounded(wanted)))).copy()


def _reduction(function: Callable[[Any, Any], Any]) -> Callable[..., Array]:
    def reduce(call: Call, x: Array, axes_: Array | None = None, *, axes: Any = None, keepdims: int = 1, **rest: int) -> Any:
        if x.ndim > 1:
            return NotImplemented
        total = functools.reduce(lambda a, b: _held(function(a, b)), ints(x))
        return sized_array([total] if keepdims and x.ndim else total)

    return reduce


for _name, _function in {"ReduceProd": op.mul, "ReduceSum": op.add, "ReduceMax": sym_max, "ReduceMin": sym_min}.items():
    SIZES[_name] = _reduction(_function)
