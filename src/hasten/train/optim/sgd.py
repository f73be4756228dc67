"""Steps along the gradient, or along an average of gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from torch import Tensor
from typing_extensions import override

from hasten.core.errors import UsageError
from hasten.train.optim.launch import Group, Kind, Numbers
from hasten.train.optim.machine import Elementwise, Options, check


class SGD(Elementwise):
    """Gradient descent; with `momentum`, Polyak's heavy ball, or Nesterov's form of it.

    g ← g + weight_decay·p;  v ← momentum·v + (1 − dampening)·g, at first v ← g;  p ← p − lr·v, with `nesterov` p − lr·(g + momentum·v).

    Args:
        params: parameters, named parameters or groups, as in torch.
        lr: ≥ 0.
        momentum: ≥ 0; without it nothing but the steps is counted.
        dampening: part of the gradient left out of the average.
        weight_decay: ≥ 0.
        nesterov: needs momentum > 0 and no dampening.
        options: see `Options`.

    Raises:
        UsageError: on a value outside its range.

    Sparse gradients are taken without momentum and weight_decay.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([2.0]))
    >>> optimizer = SGD([w], lr=0.25)
    >>> optimizer.step(lambda: (w ** 2).sum().backward())
    >>> w.item()
    1.0

    References:
        B. T. Polyak, "Some methods of speeding up the convergence of iteration methods", 1964.
        Y. Nesterov, "A method for solving the convex programming problem with convergence rate O(1/k²)", 1983.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov},
            options,
        )

    @override
    def check(self, group: Mapping[str, Any]) -> None:
        super().check(group)
        check("momentum value", group["momentum"], within=group["momentum"] >= 0, expected="a number of at least 0")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise UsageError("Nesterov momentum requires a momentum and zero dampening")

    @override
    def buffers(self, group: Group) -> dict[str, Kind]:
        return {"momentum_buffer": "signed"} if group["momentum"] != 0 else {}

    @override
    def takes_sparse(self, group: Group) -> bool:
        return bool(group["momentum"] == 0 and group["weight_decay"] == 0)

    @override
    def flags(self, group: Group) -> dict[str, bool]:
        return {**super().flags(group), "averages": group["momentum"] != 0, "nesterov": group["nesterov"]}

    @override
    def numbers(self, group: Group, counters: Numbers) -> Numbers:
        first = counters["step"] == 1
        return {
            "lr": float(group["lr"]),
            "momentum": group["momentum"],
            "dampening": 0.0 if first else group["dampening"],
            "weight_decay": float(group["weight_decay"]),
        }

    @staticmethod
    def rule(x: Any, h: Any) -> None:
        """One element."""
        g = x.g + h.weight_decay * x.p if h.decays else x.g
        if h.averages:
            x.momentum_buffer = h.momentum * x.momentum_buffer + (1 - h.dampening) * g
            g = g + h.momentum * x.momentum_buffer if h.nesterov else x.momentum_buffer
        x.p = x.p - h.lr * g


class Momentum(Elementwise):
    """Momentum as an average: v ← β·v + (1 − β)·g;  p ← p − lr·v.

    It equals the heavy ball with lr·(1 − β), and is not torch's `dampening=β`, whose first step is 1/(1 − β) times as long.

    Args:
        params: parameters, named parameters or groups, as in torch.
        lr: ≥ 0.
        beta: in [0, 1).
        weight_decay: added to the gradient as weight_decay·p; ≥ 0.
        options: see `Options`.

    Raises:
        UsageError: on a value outside its range.
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-2, beta: float = 0.9, weight_decay: float = 0, **options: Unpack[Options]
    ) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay}, options)

    @override
    def check(self, group: Mapping[str, Any]) -> None:
        super().check(group)
        check("beta value", group["beta"], within=0 <= group["beta"] < 1, expected="a number in [0, 1)")

    @override
    def buffers(self, group: Group) -> dict[str, Kind]:
        return {"exp_avg": "signed"}

    @override
    def numbers(self, group: Group, counters: Numbers) -> Numbers:
        return {"lr": float(group["lr"]), "beta": group["beta"], "weight_decay": group["weight_decay"]}

    @staticmethod
    def rule(x: Any, h: Any) -> None:
        """One element."""
        g = x.g + h.weight_decay * x.p if h.decays else x.g
        x.exp_avg = h.beta * x.exp_avg + (1 - h.beta) * g
        x.p = x.p - h.lr * x.exp_avg
