"""Averages of the weights over a training: often better than the last weights, at no cost when the network runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from hasten.core.errors import UsageError
from hasten.train.outputs import Tensors, outputs_of

Kind = Literal["ema", "swa"]


@dataclass(frozen=True, kw_only=True)
class Average:
    """What the trained network's weights are, in the place of the last ones.

    Args:
        kind: "ema": a ← decay·a + (1 − decay)·w after every step; "swa": the plain mean of the weights at the end of each pass.
        decay: of "ema", in (0, 1).
        start: share of the steps after which averaging begins, in [0, 1).
        recalibrate: batches, at most, that batch norms take their statistics from anew, at the end and for each look at
            validation data, >= 0; 0 for none.

    Raises:
        UsageError: on a value outside its range.

    References:
        B. Polyak, A. Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992.
        P. Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018, arXiv:1803.05407.
    """

    kind: Kind = "ema"
    decay: float = 0.999
    start: float = 0.0
    recalibrate: int = 100

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UsageError(f"kind must be one of {list(get_args(Kind))}, got {self.kind!r}")
        if not 0 < self.decay < 1:
            raise UsageError(f"decay must be between 0 and 1, got {self.decay}")
        if not 0 <= self.start < 1:
            raise UsageError(f"start must be in [0, 1), got {self.start}")
        if self.recalibrate < 0:
            raise UsageError(f"recalibrate must be at least 0, got {self.recalibrate}")


class Averaged:
    """The running average of a network's weights. Buffers are not averaged; `recalibrate` finds them anew."""

    def __init__(self, settings: Average, module: nn.Module) -> None:
        self._settings, self._module = settings, module
        self._weights: list[torch.Tensor] = []
        self._count = 0

    @property
    def ready(self) -> bool:
        """Whether there is anything to average."""
        return self._count > 0

    @torch.no_grad()
    def look(self, share: float, *, pass_ended: bool) -> None:
        """Takes the weights in, `share` of the steps being done."""
        if share <= self._settings.start or (self._settings.kind == "swa" and not pass_ended):
            return
        now = [p.detach() for p in self._module.parameters()]
        if not self._count:
            self._weights = [w.clone() for w in now]
        else:
            part = 1 / (self._count + 1) if self._settings.kind == "swa" else 1 - self._settings.decay
            torch._foreach_lerp_(self._weights, now, part)
        self._count += 1

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the network's weights with the average; a second call undoes it."""
        for parameter, mine in zip(self._module.parameters(), self._weights, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(mine)
            mine.copy_(kept)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"weights": self._weights, "count": self._count}

    def load(self, state: dict[str, Any]) -> None:
        """Takes up what `state` gave."""
        device = next(self._module.parameters()).device
        self._weights = [mine.to(device) for mine in state["weights"]]
        self._count = state["count"]


class Swapped:
    """Weights as they are handed over: the average in the place of the last, an optimizer that averages in its eval form."""

    def __init__(self, optimizer: torch.optim.Optimizer, average: Averaged | None) -> None:
        self._optimizer, self._average = optimizer, average
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._switches = [getattr(optimizer, name, None) for name in ("eval", "train")]  # as Schedule-Free has them
        self.changes = average is not None or self._switches[0] is not None

    def put(self) -> None:
        """Puts them in place."""
        if self._switches[0]:
            self._switches[0]()
        if self._average:
            self._average.swap()

    def __enter__(self) -> None:
        held = [p for group in self._optimizer.param_groups for p in group["params"]] if self._switches[1] else []
        self._before = [(p, p.detach().clone()) for p in held]
        self.put()

    @torch.no_grad()
    def __exit__(self, *why: object) -> None:
        if self._average:
            self._average.swap()
        if self._switches[1]:
            self._switches[1]()
        for p, kept in self._before:  # there and back again would round
            p.copy_(kept)


def moving_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms whose statistics follow the batches: none in eval mode, none that keeps no statistics."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [m for m in norms if m.training and m.track_running_stats]


@torch.no_grad()
def recalibrate(module: nn.Module, batches: Iterable[Tensors]) -> None:
    """Takes the statistics of all batch norms that move anew as plain means over the batches."""
    norms = moving_norms(module)
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    try:
        for batch in batches:
            outputs_of(module, batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
