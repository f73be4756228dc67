"""Finding a learning rate: a range test that leaves no trace, and a short, honest search.

The search looks at a part of the training data that it keeps from the gradients; it never sees the validation or held-out data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from hasten.core.data import View
from hasten.core.errors import UsageError
from hasten.train.health import Health
from hasten.train.run import Diverged
from hasten.train.schedules import Moment
from hasten.train.stop import Stop

if TYPE_CHECKING:
    from hasten.train.loop import Fitted, Trainer

USUAL = {"adamw": 2e-3, "muon": 1e-2, "sgd": 0.1}  # where the search begins when the range test says nothing
_USUAL_ELSE = 1e-2
_SMOOTH = 0.9
_KEPT_BACK = 0.1  # of the training data, for judging
_FEWEST = 20  # examples that can be parted
_SHORTEST = 20  # steps of a first comparison
_MOST = 12  # rates in a comparison


@dataclass(frozen=True, kw_only=True)
class Rising:
    """low^(1 − t/(T−1)): from `low` to 1 in equal factors."""

    low: float

    def share(self, moment: Moment) -> float:
        """From `low` to 1."""
        return float(self.low ** (1 - moment.step / max(1, moment.steps - 1)))


@dataclass(frozen=True, kw_only=True)
class RangeTest:
    """What a range test saw.

    Args:
        rates: tried, rising.
        losses: at each, smoothed.
        suggested: a tenth of the rate at the least loss, or None where the loss did not clearly fall.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggested: float | None


def range_test(trainer: Trainer, module: nn.Module, view: View, *, low: float = 1e-6, high: float = 10.0, steps: int = 100) -> RangeTest:
    """Trains a copy while the learning rate rises from `low` to `high` in equal factors, until the loss is 4 times its least.

    The smoothed loss is L̄ₜ = (0.9·sum + 0.1·Lₜ)/(1 − 0.9ᵗ). The network, its statistics, the optimizer and the random state
    are after it what they were before: only copies change.

    Raises:
        UsageError: low or high are no rising positive numbers, or fewer than 10 steps are asked for.

    References:
        L. N. Smith, "Cyclical Learning Rates for Training Neural Networks", 2015, arXiv:1506.01186.
    """
    if not 0 < low < high < math.inf:
        raise UsageError(f"low and high must be rising positive numbers, got {low} and {high}")
    if steps < 10:
        raise UsageError(f"steps must be at least 10, got {steps}")
    rates: list[float] = []
    losses: list[float] = []
    total = 0.0

    def watch(record: Any) -> None:
        nonlocal total
        total = _SMOOTH * total + (1 - _SMOOTH) * record.loss
        rates.append(record.rate)
        losses.append(total / (1 - _SMOOTH**record.step))

    def wild(student: nn.Module, step: int, planned: int) -> bool:
        del student, step, planned
        return len(losses) > 1 and losses[-1] > 4 * min(losses)

    settings = replace(trainer.settings, **_short(steps), learning_rate=high, schedule=Rising(low=low / high), warm_up=0.0)
    try:
        replace(trainer, settings=settings, validation=None, checkpoints=None, watch=watch, after_step=wild).fit(module, view)
    except Diverged:
        if not losses:
            raise
    return RangeTest(rates=tuple(rates), losses=tuple(losses), suggested=_below_the_least(rates, losses))


