"""SOAP: Adam in the eigenbasis of Shampoo's preconditioners."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor
from typing_extensions import override

from hasten.core.errors import UsageError
from hasten.train.optim.launch import Group
from hasten.train.optim.machine import Optimizer, Options, check


class SOAP(Optimizer):
    """For every axis of a weight an average L of the products g·gᵀ; Q its eigenvectors; Adam on Qᵀg, and the step turned back by Q.

    m ← β₁m + (1 − β₁)g;  v ← β₂v + (1 − β₂)(Qᵀg)²;  p ← p − lr·√(1 − β₂ᵗ)/(1 − β₁ᵗ)·Q(Qᵀm/(√v + eps)), then
    p ← (1 − lr·weight_decay)·p. The first gradient only sets Q. Q follows L by one step of power iteration and a QR decomposition every
    `precondition_frequency` steps. Axes longer than `max_precondition_dim`, and vectors, keep the plain basis.

    Args:
        params: parameters, named parameters or groups, as in torch.
        lr: ≥ 0.
        betas: β₁ and β₂, in [0, 1).
        shampoo_beta: of L, in [0, 1); None for β₂.
        eps: ≥ 0.
        weight_decay: ≥ 0.
        precondition_frequency: steps, ≥ 1.
        max_precondition_dim: ≥ 1.
        options: see `Options`; there is no `fused` nor `state_dtype`.

    Raises:
        UsageError: on a value outside its range.
        Unsupported: complex or distributed parameters, sparse gradients.

    References:
        N. Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", 2024, arXiv:2409.11321.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        precondition_frequency: int = 10,
        max_precondition_dim: int = 2048,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "shampoo_beta": shampoo_beta, "eps": eps, "weight_decay": weight_decay}
        sizes = {"precondition_frequency": precondition_frequency, "max_precondition_dim": max_precondition_dim}
        super().__init__(params, {**defaults, **sizes}, options)

    @override
    def check(self, group: Mapping[str, Any]) -> None:
        super().check(group)
        self.refuse(group, "fused", "state_dtype")
        if group["shampoo_beta"] is not None:
            check("shampoo_beta value", group["shampoo_beta"], within=0 <= group["shampoo_beta"] < 1, expected="a number in [0, 1)")
        for name in ("precondition_frequency", "max_precondition_dim"):
            check(f"{name} value", group[name], within=group[name] >= 1, expected="an integer of at least 1")
        if isinstance(group["lr"], Tensor) and group["lr"].requires_grad:
            raise UsageError("lr must not require a gradient")

    @override
    def update(self, group: Group) -> None:
        for p, g, state in self.whole(group):
            beta = group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"]
            if not state:
                self._begin(group, p, g, state, beta)
                continue
            state["step"] += 1
            self._step(group, p, g, state)
            _observe(g, state, beta)
            if state["step"].item() % group["precondition_frequency"] == 0:
                _turn(state, g.ndim)

    def _begin(self, group: Group, p: Tensor, g: Tensor, state: dict[str, Any], beta: float) -> None:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        for axis, size in enumerate(p.shape if p.ndim > 1 else ()):
            if size <= group["max_precondition_dim"]:
                state[f"gram_{axis}"] = p.new_zeros(size, size)
        _observe(g, state, beta)
        for axis in range(p.ndim):
            if f"gram_{axis}" in state:
                gram = state[f"gram_{axis}"]  # of what is not finite there are no eigenvectors, and it shall show
                state[f"basis_{axis}"] = torch.linalg.eigh(gram)[1].flip(1) if gram.isfinite().all() else gram * math.nan

    def _step(self, group: Group, p: Tensor, g: Tensor, state: dict[str, Any]) -> None:
        (beta1, beta2), step, lr = group["betas"], state["step"].item(), float(group["lr"])
        turned = _project(g, state)
        state["exp_avg"].lerp_(g, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(turned, turned, value=1 - beta2)
        step_size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        inside = _project(state["exp_avg"], state) / (state["exp_avg_sq"].sqrt() + group["eps"])
        p.add_(_project(inside, state, back=True), alpha=-step_size)
        if group["weight_decay"]:
            p.mul_(1 - lr * group["weight_decay"])


def _project(t: Tensor, state: dict[str, Any], *, back: bool = False) -> Tensor:
    """`t` with every axis that has a basis turned into it, or back."""
    for axis in range(t.ndim):  # the first axis goes to the end each time, so after all of them the order is the old one
        basis = state.get(f"basis_{axis}")
        t = t.movedim(0, -1) if basis is None else torch.tensordot(t, basis, dims=([0], [1 if back else 0]))
    return t


def _observe(g: Tensor, state: dict[str, Any], beta: float) -> None:
    for axis in range(g.ndim):
        if f"gram_{axis}" in state:
            rows = g.movedim(axis, 0).flatten(1)
            state[f"gram_{axis}"].lerp_(rows @ rows.T, 1 - beta)


def _turn(state: dict[str, Any], axes: int) -> None:
    """One power iteration of each basis, its columns from the largest eigenvalue to the smallest; v follows the columns."""
    for axis in range(axes):
        if f"gram_{axis}" not in state:
            continue
        basis = state[f"basis_{axis}"]
        product = state[f"gram_{axis}"] @ basis
        order = torch.argsort((basis * product).sum(dim=0), descending=True)
        state["exp_avg_sq"] = state["exp_avg_sq"].index_select(axis, order)
        state[f"basis_{axis}"] = torch.linalg.qr(product[:, order])[0]
