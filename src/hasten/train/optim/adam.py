"""Adam and its nearest kin, and Lion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

from torch import Tensor
from typing_extensions import override

from hasten.train.optim.expression import larger, sign, sqrt
from hasten.train.optim.launch import Group, Kind, Numbers
from hasten.train.optim.machine import Elementwise, Options, check


class Adam(Elementwise):
    """m ← β₁m + (1 − β₁)g;  v ← β₂v + (1 − β₂)g²;  p ← p − lr · m/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ)) + eps).

    Args:
        params: parameters, named parameters or groups, as in torch.
        lr: ≥ 0.
        betas: β₁ and β₂, in [0, 1).
        eps: ≥ 0.
        weight_decay: added to the gradient as weight_decay·p, or taken from p as lr·weight_decay·p where it is decoupled; ≥ 0.
        amsgrad: divides by the largest v so far.
        decoupled_weight_decay: makes it AdamW.
        options: see `Options`.

    Raises:
        UsageError: on a value outside its range.

    References:
        D. P. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", 2014, arXiv:1412.6980.
        S. J. Reddi, S. Kale, S. Kumar, "On the Convergence of Adam and Beyond", 2018, arXiv:1904.09237 (amsgrad).
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, {**defaults, "decoupled_weight_decay": decoupled_weight_decay}, options)

    @override
    def buffers(self, group: Group) -> dict[str, Kind]:
        more: dict[str, Kind] = {"max_exp_avg_sq": "square"} if group["amsgrad"] else {}
        return {"exp_avg": "signed", "exp_avg_sq": "square", **more}

    @override
    def flags(self, group: Group) -> dict[str, bool]:
        return {**super().flags(group), "decoupled": group["decoupled_weight_decay"], "amsgrad": group["amsgrad"]}

    @override
    def numbers(self, group: Group, counters: Numbers) -> Numbers:
        beta1, beta2 = (float(beta) for beta in group["betas"])
        step = counters["step"]
        return {
            "lr": float(group["lr"]),
            "beta1": beta1,
            "beta2": beta2,
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "correction1": 1 - beta1**step,
            "correction2": math.sqrt(1 - beta2**step),
        }

    @staticmethod
    def rule(x: Any, h: Any) -> None:
        """One element; √(v/c) is written √v · (1/√c), a division less."""
        g = x.g
        if h.decays and h.decoupled:
            x.p = x.p * (1 - h.lr * h.weight_decay)
        elif h.decays:
            g = g + h.weight_decay * x.p
        x.exp_avg = h.beta1 * x.exp_avg + (1 - h.beta1) * g
        square = x.exp_avg_sq = h.beta2 * x.exp_avg_sq + (1 - h.beta2) * g * g
        if h.amsgrad:
            square = x.max_exp_avg_sq = larger(x.max_exp_avg_sq, square)
        x.p = x.p - h.lr / h.correction1 * (x.exp_avg / (sqrt(square) * (1 / h.correction2) + h.eps))