def choose(trainer: Trainer, module: nn.Module, view: View | Iterable[Any]) -> Fitted:
    """Finds the learning rate, then trains with it on all of `view`.

    A range test and the optimizer's usual rate give the middles; around each, factors of 3 to both sides are tried by
    successive halving: every candidate trains to the end of a schedule of its own, a sixteenth of the steps at first, on
    nine tenths of the training data; the better half by the loss on the last tenth goes on with four times the steps.
    Where the best lies at the end of what was tried, factors of 3 go on from there.

    Raises:
        UsageError: the data is a stream, has fewer than 20 examples, or torch's scheduler holds the rate.

    References:
        K. Jamieson, A. Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", 2015, arXiv:1502.07943.
    """
    if not isinstance(view, View):
        raise UsageError("learning_rate='auto' parts the data to judge by, this is a stream; give a View or a number")
    if len(view) < _FEWEST:
        raise UsageError(f"learning_rate='auto' needs at least {_FEWEST} examples to judge by, got {len(view)}; give a number")
    order = torch.randperm(len(view), generator=torch.Generator().manual_seed(trainer.settings.seed)).numpy()
    cut = max(2, round(_KEPT_BACK * len(view)))
    judge, part = view.take(np.sort(order[:cut])), view.take(np.sort(order[cut:]))
    usual = USUAL.get(trainer.settings.optimizer, _USUAL_ELSE) if isinstance(trainer.settings.optimizer, str) else _USUAL_ELSE
    suggested = range_test(trainer, module, part).suggested
    middles = [usual] if suggested is None else [usual, suggested]
    candidates = sorted({float(f"{middle * factor:.2g}") for middle in middles for factor in (1 / 3, 1, 3)})
    planned = trainer.settings.steps(len(view))
    steps, told = min(planned, max(_SHORTEST, planned // 16)), []
    while len(candidates) > 1:
        losses = {rate: _judged(trainer, module, part, judge, rate=rate, steps=steps) for rate in candidates}
        while (beyond := _beyond(losses)) is not None:
            losses[beyond] = _judged(trainer, module, part, judge, rate=beyond, steps=steps)
        told.append(f"{steps} steps: " + ", ".join(f"{rate:g} → {losses[rate]:.4g}" for rate in sorted(losses)))
        ranked = sorted(losses, key=losses.__getitem__)
        candidates = sorted(ranked[: 1 if steps >= planned else max(1, len(candidates) // 2)])
        steps = min(planned, 4 * steps)
    settings = replace(trainer.settings, learning_rate=candidates[0])
    fitted = replace(trainer, settings=settings).fit(module, view)
    note = f"the learning rate {candidates[0]:g} was chosen on a tenth of the training data; loss there after {'; '.join(told)}"
    return replace(fitted, notes=(note, *fitted.notes))


def _beyond(losses: dict[float, float]) -> float | None:
    """The rate to try next, a factor of 3 beyond the best where that is the first or the last of them; at most `_MOST` in all."""
    best, rates = min(losses, key=losses.__getitem__), sorted(losses)
    if not math.isfinite(losses[best]) or len(rates) >= _MOST:
        return None
    following = {rates[0]: best / 3, rates[-1]: best * 3}.get(best)
    return None if following is None else float(f"{following:.2g}")


def _judged(trainer: Trainer, module: nn.Module, part: View, judge: View, *, rate: float, steps: int) -> float:
    """The loss on `judge` at the end of a whole short schedule; infinite where it diverges."""
    settings = replace(trainer.settings, **_short(steps), learning_rate=rate)
    try:
        judged = replace(trainer, settings=settings, validation=judge, checkpoints=None, watch=_unheard, after_step=_on)
        looks = judged.fit(module, part).looks
    except Diverged:
        return math.inf
    return looks[-1] if math.isfinite(looks[-1]) else math.inf


def _on(student: nn.Module, step: int, planned: int) -> bool:
    del student, step, planned
    return False


def _unheard(record: object) -> None:
    del record


def _short(steps: int) -> dict[str, Any]:
    """So many steps, no other end, one look at it; what diverges says so."""
    return {"stop": Stop(steps=steps, every=1e9), "health": Health()}


def _below_the_least(rates: list[float], losses: list[float]) -> float | None:
    """A tenth of the rate at the least loss, where that is clearly below what the loss was in the first tenth."""
    begun = losses[: max(3, len(losses) // 10)]
    least = min(losses, default=math.inf)
    if len(begun) < 2:
        return None
    if least >= fmean(begun) - 2 * stdev(begun):
        return None
    return rates[losses.index(least)] / 10
