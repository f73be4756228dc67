"""Operators that run over axes: sums, means, maxima, softmax, and running sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hasten.load.importer.table import Call, Known, constants, operator


def _reduction(name: str, function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> None:
    def reduce(
        x: Tensor, axes_: Known | None = None, *, axes: Sequence[int] | None = None, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> Tensor:
        chosen = axes if axes_ is None else constants(axes_, "axes")
        if not chosen and noop_with_empty_axes:
            return _each(name, x)
        over = tuple(a % x.dim() for a in chosen) if chosen else tuple(range(x.dim()))
        return function(x, over, bool(keepdims)) if over else _each(name, x)

    operator(name)(reduce)


def _each(name: str, x: Tensor) -> Tensor:
    """The reduction of each element by itself."""
    alone = {"ReduceL1": torch.abs, "ReduceL2": torch.abs, "ReduceSumSquare": torch.square, "ReduceLogSum": torch.log}
    return alone[name](x) if name in alone else x


def _product(x: Tensor, over: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted(over, reverse=True):
        x = x.prod(axis, keepdim=keep, dtype=x.dtype)
    return x


def _extreme(function: Callable[..., Tensor], least: bool) -> Callable[[Tensor, tuple[int, ...], bool], Tensor]:
    def extreme(x: Tensor, over: tuple[int, ...], keep: bool) -> Tensor:
        if x.dtype == torch.bool:
            return extreme(x.to(torch.uint8), over, keep).bool()
        if any(isinstance(x.shape[a], int) and x.shape[a] == 0 for a in over):
            shape = [1 if a in over else s for a, s in enumerate(x.shape) if keep or a not in over]
            info = torch.finfo(x.dtype) if x.is_floating_point() else torch.iinfo(x.dtype)
            bound = (float("-inf") if least else float("inf")) if x.is_floating_point() else (info.min if least else info.max)
            return torch.full(shape, bound, dtype=x.dtype)
        return function(x, over, keepdim=keep)

    return extreme


def _total(x: Tensor, over: tuple[int, ...], keep: bool) -> Tensor:
    return x.sum(over, keepdim=keep, dtype=x.dtype)


_reduction("ReduceSum", _total)
_reduction(
    "ReduceMean", lambda x, over, keep: x.mean(over, keepdim=keep) if x.is_floating_point() else x.double().mean(over, keep).to(x.dtype)
)
_reduction("ReduceMax", _extreme(torch.amax, True))
_reduction("ReduceMin", _extreme(torch.amin, False))
_reduction("ReduceProd", _product)
_reduction("ReduceL1", lambda x, over, keep: _total(x.abs(), over, keep))
_reduction("ReduceL2", lambda x, over, keep: torch.linalg.vector_norm(x.to(_float(x)), 2, over, keep).to(x.dtype))
_reduction("ReduceSumSquare", lambda x, over, keep: _total(x.square(), over, keep))
_reduction("ReduceLogSum", lambda x, over, keep: _total(x, over, keep).log())
_reduction("ReduceLogSumExp", lambda x, over, keep: torch.logsumexp(x.to(_float(x)), over, keep).to(x.dtype))


def _float(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.float64


def _place(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def place(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
        if not select_last_index:
            return function(x, axis, keepdim=bool(keepdims))
        return x.shape[axis] - 1 - function(torch.flip(x, [axis]), axis, keepdim=bool(keepdims))

    return place


operator("ArgMax")(_place(torch.argmax))
operator("ArgMin")(_place(torch.argmin))


def _normalised(function: Callable[[Tensor, int], Tensor]) -> Callable[..., Tensor]:
    """Before operator set 13 the axes from `axis` on count as one."""

    def along(x: Tensor, *, call: Call, axis: int | None = None) -> Tensor:
        if call.opset >= 13:
            return function(x, -1 if axis is None else axis)
        first = 1 if axis is None else axis % x.dim()
        if first == x.dim() - 1:
            return function(x, -1)
        return function(torch.flatten(x, first), -1).reshape(x.shape)

    return along


def _hardmax(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1)


operator("Softmax")(_normalised(torch.softmax))
operator("LogSoftmax")(_normalised(torch.log_softmax))
operator("Hardmax")(_normalised(_hardmax))


def _running(function: Callable[..., Tensor], start: int) -> Callable[..., Tensor]:
    def running(x: Tensor, axis: Known, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
        over = constants(axis, "axes")[0] % x.dim()
        x = torch.flip(x, [over]) if reverse else x
        found = function(x, over, dtype=x.dtype)
        if exclusive:
            head = (slice(None),) * over + (slice(0, 1),)
            body = (slice(None),) * over + (slice(0, -1),)
            found = torch.cat([torch.full_like(found[head], start), found[body]], over)
        return torch.flip(found, [over]) if reverse else found

    return running


operator("CumSum")(_running(torch.cumsum, 0))
operator("CumProd")(_running(torch.cumprod, 1))
