"""Prodigy: Adam that finds the size of its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor
from typing_extensions import override

from hasten.core.errors import Unsupported, UsageError
from hasten.train.optim.expression import magnitude, sqrt
from hasten.train.optim.launch import Group, Kind, Numbers, empty_buffer, launch, local
from hasten.train.optim.machine import Optimizer, Options, check

_AVERAGES: dict[str, Kind] = {"exp_avg": "signed", "exp_avg_sq": "square"}
_ALL: dict[str, Kind] = {**_AVERAGES, "s": "weight", "p0": "weight"}


class Prodigy(Optimizer):
    """Adam with lr·d in place of lr; d grows to an estimate of the distance from the start p₀ to the solution.

    r ← β₃r + (d/d₀)·d·lr·⟨g, p₀ − p⟩ over all parameters;  s ← β₃s + (d/d₀)·d·lr·g;  d ← max(d, d_coef·r/‖s‖₁), at most growth_rate
    times as large;  m ← β₁m + (1 − β₁)·d·g;  v ← β₂v + (1 − β₂)·d²g²;  p ← p − d·lr·(m/(√v + d·eps) + weight_decay·p).

    Args:
        params: parameters, named parameters or groups, as in torch.
        lr: a factor, ≥ 0, the same in all groups (or 0); leave it at 1, with a schedule that falls to 0.
        betas: β₁ and β₂, in [0, 1).
        beta3: in [0, 1); None for √β₂.
        eps: ≥ 0.
        weight_decay: ≥ 0.
        decouple: False adds weight_decay·p to the gradient instead.
        use_bias_correction: Adam's.
        d0: where d begins, > 0; read from the first group.
        d_coef: > 0.
        growth_rate: of d in one step, > 1.
        options: see `Options`.

    Raises:
        UsageError: on a value outside its range.
        Unsupported: distributed tensors, sparse gradients.

    References:
        K. Mishchenko, A. Defazio, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", 2023, arXiv:2306.06101.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0,
        *,
        decouple: bool = True,
        use_bias_correction: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "beta3": beta3, "eps": eps, "weight_decay": weight_decay, "decouple": decouple}
        sizes = {"use_bias_correction": use_bias_correction, "d0": d0, "d_coef": d_coef, "growth_rate": growth_rate}
        super().__init__(params, {**defaults, **sizes, "d": d0, "d_max": d0, "d_numerator": 0.0, "k": 0}, options)

    @override
    def check(self, group: Mapping[str, Any]) -> None:
        super().check(group)
        if group["beta3"] is not None:
            check("beta3 value", group["beta3"], within=0 <= group["beta3"] < 1, expected="a number in [0, 1)")
        for name in ("d0", "d_coef"):
            check(f"{name} value", group[name], within=group[name] > 0, expected="a number above 0")
        check("growth_rate value", group["growth_rate"], within=group["growth_rate"] > 1, expected="a number above 1")

    @override
    def update_all(self) -> None:
        """Two passes over the tensors: the averages and the two sums, then the step with the new d."""
        lead = self.param_groups[0]
        rates = {float(group["lr"]) for group in self.param_groups}
        lr = max(rates)
        if rates - {lr, 0.0}:
            raise UsageError(f"lr must be the same in all groups, or 0, got {sorted(rates)}")
        k, d, d0 = lead["k"], lead["d"], lead["d0"]
        beta1, beta2 = lead["betas"]
        beta3 = math.sqrt(beta2) if lead["beta3"] is None else lead["beta3"]
        corrected = math.sqrt(1 - beta2 ** (k + 1)) / (1 - beta1 ** (k + 1)) if lead["use_bias_correction"] else 1.0
        rate = d * lr * corrected
        numerator, denominator = beta3 * lead["d_numerator"], 0.0
        for group in self.param_groups:
            sums = self._gather(group, {"d": d, "beta3": beta3, "pull": d / d0 * rate}) if float(group["lr"]) else {}
            numerator += d / d0 * rate * sums.get("numerator", 0.0)
            denominator += sums.get("denominator", 0.0)
        if denominator == 0:  # no gradient yet
            return
        found = lead["d_coef"] * numerator / denominator
        first = max(d, found) if d == d0 else d
        d_max = max(lead["d_max"], found)
        after = {"d": min(d_max, first * lead["growth_rate"]), "d_max": d_max, "d_numerator": numerator, "k": k + 1}
        for group in self.param_groups:
            group.update(after)
            if not float(group["lr"]):
                continue
            moving = {"d": after["d"], "rate": rate, "eps": group["eps"], "weight_decay": group["weight_decay"]}
            flags = {"decays": group["weight_decay"] != 0 and group["decouple"]}
            launch(_move, group, _AVERAGES, self._members(group), numbers=moving, flags=flags, step=k + 1)

    def _gather(self, group: Group, numbers: Numbers) -> Numbers:
        members = self._members(group)
        for p, state in members:
            if not state:
                if local(p) is not p:
                    raise Unsupported("Prodigy does not support distributed tensors: its two sums go over all processes; take AdamW")
                if p.dtype not in (torch.float32, torch.float64) or group["state_dtype"] == torch.int8:
                    raise Unsupported(f"Prodigy needs float32 or float64 parameters and no int8 state, got {p.dtype}")
                state |= {name: empty_buffer(kind, group["state_dtype"], p) for name, kind in _ALL.items()}
                state["p0"].copy_(p)
        beta1, beta2 = group["betas"]
        numbers = {**numbers, "beta1": beta1, "beta2": beta2, "weight_decay": group["weight_decay"]}
        flags = {"decays": group["weight_decay"] != 0 and not group["decouple"]}
        return launch(_gathered, group, _ALL, members, numbers=numbers, flags=flags, step=group["k"] + 1)

    def _members(self, group: Group) -> list[tuple[Tensor, dict[str, Any]]]:
        return [(p, self.state[p]) for p in self.given(group)]


def _gathered(x: Any, h: Any) -> None:
    """One element of the first pass."""
    g = x.g + h.weight_decay * x.p if h.decays else x.g
    x.sums["numerator"] = g * (x.p0 - x.p)
    x.exp_avg = h.beta1 * x.exp_avg + h.d * (1 - h.beta1) * g
    x.exp_avg_sq = h.beta2 * x.exp_avg_sq + h.d * h.d * (1 - h.beta2) * g * g
    x.s = h.beta3 * x.s + h.pull * g
    x.sums["denominator"] = magnitude(x.s)


def _move(x: Any, h: Any) -> None:
    """One element of the second."""
    if h.decays:
        x.p = x.p * (1 - h.rate * h.weight_decay)
    x.p = x.p - h.rate * (x.exp_avg / (sqrt(x.exp_avg_sq) + h.d * h.eps))
