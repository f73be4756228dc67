"""The same training over several seeds: one run says little about a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn

from hasten.core.errors import UsageError
from hasten.train.loop import Fitted, Trainer


@dataclass(frozen=True, kw_only=True, eq=False)
class Spread:
    """Several trainings of one recipe.

    Args:
        fitted: in the order of the seeds.
        losses: on the validation data at the end, or without such data the mean training loss of the last tenth.
    """

    fitted: tuple[Fitted, ...]
    losses: tuple[float, ...]

    def __str__(self) -> str:
        trends = ", ".join(sorted({f.trend for f in self.fitted}))
        return f"loss {fmean(self.losses):.4g} ± {stdev(self.losses):.2g} over {len(self.losses)} seeds; at the end {trends}"


def over_seeds(trainer: Trainer, build: Callable[[], nn.Module], data: Any, seeds: Sequence[int]) -> Spread:
    """Trains what `build` gives once per seed, which decides the first weights and every draw of the training.

    Raises:
        UsageError: fewer than two seeds, or checkpoints, which belong to one training.
    """
    if len(set(seeds)) < 2:
        raise UsageError(f"a spread needs at least two different seeds, got {list(seeds)}")
    if trainer.checkpoints is not None:
        raise UsageError("checkpoints belong to one training; leave them out for several seeds")
    fitted = []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            module = build()
        fitted.append(replace(trainer, settings=replace(trainer.settings, seed=seed)).fit(module, data))
    return Spread(fitted=tuple(fitted), losses=tuple(_end(one) for one in fitted))


def _end(fitted: Fitted) -> float:
    last = [loss for _, loss in fitted.curve[-max(1, len(fitted.curve) // 10) :]]
    return fitted.looks[-1] if fitted.looks else fmean(last)
