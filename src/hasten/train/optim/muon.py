"""Muon: the momentum of a weight matrix, made orthogonal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor
from typing_extensions import override

from hasten.core.errors import Unsupported, UsageError
from hasten.measure import machine as processor
from hasten.train.optim.adam import Adam
from hasten.train.optim.launch import Group, Kind, empty_buffer, launch, local
from hasten.train.optim.machine import Optimizer, Options, check, check_betas

_QUINTIC = (3.4445, -4.7750, 2.0315)
_ADJUST = (None, "original", "match_rms_adamw")


class Muon(Optimizer):
    """m ← μ·m + (1 − μ)·g;  u = μ·m + (1 − μ)·g (`nesterov`) or m;  p ← (1 − lr·weight_decay)·p − lr·a·orthogonal(u).

    orthogonal(u) brings all singular values near 1 by Newton–Schulz steps X ← aX + (bXXᵀ + c(XXᵀ)²)X. a = √max(1, rows/columns), or
    0.2·√max(rows, columns) for "match_rms_adamw", so that AdamW's lr fits. Filters of convolutions are matrices (out, in·k·k). What has
    fewer than two axes, and groups with `use_muon=False` (embeddings, the last layer), take AdamW's step with the same lr.

    Args:
        params: parameters, named parameters or groups, as in torch; a group may hold use_muon=False.
        lr: ≥ 0.
        weight_decay: ≥ 0.
        momentum: μ, in [0, 1).
        nesterov: whether to look ahead.
        ns_coefficients: a, b, c.
        eps: smallest norm that u is divided by, ≥ 0.
        ns_steps: in [0, 100).
        adjust_lr_fn: a; None or "original", or "match_rms_adamw".
        adam_betas, adam_eps: of AdamW's step.
        options: see `Options`.

    The steps are taken in bfloat16 where the processor multiplies it, as in torch, else in float32.

    Raises:
        UsageError: on a value outside its range.
        Unsupported: complex or distributed matrices, sparse gradients.

    References:
        K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, kellerjordan.github.io/posts/muon.
        J. Liu et al., "Muon is Scalable for LLM Training", 2025, arXiv:2502.16982 (match_rms_adamw).
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = _QUINTIC,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        adam_betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov, "eps": eps}
        steps = {"ns_coefficients": ns_coefficients, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        super().__init__(params, {**defaults, **steps, "adam_betas": adam_betas, "adam_eps": adam_eps, "use_muon": True}, options)

    @override
    def check(self, group: Mapping[str, Any]) -> None:
        super().check(group)
        check_betas(group["adam_betas"])
        check("momentum value", group["momentum"], within=0 <= group["momentum"] < 1, expected="a number in [0, 1)")
        check("ns_steps value", group["ns_steps"], within=0 <= group["ns_steps"] < 100, expected="a number in [0, 100)")
        if group["adjust_lr_fn"] not in _ADJUST:
            raise UsageError(f"Adjust learning rate function {group['adjust_lr_fn']} is not supported, choose one of {list(_ADJUST)}")

    @override
    def update(self, group: Group) -> None:
        given = self.given(group)
        matrices = [p for p in given if p.ndim >= 2 and group["use_muon"]]
        self._step_matrices(group, matrices)
        self._step_rest(group, [p for p in given if not (p.ndim >= 2 and group["use_muon"])])

    def _step_matrices(self, group: Group, matrices: list[Tensor]) -> None:
        kinds: dict[str, Kind] = {"momentum_buffer": "signed", "update": "weight"}
        members = []
        for p in matrices:
            if p.is_complex() or local(p) is not p:
                raise Unsupported(f"Muon does not support complex parameters nor distributed ones, got {type(p).__name__} of {p.dtype}")
            state = self.state[p]
            state.setdefault("step", torch.tensor(0.0))  # torch's own Muon keeps none
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = empty_buffer("signed", group["state_dtype"], p)
                if group["state_dtype"] == torch.int8:
                    raise Unsupported("Muon does not support state_dtype=torch.int8; take torch.bfloat16")
            state["step"] += 1
            members.append((p, {**state, "update": torch.empty_like(p)}))
        step = max((int(state["step"].item()) for _, state in members), default=0)
        numbers = {"momentum": group["momentum"]}
        launch(_averaged, group, kinds, members, numbers=numbers, flags={"nesterov": group["nesterov"]}, step=step)
        lr = float(group["lr"])
        for p, state in members:
            u = orthogonal(state["update"].flatten(1), group["ns_steps"], group["ns_coefficients"], group["eps"])
            p.mul_(1 - lr * group["weight_decay"]).add_(u.view(p.shape), alpha=-lr * _adjusted(group["adjust_lr_fn"], u))

    def _step_rest(self, group: Group, params: list[Tensor]) -> None:
        if not params:
            return
        borrowed = {**group, "params": params, "betas": group["adam_betas"], "eps": group["adam_eps"]}
        adam = Adam.__new__(Adam)  # AdamW's step on this optimizer's own state
        adam.state, adam.param_groups = self.state, [{**borrowed, "amsgrad": False, "decoupled_weight_decay": True}]
        adam.update(adam.param_groups[0])


def _averaged(x: Any, h: Any) -> None:
    """One element of the momentum."""
    x.momentum_buffer = h.momentum * x.momentum_buffer + (1 - h.momentum) * x.g
    x.update = h.momentum * x.momentum_buffer + (1 - h.momentum) * x.g if h.nesterov else x.momentum_buffer


def _adjusted(how: str | None, u: Tensor) -> float:
    rows, columns = u.shape
    return 0.2 * math.sqrt(max(rows, columns)) if how == "match_rms_adamw" else math.sqrt(max(1.0, rows / columns))


def orthogonal(u: Tensor, steps: int, coefficients: tuple[float, float, float], eps: float) -> Tensor:
    """A matrix with the singular vectors of `u` and singular values near 1, in the type of `u`.

    >>> u = orthogonal(torch.diag(torch.tensor([3.0, 0.5])), 10, (1.5, -0.5, 0.0), 1e-7)
    >>> torch.allclose(u, torch.eye(2), atol=1e-3)
    True
    """
    a, b, c = coefficients
    half = u.device.type != "cpu" or processor.has_bf16()
    wide = u.shape[0] <= u.shape[1]
    x = (u if wide else u.T).to(torch.bfloat16 if half and u.dtype != torch.float64 else u.dtype)
    x = x / torch.linalg.vector_norm(x).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        square = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        square.diagonal().add_(a)  # aX + (…)X without a copy of X
        x = square @ x
    result: Tensor = (x if wide else x.T).to(u.dtype)
    return result
