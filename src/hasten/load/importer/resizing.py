"""Resizing along each axis: torch's own where it means the same, else a product with a constant matrix per axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.core.errors import Unsupported
from hasten.load.importer.table import Array, bounded, sym_int

_PIXEL = ("half_pixel", "pytorch_half_pixel")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a resize reads its input."""

    mode: str
    place: str
    nearest: str
    cubic: float
    antialias: bool
    exclude: bool
    outside: float


Plan = list[tuple[Any, float]]
"""For each axis its new size and its scale."""


def plan(x: Tensor, scales: list[Any] | None, sizes: list[Any] | None, axes: Sequence[int] | None, policy: str) -> Plan:
    """The new size and the scale of each axis."""
    chosen = [a % x.dim() for a in axes] if axes is not None else list(range(x.dim()))
    found: Plan = [(s, 1.0) for s in x.shape]
    given = sizes if sizes is not None else scales
    if given is None or len(given) != len(chosen):
        raise Unsupported(f"expected one scale or size for each of {len(chosen)} axes, got {given}")
    if sizes is not None and policy != "stretch":
        ratios = [w / x.shape[a] for a, w in zip(chosen, sizes, strict=True)]
        ratio = min(ratios) if policy == "not_larger" else max(ratios)
        for a in chosen:
            found[a] = (math.floor(x.shape[a] * ratio + 0.5), ratio)
        return found
    for a, value in zip(chosen, given, strict=True):
        old = x.shape[a]
        if sizes is not None:
            found[a] = (value, value / old if isinstance(value, int) and isinstance(old, int) else 0.0)
        elif isinstance(value, (int, float)):
            new = old * int(value) if float(value).is_integer() else math.floor(old * value)
            found[a] = (new, float(value))
        else:
            found[a] = (sym_int(old * value), 0.0)
    return found


def native(x: Tensor, todo: Plan, mode: str, place: str, nearest: str, antialias: bool, cubic: float) -> Tensor | None:
    """torch's interpolate, where batch and channels stay and the rule is one of its own; else None."""
    axes = x.dim() - 2
    if not 1 <= axes <= 3 or any(new is not old and new != old for (new, _), old in zip(todo[:2], x.shape[:2], strict=True)):
        return None
    sizes = [n for n, _ in todo[2:]]
    corners = place == "align_corners"
    if mode == "nearest" and place == "asymmetric" and nearest == "floor":
        word = "nearest"
    elif mode == "nearest" and place in _PIXEL and nearest == "round_prefer_floor" and _whole(todo[2:]):
        word = "nearest"  # by a whole factor every rule for ties reads the same
    elif mode == "linear" and (place in _PIXEL or corners) and not antialias:
        word = {1: "linear", 2: "bilinear", 3: "trilinear"}[axes]
    elif mode == "cubic" and (place in _PIXEL or corners) and axes == 2 and not antialias and cubic == -0.75:
        word = "bicubic"
    else:
        return None
    exact = all(
        not isinstance(s, int) or not isinstance(n, int) or _ratio(n, s, f) for (n, f), s in zip(todo[2:], x.shape[2:], strict=True)
    )
    single = place == "pytorch_half_pixel" and any(isinstance(s, int) and s == 1 for s in sizes)
    if not exact or (single and mode != "nearest") or not x.is_floating_point():
        return None
    return F.interpolate(x, size=sizes, mode=word, align_corners=corners if word not in ("nearest", "nearest-exact") else None)


def _whole(todo: Plan) -> bool:
    return all(f >= 1 and float(f).is_integer() for _, f in todo)


def _ratio(new: int, old: int, scale: float) -> bool:
    """Whether the scale is the ratio of the sizes, which is what torch reads from them."""
    return scale == 0 or abs(new / old - scale) < 1e-6 * scale


