"""Adafactor: second moments of matrices from their rows and columns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor
from typing_extensions import override

from hasten.core.errors import UsageError
from hasten.train.optim.launch import Group
from hasten.train.optim.machine import Optimizer, Options, check_shared


class Adafactor(Optimizer):
    """Divides the gradient by a root of rank one: V = R·C/mean(R), with averages R and C of g² over the rows and columns.

    β = 1 − t^beta2_decay;  R ← βR + (1 − β)·mean_cols(g²);  C ← βC + (1 − β)·mean_rows(g²);  u = g/max(√V, eps₁);
    p ← (1 − lr·weight_decay)·p − max(eps₂, rms(p))·min(lr, 1/√t) · u/max(1, rms(u)/d).  Vectors keep V itself. The last two axes are
    the matrix, as in torch.

    Args:
        params: parameters, named parameters or groups, as in torch.
        lr: ≥ 0; an upper bound, relative to the size of the parameter.
        beta2_decay: ≤ 0.
        eps: (eps₁, eps₂), ≥ 0; None for the precision of the parameter's type.
        d: longest update, ≥ 1.
        weight_decay: ≥ 0.
        options: see `Options`; there is no `fused` nor `state_dtype`: the state is small already.

    Raises:
        UsageError: on a value outside its range.
        Unsupported: complex or distributed parameters, sparse gradients.

    References:
        N. Shazeer, M. Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018, arXiv:1804.04235.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay}
        super().__init__(params, defaults, options)

    @override
    def check(self, group: Mapping[str, Any]) -> None:
        check_shared({**group, "eps": None})
        self.refuse(group, "fused", "state_dtype")
        for name, value in zip(("epsilon1", "epsilon2"), group["eps"], strict=True):
            if value is not None and not value >= 0:
                raise UsageError(f"{name} should be >= 0, got {value}")
        if not group["beta2_decay"] <= 0:
            raise UsageError(f"beta2_decay should be <= 0, got {group['beta2_decay']}")
        if not group["d"] >= 1:
            raise UsageError(f"Clipping threshold d should be >= 1, got {group['d']}")

    @override
    def update(self, group: Group) -> None:
        for p, g, state in self.whole(group):
            if not state:
                state["step"] = torch.tensor(0.0)
                if p.ndim > 1:
                    state["row_var"], state["col_var"] = p.new_zeros((*p.shape[:-1], 1)), p.new_zeros((*p.shape[:-2], 1, p.shape[-1]))
                else:
                    state["variance"] = torch.zeros_like(p)
            state["step"] += 1
            step, lr = state["step"].item(), float(group["lr"])
            least = torch.finfo(p.dtype).eps if group["eps"][0] is None else group["eps"][0]
            length = max(group["eps"][1], _rms(p)) * min(lr, step**-0.5)
            if group["weight_decay"]:
                p.mul_(1 - lr * group["weight_decay"])
            update = _scaled(g, state, step ** group["beta2_decay"], least)
            p.add_(update, alpha=-length / max(1.0, _rms(update) / group["d"]))


def _rms(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t)) / math.sqrt(max(t.numel(), 1))


def _scaled(g: Tensor, state: dict[str, Any], new: float, least: float) -> Tensor:
    """g/max(√V, least) with V brought up to date; `new` is the weight of this gradient in it."""
    if g.ndim < 2:
        variance: Tensor = state["variance"].lerp_(g * g, new)
        return g * variance.clamp(min=least * least).rsqrt()
    rows: Tensor = state["row_var"].lerp_(_mean_square(g, -1), new)
    columns: Tensor = state["col_var"].lerp_(_mean_square(g, -2), new)
    scale = rows.mean(dim=-2, keepdim=True).clamp_(min=least)
    # 1/√V is the product of two vectors; where it stays below 1/least everywhere, V need not be written out
    across, down = (rows / scale).rsqrt_(), columns.rsqrt()
    if (across.amax(dim=-2, keepdim=True) * down.amax(dim=-1, keepdim=True)).max().item() <= 1 / least:
        return (g * across).mul_(down)
    return ((rows @ columns) / scale).clamp_(min=least * least).rsqrt_().mul_(g)


def _mean_square(g: Tensor, axis: int) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(g, dim=axis, keepdim=True)
    return norms.square_().div_(g.shape[axis])
