"""Steps divided by the size of the gradients so far, for each parameter by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor
from typing_extensions import override

from hasten.core.errors import UsageError
from hasten.train.optim.expression import sqrt
from hasten.train.optim.launch import Group, Kind, Numbers
from hasten.train.optim.machine import Elementwise, Options, check


class Adagrad(Elementwise):
    """G ← G + g²;  p ← p − lr/(1 + (t − 1)·lr_decay) · g/(√G + eps).

    Args:
        params: parameters, named parameters or groups, as in torch.
        lr: ≥ 0.
        lr_decay: ≥ 0.
        weight_decay: added to the gradient as weight_decay·p; ≥ 0.
        initial_accumulator_value: of G; ≥ 0.
        eps: ≥ 0.
        options: see `Options`.

    Raises:
        UsageError: on a value outside its range.

    Sparse gradients are taken without weight_decay: only the rows that they name are touched.

    References:
        J. Duchi, E. Hazan, Y. Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", 2011.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "lr_decay": lr_decay, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "initial_accumulator_value": initial_accumulator_value}, options)

    @override
    def check(self, group: Mapping[str, Any]) -> None:
        super().check(group)
        for name in ("lr_decay", "initial_accumulator_value"):
            check(f"{name} value", group[name], within=group[name] >= 0, expected="a number of at least 0")
        if group["initial_accumulator_value"] and group["state_dtype"] == torch.int8:
            raise UsageError("initial_accumulator_value must be 0 with state_dtype=torch.int8")

    @override
    def buffers(self, group: Group) -> dict[str, Kind]:
        return {"sum": "square"}

    @override
    def takes_sparse(self, group: Group) -> bool:
        return bool(group["weight_decay"] == 0)

    @override
    def begin(self, group: Group, name: str, p: Tensor) -> Tensor:
        start = group["initial_accumulator_value"]
        return super().begin(group, name, p).add_(complex(start, start) if p.is_complex() else start)

    @override
    def numbers(self, group: Group, counters: Numbers) -> Numbers:
        rate = float(group["lr"]) / (1 + (counters["step"] - 1) * group["lr_decay"])
        return {"rate": rate, "eps": group["eps"], "weight_decay": group["weight_decay"]}

    @staticmethod
    def rule(x: Any, h: Any) -> None:
        """One element."""
        g = x.g + h.weight_decay * x.p if h.decays else x.g
        x.sum = x.sum + g * g
        x.p = x.p - h.rate * (g / (sqrt(x.sum) + h.eps))


class RMSprop(Elementwise):
    """s ← α·s + (1 − α)·g²;  p ← p − lr·g/(√s + eps).

    `centered`: s is replaced under the root by s − a², a ← α·a + (1 − α)·g, the variance. `momentum`: b ← momentum·b + g/(√s + eps);
    p ← p − lr·b.

    Args:
        params: parameters, named parameters or groups, as in torch.
        lr: ≥ 0.
        alpha: ≥ 0.
        eps: ≥ 0.
        weight_decay: added to the gradient as weight_decay·p; ≥ 0.
        momentum: ≥ 0.
        centered: whether the mean is taken out.
        options: see `Options`.

    Raises:
        UsageError: on a value outside its range.

    References:
        T. Tieleman, G. Hinton, "Lecture 6.5: RMSProp", COURSERA: Neural Networks for Machine Learning, 2012.
        A. Graves, "Generating Sequences With Recurrent Neural Networks", 2013, arXiv:1308.0850 (centered).
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "momentum": momentum, "centered": centered}, options)

    @override
    def check(self, group: Mapping[str, Any]) -> None:
        super().check(group)
        check("momentum value", group["momentum"], within=group["momentum"] >= 0, expected="a number of at least 0")
        check("alpha value", group["alpha"], within=group["alpha"] >= 0, expected="a number of at least 0")
        if group["centered"] and group["state_dtype"] not in (None, torch.float32):
            raise UsageError("centered needs the difference of two averages, which small numbers do not hold; state_dtype must be None")

    @override
    def buffers(self, group: Group) -> dict[str, Kind]:
        more: dict[str, Kind] = {"momentum_buffer": "signed"} if group["momentum"] > 0 else {}
        return {"square_avg": "square", **more, **({"grad_avg": "signed"} if group["centered"] else {})}

    @override
    def flags(self, group: Group) -> dict[str, bool]:
        return {**super().flags(group), "averages": group["momentum"] > 0, "centered": group["centered"]}

    @override
    def numbers(self, group: Group, counters: Numbers) -> Numbers:
        return {"lr": float(group["lr"])} | {name: group[name] for name in ("alpha", "eps", "weight_decay", "momentum")}

    @staticmethod
    def rule(x: Any, h: Any) -> None:
        """One element."""
        g = x.g + h.weight_decay * x.p if h.decays else x.g
        square = x.square_avg = h.alpha * x.square_avg + (1 - h.alpha) * g * g
        if h.centered:
            x.grad_avg = h.alpha * x.grad_avg + (1 - h.alpha) * g
            square = square - x.grad_avg * x.grad_avg
        step = g / (sqrt(square) + h.eps)
        if h.averages:
            step = x.momentum_buffer = h.momentum * x.momentum_buffer + step
        x.p = x.p - h.lr * step
