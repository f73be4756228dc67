"""The learning rate over a training: what share of its highest value each step takes.

A schedule is a frozen value with `share(moment)`; t counts the steps since the warm-up from 0, T is how many are planned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hasten.core.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where a training stands.

    Args:
        step: t, steps done since the warm-up, from 0.
        steps: T, planned since the warm-up.
        epoch: passes over the data that are finished.
        looks: validation losses so far.
    """

    step: int
    steps: int
    epoch: int = 0
    looks: tuple[float, ...] = ()


class Schedule(Protocol):
    """The share of the highest learning rate that the next step takes."""

    def share(self, moment: Moment) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Constant:
    """1 throughout."""

    def share(self, moment: Moment) -> float:
        """1."""
        del moment
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Linear:
    """1 − t/T: linear to zero.

    >>> [Linear().share(Moment(step=t, steps=4)) for t in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """

    def share(self, moment: Moment) -> float:
        """1 − t/T."""
        return (moment.steps - moment.step) / moment.steps


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """(1 + cos(π t/T))/2. Loshchilov, Hutter: SGDR, 2016, arXiv:1608.03983."""

    def share(self, moment: Moment) -> float:
        """(1 + cos(π t/T))/2, in the form that loses no digits at the end."""
        return 0.5 - 0.5 * math.cos(math.pi * ((moment.steps - moment.step) / moment.steps))


@dataclass(frozen=True, kw_only=True)
class Exponential:
    """factor^(finished passes).

    Args:
        factor: in (0, 1].

    Raises:
        UsageError: on a value outside its range.
    """

    factor: float = 0.99

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1:
            raise UsageError(f"factor must be in (0, 1], got {self.factor}")

    def share(self, moment: Moment) -> float:
        """factor^epoch."""
        return float(self.factor**moment.epoch)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """factor^(number of the places in `at` that are passed).

    Args:
        factor: in (0, 1].
        at: shares of the training, rising, each in (0, 1).

    Raises:
        UsageError: on a value outside its range.

    >>> [Steps(at=(0.5, 0.75)).share(Moment(step=t, steps=4)) for t in range(4)]
    [1.0, 1.0, 0.1, 0.01...]
    """

    factor: float = 0.1
    at: tuple[float, ...] = (0.5, 0.75)

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1:
            raise UsageError(f"factor must be in (0, 1], got {self.factor}")
        if list(self.at) != sorted(set(self.at)) or not all(0 < place < 1 for place in self.at):
            raise UsageError(f"at must be rising shares of the training between 0 and 1, got {self.at}")

    def share(self, moment: Moment) -> float:
        """factor^passed."""
        return float(self.factor ** sum(moment.step >= place * moment.steps for place in self.at))


@dataclass(frozen=True, kw_only=True)
class OneCycle:
    """Half a cosine from 1/start up to 1 over the first `rise` of the steps, half a cosine down to 1/(start·end) after.

    It is its own warm-up: `Fit.warm_up` is not put in front.

    Args:
        rise: share of the steps, in (0, 1).
        start: the highest rate over the first, >= 1.
        end: the first rate over the last, >= 1.

    Raises:
        UsageError: on a value outside its range.

    References:
        L. N. Smith, N. Topin, "Super-Convergence", 2018, arXiv:1708.07120.
    """

    rise: float = 0.3
    start: float = 25.0
    end: float = 1e4

    def __post_init__(self) -> None:
        if not 0 < self.rise < 1:
            raise UsageError(f"rise must be between 0 and 1, got {self.rise}")
        for name in ("start", "end"):
            if not 1 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} must be a finite number of at least 1, got {getattr(self, name)}")

    def share(self, moment: Moment) -> float:
        """Rises, then falls; the peak lies on step rise·T − 1."""
        peak = max(1.0, self.rise * moment.steps - 1)
        low, least = 1 / self.start, 1 / (self.start * self.end)
        if moment.step <= peak:
            return low + (1 - low) * (0.5 - 0.5 * math.cos(math.pi * moment.step / peak))
        along = (moment.step - peak) / max(1.0, moment.steps - 1 - peak)
        return least + (1 - least) * (0.5 + 0.5 * math.cos(math.pi * along))


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """×factor whenever `patience` looks at the validation data in a row were no better than the best before; needs such data.

    Args:
        factor: in (0, 1).
        patience: looks, >= 1.
        least: share that is never undercut, in [0, 1).

    Raises:
        UsageError: on a value outside its range.

    >>> [Plateau(factor=0.5, patience=2).share(Moment(step=0, steps=9, looks=(3, 2, 2, 2, 1)[:n])) for n in range(6)]
    [1.0, 1.0, 1.0, 1.0, 0.5, 0.5]
    """

    factor: float = 0.1
    patience: int = 5
    least: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.factor < 1:
            raise UsageError(f"factor must be between 0 and 1, got {self.factor}")
        if self.patience < 1:
            raise UsageError(f"patience must be at least 1, got {self.patience}")
        if not 0 <= self.least < 1:
            raise UsageError(f"least must be in [0, 1), got {self.least}")

    def share(self, moment: Moment) -> float:
        """A function of the losses alone, so that nothing has to be remembered when a training is taken up again."""
        best, waited, share = math.inf, 0, 1.0
        for loss in moment.looks:
            waited = 0 if loss < best else waited + 1
            best = min(best, loss)
            if waited == self.patience:
                share, waited = max(self.least, share * self.factor), 0
        return share


@dataclass(frozen=True)
class OfTorch:
    """Any scheduler of torch: `OfTorch(lambda optimizer: torch.optim.lr_scheduler.CyclicLR(optimizer, 1e-4, 1e-2))`.

    It is stepped after every optimizer step, `ReduceLROnPlateau` after every look at the validation data. No warm-up of ours.
    """

    factory: Callable[[torch.optim.Optimizer], Any]


def slow_down(scheduler: Any, optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Multiplies every rate that a scheduler of torch's goes between, and those of the schedulers in it."""
    for group in optimizer.param_groups:
        for name in {"lr", "initial_lr", "max_lr", "min_lr"} & group.keys():
            group[name] *= factor
    _slow_down(scheduler, factor)


def _slow_down(scheduler: Any, factor: float) -> None:
    for name in {"base_lrs", "max_lrs"} & vars(scheduler).keys():
        setattr(scheduler, name, [rate * factor for rate in getattr(scheduler, name)])
    for inside in vars(scheduler).get("_schedulers", ()):
        _slow_down(inside, factor)


NAMED: dict[str, Schedule] = {
    "constant": Constant(),
    "cosine": Cosine(),
    "exponential": Exponential(),
    "linear": Linear(),
    "one-cycle": OneCycle(),
    "plateau": Plateau(),
    "steps": Steps(),
}