class AdamW(Adam):
    """Adam with decoupled weight decay: p ← p − lr·weight_decay·p, and Adam's step without it in the gradient.

    Args as for `Adam`.

    References:
        I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", 2017, arXiv:1711.05101.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay=True, **options)


class NAdam(Elementwise):
    """Adam with Nesterov momentum: the step takes μₜ₊₁·m and (1 − μₜ)·g in place of m, μₜ = β₁·(1 − ½·0.96^(t·momentum_decay)).

    p ← p − lr · (μₜ₊₁·m/(1 − Πμ₁…μₜ₊₁) + (1 − μₜ)·g/(1 − Πμ₁…μₜ)) / (√(v/(1 − β₂ᵗ)) + eps).

    Args:
        momentum_decay: ≥ 0.
        params, lr, betas, eps, weight_decay, decoupled_weight_decay, options: as for `Adam`.

    Raises:
        UsageError: on a value outside its range.

    References:
        T. Dozat, "Incorporating Nesterov Momentum into Adam", ICLR workshop, 2016.
    """

    counters: ClassVar[Numbers] = {"step": 0.0, "mu_product": 1.0}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum_decay": momentum_decay}
        super().__init__(params, {**defaults, "decoupled_weight_decay": decoupled_weight_decay}, options)

    @override
    def check(self, group: Mapping[str, Any]) -> None:
        super().check(group)
        check("momentum_decay value", group["momentum_decay"], within=group["momentum_decay"] >= 0, expected="a number of at least 0")

    @override
    def buffers(self, group: Group) -> dict[str, Kind]:
        return {"exp_avg": "signed", "exp_avg_sq": "square"}

    @override
    def flags(self, group: Group) -> dict[str, bool]:
        return {**super().flags(group), "decoupled": group["decoupled_weight_decay"]}

    @override
    def advance(self, group: Group, counters: Numbers) -> Numbers:
        step = counters["step"] + 1
        return {"step": step, "mu_product": counters["mu_product"] * self._mu(group, step)}

    @override
    def numbers(self, group: Group, counters: Numbers) -> Numbers:
        step, product = counters["step"], counters["mu_product"]
        after = self._mu(group, step + 1)
        return {
            "lr": float(group["lr"]),
            "beta1": group["betas"][0],
            "beta2": group["betas"][1],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "of_gradient": (1 - self._mu(group, step)) / (1 - product),
            "of_average": after / (1 - product * after),
            "correction2": math.sqrt(1 - group["betas"][1] ** step),
        }

    @staticmethod
    def _mu(group: Group, step: float) -> float:
        return float(group["betas"][0] * (1 - 0.5 * 0.96 ** (step * group["momentum_decay"])))

    @staticmethod
    def rule(x: Any, h: Any) -> None:
        """One element."""
        g = x.g
        if h.decays and h.decoupled:
            x.p = x.p * (1 - h.lr * h.weight_decay)
        elif h.decays:
            g = g + h.weight_decay * x.p
        x.exp_avg = h.beta1 * x.exp_avg + (1 - h.beta1) * g
        x.exp_avg_sq = h.beta2 * x.exp_avg_sq + (1 - h.beta2) * g * g
        ahead = h.lr * h.of_gradient * g + h.lr * h.of_average * x.exp_avg
        x.p = x.p - ahead / (sqrt(x.exp_avg_sq) * (1 / h.correction2) + h.eps)


class Lion(Elementwise):
    """p ← p − lr·(sign(β₁m + (1 − β₁)g) + weight_decay·p);  m ← β₂m + (1 − β₂)g.

    Its steps have the length lr in every parameter: take a third to a tenth of Adam's lr, and as many times its weight_decay.

    Args:
        params: parameters, named parameters or groups, as in torch.
        lr: ≥ 0.
        betas: β₁ of the step and β₂ of the average, in [0, 1).
        weight_decay: ≥ 0.
        options: see `Options`.

    Raises:
        UsageError: on a value outside its range.

    References:
        X. Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, arXiv:2302.06675.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, options)

    @override
    def buffers(self, group: Group) -> dict[str, Kind]:
        return {"exp_avg": "signed"}

    @override
    def numbers(self, group: Group, counters: Numbers) -> Numbers:
        beta1, beta2 = group["betas"]
        return {"lr": float(group["lr"]), "beta1": beta1, "beta2": beta2, "weight_decay": group["weight_decay"]}

    @staticmethod
    def rule(x: Any, h: Any) -> None:
        """One element."""
        if h.decays:
            x.p = x.p * (1 - h.lr * h.weight_decay)
        x.p = x.p - h.lr * sign(h.beta1 * x.exp_avg + (1 - h.beta1) * x.g)
        x.exp_avg = h.beta2 * x.exp_avg + (1 - h.beta2) * x.g