def by_matrices(x: Tensor, todo: Plan, rule: Rule, region: Array | None, axes: Sequence[int] | None) -> Tensor:
    """Each axis that changes is multiplied by a matrix (new, old)."""
    kind = x.dtype
    if not x.is_floating_point():
        x = x.float()
    chosen = list(range(x.dim())) if axes is None else [a % x.dim() for a in axes]
    for axis, (new, scale) in enumerate(todo):
        part = None
        if region is not None and axis in chosen:
            at = chosen.index(axis)
            part = (float(region[at]), float(region[len(chosen) + at]))
        if new is x.shape[axis] or (new == x.shape[axis] and scale == 1 and part in (None, (0.0, 1.0))):
            continue
        if not isinstance(new, int) or not isinstance(x.shape[axis], int):
            raise Unsupported("expected a resize of fixed sizes in this mode, got one that hangs on the size of an input")
        bounded([new, x.shape[axis]])
        matrix, outside = _matrix(x.shape[axis], new, scale, rule, part)
        weights = torch.tensor(matrix.tolist(), dtype=x.dtype)
        x = torch.movedim(torch.movedim(x, axis, -1) @ weights.t(), -1, axis)
        if outside.any():
            mask = torch.tensor(outside.tolist()).reshape([-1 if a == axis else 1 for a in range(x.dim())])
            x = torch.where(mask, torch.full_like(x, rule.outside), x)
    return x if kind == x.dtype else x.round().to(kind) if rule.mode != "nearest" else x.to(kind)


def _places(old: int, new: int, scale: float, rule: Rule, part: tuple[float, float] | None) -> Array:
    """Where each new element reads."""
    i = np.arange(new, dtype=np.float64)
    if rule.place == "align_corners":
        return i * (old - 1) / max(scale * old - 1, 1) if new > 1 else i * 0
    if rule.place == "asymmetric":
        return i / scale
    if rule.place == "tf_crop_and_resize":
        start, end = part or (0.0, 1.0)
        if new == 1:
            return np.asarray([0.5 * (start + end) * (old - 1)])
        return start * (old - 1) + i * (end - start) * (old - 1) / (new - 1)
    if rule.place == "pytorch_half_pixel" and new == 1:
        return i * 0
    if rule.place == "half_pixel_symmetric":
        adjust = new / (scale * old)
        center = old / 2
        return center * (1 - adjust) + (i + 0.5) / scale - 0.5
    if rule.place not in _PIXEL:
        raise Unsupported(f"expected a resize that hasten knows, got coordinates {rule.place!r}")
    return (i + 0.5) / scale - 0.5


def _matrix(old: int, new: int, scale: float, rule: Rule, part: tuple[float, float] | None) -> tuple[Array, Array]:
    """The weights (new, old), and which new elements lie outside."""
    scale = scale or new / old
    at = _places(old, new, scale, rule, part)
    outside = (at < 0) | (at > old - 1) if rule.place == "tf_crop_and_resize" else np.zeros(new, bool)
    made = np.zeros((new, old))
    rows = np.arange(new)
    if rule.mode == "nearest":
        halves = {"round_prefer_floor": np.ceil(at - 0.5), "round_prefer_ceil": np.floor(at + 0.5)}
        nearest = (halves | {"floor": np.floor(at), "ceil": np.ceil(at)})[rule.nearest]
        made[rows, np.clip(nearest, 0, old - 1).astype(int)] = 1
        return made, outside
    shrink = min(scale, 1.0) if rule.antialias else 1.0
    reach = (1 if rule.mode == "linear" else 2) / shrink
    for step in range(-math.ceil(reach) - 1, math.ceil(reach) + 2):
        where = np.floor(at).astype(int) + step
        weight = _kernel((at - where) * shrink, rule)
        if rule.exclude or rule.antialias:
            weight = np.where((where < 0) | (where >= old), 0, weight)
        np.add.at(made, (rows, np.clip(where, 0, old - 1)), weight)
    if rule.exclude or rule.antialias:
        made /= made.sum(1, keepdims=True)
    return made, outside


def _kernel(t: Array, rule: Rule) -> Array:
    t = np.abs(t)
    if rule.mode == "linear":
        return np.maximum(1 - t, 0)  # type: ignore[no-any-return]
    a = rule.cubic
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0))
