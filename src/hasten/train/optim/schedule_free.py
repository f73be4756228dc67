"""Schedule-Free: no schedule of the learning rate, because what is evaluated is an average of the path."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor
from typing_extensions import override

from hasten.core.errors import UsageError
from hasten.train.optim.expression import sqrt
from hasten.train.optim.launch import Group, Kind, Numbers
from hasten.train.optim.machine import Elementwise, Options, check


class _ScheduleFree(Elementwise):
    """What both have in common: the average x of the points z, and the point y between them where gradients are taken.

    In training mode the parameters are y = (1 − β)·z + β·x; `eval()` makes them x, `train()` makes them y again.
    """

    counters: ClassVar[Numbers] = {}
    _start: ClassVar[Group] = {"k": 0, "train_mode": True, "weight_sum": 0.0, "lr_max": -1.0, "scheduled_lr": 0.0}

    @override
    def check(self, group: Mapping[str, Any]) -> None:
        super().check(group)
        check("warmup_steps value", group["warmup_steps"], within=group["warmup_steps"] >= 0, expected="a number of at least 0")

    def train(self) -> None:
        """Makes the parameters the points where gradients are taken. Nothing happens if they are."""
        self._switch(training=True)

    def eval(self) -> None:
        """Makes the parameters the average, to be evaluated and saved. Batch norms then need new statistics."""
        self._switch(training=False)

    def step(self, closure: Any = None) -> Any:
        """One step, in training mode only."""
        if not all(group["train_mode"] for group in self.param_groups):
            raise UsageError("a step needs the optimizer in training mode, it is in evaluation mode; call optimizer.train()")
        return super().step(closure)

    @torch.no_grad()
    def _switch(self, *, training: bool) -> None:
        for group in self.param_groups:
            beta = self._beta(group)
            weight = 1 - beta if training else 1 - 1 / beta
            moved = [p for p in group["params"] if group["train_mode"] != training and "z" in self.state[p]]
            for p in moved:
                p.lerp_(self.state[p]["z"], weight)
            group["train_mode"] = training

    def _beta(self, group: Group) -> float:
        raise NotImplementedError

    @override
    def begin(self, group: Group, name: str, p: Tensor) -> Tensor:
        return p.detach().clone(memory_format=torch.preserve_format) if name == "z" else super().begin(group, name, p)

    @override
    def update(self, group: Group) -> None:
        k = group["k"]
        lr = group["scheduled_lr"] = float(group["lr"]) * (min(1.0, (k + 1) / group["warmup_steps"]) if group["warmup_steps"] else 1.0)
        group["lr_max"] = max(lr, group["lr_max"])
        weight = (k + 1) ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
        group["weight_sum"] += weight
        group["share"] = weight / group["weight_sum"] if group["weight_sum"] else 0.0
        super().update(group)
        group["k"] = k + 1

    @override
    def numbers(self, group: Group, counters: Numbers) -> Numbers:
        beta = self._beta(group)
        lr, share = group["scheduled_lr"], group["share"]
        return {"lr": lr, "share": share, "of_y": lr * (1 - beta * (1 - share)), "weight_decay": group["weight_decay"]}


class ScheduleFreeSGD(_ScheduleFree):
    """z ← z − lr·(g + weight_decay·y);  x ← (1 − c)·x + c·z;  y = (1 − β)·z + β·x, c = w/Σw with w = t^r·lr^weight_lr_power.

    Args:
        params: parameters, named parameters or groups, as in torch.
        lr: ≥ 0; larger than with a schedule, often by 10 or more.
        momentum: β, in (0, 1).
        weight_decay: at y; ≥ 0.
        warmup_steps: over which lr rises linearly.
        r: power of t in the weight of the average.
        weight_lr_power: power of lr in it.
        options: see `Options`; z is never stored small.

    Raises:
        UsageError: on a value outside its range; on a step in evaluation mode.

    References:
        A. Defazio et al., "The Road Less Scheduled", 2024, arXiv:2405.15682.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "warmup_steps": warmup_steps, "r": r}
        super().__init__(params, {**defaults, "weight_lr_power": weight_lr_power, **self._start}, options)

    @override
    def check(self, group: Mapping[str, Any]) -> None:
        super().check(group)
        check("momentum value", group["momentum"], within=0 < group["momentum"] < 1, expected="a number in (0, 1)")

    @override
    def buffers(self, group: Group) -> dict[str, Kind]:
        return {"z": "weight"}

    @override
    def _beta(self, group: Group) -> float:
        return float(group["momentum"])

    @staticmethod
    def rule(x: Any, h: Any) -> None:
        """One element; x.p is y."""
        g = x.g + h.weight_decay * x.p if h.decays else x.g
        x.p = x.p + h.share * (x.z - x.p) - h.of_y * g
        x.z = x.z - h.lr * g


class ScheduleFreeAdamW(_ScheduleFree):
    """Schedule-Free with Adam's denominator: g is replaced by g/(√(v/(1 − β₂ᵗ)) + eps) in the formula of `ScheduleFreeSGD`.

    Args:
        lr: ≥ 0; one to ten times AdamW's.
        betas: β between z and x, in (0, 1); β₂ in [0, 1).
        eps: ≥ 0.
        params, weight_decay, warmup_steps, r, weight_lr_power, options: as for `ScheduleFreeSGD`.

    Raises:
        UsageError: on a value outside its range; on a step in evaluation mode.

    References:
        A. Defazio et al., "The Road Less Scheduled", 2024, arXiv:2405.15682.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "warmup_steps": warmup_steps, "r": r}
        super().__init__(params, {**defaults, "weight_lr_power": weight_lr_power, **self._start}, options)

    @override
    def check(self, group: Mapping[str, Any]) -> None:
        super().check(group)
        check("beta parameter at index 0", group["betas"][0], within=group["betas"][0] > 0, expected="a number in (0, 1)")

    @override
    def buffers(self, group: Group) -> dict[str, Kind]:
        return {"z": "weight", "exp_avg_sq": "square"}

    @override
    def _beta(self, group: Group) -> float:
        return float(group["betas"][0])

    @override
    def numbers(self, group: Group, counters: Numbers) -> Numbers:
        beta2 = group["betas"][1]
        more = {"beta2": beta2, "correction2": math.sqrt(1 - beta2 ** (group["k"] + 1)), "eps": group["eps"]}
        return {**super().numbers(group, counters), **more}

    @staticmethod
    def rule(x: Any, h: Any) -> None:
        """One element; x.p is y."""
        x.exp_avg_sq = h.beta2 * x.exp_avg_sq + (1 - h.beta2) * x.g * x.g
        g = x.g / (sqrt(x.exp_avg_sq) * (1 / h.correction2) + h.eps)
        if h.decays:
            g = g + h.weight_decay * x.p
        x.p = x.p + h.share * (x.z - x.p) - h.of_y * g
        x.z = x.z - h.lr * g
