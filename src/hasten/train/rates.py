"""Finding a learning rate: a range test that leaves no trace, and a short, honest search.

The search looks at a part of the training data that it keeps from the gradients; it never sees the validation or held-out data.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from hasten.core import folder as disk
from hasten.core.data import View
from hasten.core.errors import StorageError, UsageError
from hasten.train.checkpoint import identity
from hasten.train.health import Health
from hasten.train.records import Record, Watcher, silent, together
from hasten.train.run import Diverged
from hasten.train.schedules import Moment
from hasten.train.stop import Stop

if TYPE_CHECKING:
    from hasten.train.loop import Fitted, Trainer

USUAL = {"adam": 2e-3, "adamw": 2e-3, "lion": 3e-4, "muon": 1e-2, "nadam": 2e-3, "prodigy": 1.0, "rmsprop": 1e-3, "sam": 2e-3}
USUAL |= {"schedule_free": 1e-2, "schedule_free_sgd": 1.0, "sgd": 0.1, "soap": 3e-3}  # where the search begins without a range test
_USUAL_ELSE = 1e-2
_SMOOTH = 0.9
_KEPT_BACK = 0.1  # of the training data, for judging
_FEWEST = 20  # examples that can be parted
_SHORTEST = 20  # steps of a first comparison
_MOST = 12  # rates in a comparison
_LOW, _HIGH, _RANGE_STEPS = 1e-6, 10.0, 100  # of a range test
_LEAST_SECONDS = 1e-3  # for a training behind a search that took them all
_FOUND = "learning_rate.json"


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


def range_test(
    trainer: Trainer, module: nn.Module, view: View, *, low: float = _LOW, high: float = _HIGH, steps: int = _RANGE_STEPS
) -> RangeTest:
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
    settings = replace(trainer.settings, **_short(steps), learning_rate=high, schedule=Rising(low=low / high), warm_up=0.0)
    return _risen(replace(trainer, settings=settings, watch=silent), module, view)


def _risen(trainer: Trainer, module: nn.Module, view: View) -> RangeTest:
    """The test with settings that are made for it; the trainer's watcher is told of its steps."""
    rates: list[float] = []
    losses: list[float] = []
    total = 0.0

    def watch(record: Record) -> None:
        nonlocal total
        total = _SMOOTH * total + (1 - _SMOOTH) * record.loss
        rates.append(record.rate)
        losses.append(total / (1 - _SMOOTH**record.step))

    def wild(student: nn.Module, step: int, planned: int) -> bool:
        del student, step, planned
        return len(losses) > 1 and losses[-1] > 4 * min(losses)

    try:
        replace(trainer, validation=None, checkpoints=None, watch=together(watch, trainer.watch), after_step=wild).fit(module, view)
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

    The watcher is told of every step of a trial, with `Record.trial` saying which. Where `stop.seconds` is set, the search takes
    at most half of them and the training the rest; what no comparison was finished for has the usual rate. With checkpoints,
    what was found lies beside them in `learning_rate.json`: a search that was broken off goes on, one that is finished is read.

    Raises:
        UsageError: the data is a stream or has fewer than 20 examples; the checkpoints are of another training.

    References:
        K. Jamieson, A. Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", 2015, arXiv:1502.07943.
    """
    if not isinstance(view, View):
        raise UsageError("learning_rate='auto' parts the data to judge by, this is a stream; give a View or a number")
    if len(view) < _FEWEST:
        raise UsageError(f"learning_rate='auto' needs at least {_FEWEST} examples to judge by, got {len(view)}; give a number")
    with contextlib.ExitStack() as stack:
        if trainer.checkpoints is not None:
            stack.callback(trainer.checkpoints.lock().release)
        rate, note, took = _Search(trainer, module, view).found()
    stop = trainer.settings.stop
    if stop.seconds is not None:
        stop = replace(stop, seconds=max(_LEAST_SECONDS, stop.seconds - took))
    fitted = replace(trainer, settings=replace(trainer.settings, learning_rate=rate, stop=stop)).fit(module, view)
    return replace(fitted, notes=(note, *fitted.notes), seconds=fitted.seconds + took)


class _Over(Exception):
    """The time that the search may take is over."""


class _Search:
    """Looks for the learning rate; what it has found so far lies beside the checkpoints, where there are any."""

    def __init__(self, trainer: Trainer, module: nn.Module, view: View) -> None:
        self._trainer, self._module, self._steps = trainer, module, trainer.settings.steps(len(view))
        order = torch.randperm(len(view), generator=torch.Generator().manual_seed(trainer.settings.seed)).numpy()
        cut = max(2, round(_KEPT_BACK * len(view)))
        self._judge, self._part = view.take(np.sort(order[:cut])), view.take(np.sort(order[cut:]))
        self._path = None if trainer.checkpoints is None else Path(trainer.checkpoints.folder) / _FOUND
        self._known = _known(self._path, identity(trainer.settings, module, view))
        self._before, self._since = float(self._known["seconds"]), time.monotonic()
        self._most = math.inf if trainer.settings.stop.seconds is None else trainer.settings.stop.seconds / 2

    def found(self) -> tuple[float, str, float]:
        """The rate, a sentence on how it was found, and the seconds that it took."""
        if "chosen" not in self._known:
            self._keep(chosen=self._chosen())
        rate, note = self._known["chosen"]
        return rate, note, self._known["seconds"]

    @property
    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._since

    def _keep(self, **facts: Any) -> None:
        self._known |= {**facts, "seconds": self._seconds}
        if self._path is not None:
            disk.write(self._path, json.dumps(self._known, indent=1) + "\n")

    def _chosen(self) -> tuple[float, str]:
        name = self._trainer.settings.optimizer
        best = usual = USUAL.get(name, _USUAL_ELSE) if isinstance(name, str) else _USUAL_ELSE
        told: list[str] = []
        try:
            for rate, words in self._rounds(usual):
                best = rate
                told.append(words)
        except _Over:
            ended = f"the search ended with half of the {2 * self._most:g} seconds"
            if not told:
                return usual, f"the learning rate {usual:g} is the usual one: {ended} before anything could be compared"
            told.append(ended)
        return best, f"the learning rate {best:g} was chosen on a tenth of the training data; loss there after {'; '.join(told)}"

    def _rounds(self, usual: float) -> Iterator[tuple[float, str]]:
        """The best of each comparison, and what was seen."""
        suggested = self._suggested()
        middles = [usual] if suggested is None else [usual, suggested]
        candidates = sorted({float(f"{middle * factor:.2g}") for middle in middles for factor in (1 / 3, 1, 3)})
        steps = min(self._steps, max(_SHORTEST, self._steps // 16))
        while len(candidates) > 1:
            losses = {rate: self._judged(rate, steps) for rate in candidates}
            while (beyond := _beyond(losses)) is not None:
                losses[beyond] = self._judged(beyond, steps)
            ranked = sorted(losses, key=losses.__getitem__)
            yield ranked[0], f"{steps} steps: " + ", ".join(f"{rate:g} → {losses[rate]:.4g}" for rate in sorted(losses))
            candidates = sorted(ranked[: 1 if steps >= self._steps else max(1, len(candidates) // 2)])
            steps = min(self._steps, 4 * steps)

    def _suggested(self) -> float | None:
        if "suggested" not in self._known:
            rising = {"learning_rate": _HIGH, "schedule": Rising(low=_LOW / _HIGH), "warm_up": 0.0}
            seen = _risen(self._tried("a range test", _RANGE_STEPS, rising), self._module, self._part)
            self._keep_if_whole(suggested=seen.suggested)
        value: float | None = self._known["suggested"]
        return value

    def _judged(self, rate: float, steps: int) -> float:
        """The loss on the part kept back at the end of a whole short schedule; infinite where it diverges."""
        trial, known = f"{steps} steps with {rate:g}", self._known["losses"]
        if trial not in known:
            tried = replace(self._tried(trial, steps, {"learning_rate": rate}), validation=self._judge)
            try:
                loss = tried.fit(self._module, self._part).looks[-1]
            except Diverged:
                loss = math.nan
            self._keep_if_whole(losses={**known, trial: loss if math.isfinite(loss) else None})
        found = self._known["losses"][trial]
        return math.inf if found is None else found

    def _tried(self, trial: str, steps: int, facts: dict[str, Any]) -> Trainer:
        """The trainer of a trial, for no longer than is left."""
        left = self._most - self._seconds
        if left <= 0:
            raise _Over
        settings = replace(self._trainer.settings, **_short(steps, left if math.isfinite(left) else None), **facts)
        tell = self._trainer.watch
        heard: Watcher = lambda record: tell(replace(record, trial=trial, seconds=self._seconds))  # noqa: E731
        return replace(self._trainer, settings=settings, validation=None, checkpoints=None, watch=heard, after_step=_on)

    def _keep_if_whole(self, **facts: Any) -> None:
        """Keeps what a trial has found, but not of one that the clock ended."""
        if self._seconds >= self._most:
            self._keep()
            raise _Over
        self._keep(**facts)


def _known(path: Path | None, of: str) -> dict[str, Any]:
    """What a search has found before.

    Raises:
        UsageError: another search.
        StorageError: the file is damaged.
    """
    if path is None or not path.exists():
        return {"of": of, "seconds": 0.0, "losses": {}}
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        other = found["of"] != of
    except (ValueError, KeyError, TypeError) as why:
        raise StorageError(f"{path} is damaged; remove it to look for the learning rate again") from why
    if other:
        raise UsageError(f"{path.parent} holds a training with other settings, data or layers; choose a new folder")
    return found


def _beyond(losses: dict[float, float]) -> float | None:
    """The rate to try next, a factor of 3 beyond the best where that is the first or the last of them; at most `_MOST` in all."""
    best, rates = min(losses, key=losses.__getitem__), sorted(losses)
    if not math.isfinite(losses[best]) or len(rates) >= _MOST:
        return None
    following = {rates[0]: best / 3, rates[-1]: best * 3}.get(best)
    return None if following is None else float(f"{following:.2g}")


def _on(student: nn.Module, step: int, planned: int) -> bool:
    del student, step, planned
    return False


def _short(steps: int, seconds: float | None = None) -> dict[str, Any]:
    """So many steps, no other end but the clock, one look at it; what diverges says so."""
    return {"stop": Stop(steps=steps, seconds=seconds, every=1e9), "health": Health()}


def _below_the_least(rates: list[float], losses: list[float]) -> float | None:
    """A tenth of the rate at the least loss, where that is clearly below what the loss was in the first tenth."""
    begun = losses[: max(3, len(losses) // 10)]
    least = min(losses, default=math.inf)
    if len(begun) < 2:
        return None
    if least >= fmean(begun) - 2 * stdev(begun):
        return None
    return rates[losses.index(least)] / 10
