"""What a search may use and what it is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hasten.core.errors import UsageError
from hasten.core.recipe import Engine, Step
from hasten.core.report import Limit


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """The methods that a search may combine.

    Args:
        as_given: the engine that runs the network the way the user does today; the baseline of every speed-up.
        engines: to race on the unchanged network, each with its usual settings.
        steps: kinds of steps; the search varies what their `space` says may vary.
    """

    as_given: Engine
    engines: tuple[Engine, ...]
    steps: tuple[type[Step], ...]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user asked for.

    Args:
        limit: what may be lost, and caps.
        batch: the batch size whose latency is to fall, >= 1.
        batches: all sizes that are measured and reported; holds `batch`.
        seed: of every random choice.
        trials: most recipes to try; None for as many as the search thinks worth it.
        relative_drop: a limit as a share of the original's score; it becomes `limit.max_drop` once that is known.
    """

    limit: Limit
    batch: int = 1
    batches: tuple[int, ...] = (1, 32)
    seed: int = 0
    trials: int | None = None
    relative_drop: float | None = None

    def __post_init__(self) -> None:
        if self.batch < 1 or min(self.batches) < 1:
            raise UsageError(f"a batch size must be at least 1, got {min(self.batch, *self.batches)}")
        if self.batch not in self.batches:
            raise UsageError(f"batches {self.batches} must hold the batch size {self.batch}")
        if self.trials is not None and self.trials < 1:
            raise UsageError(f"trials must be at least 1, got {self.trials}")

    def settled(self, score: float) -> Settings:
        """The same with a relative limit turned into the score's unit, given the original's score on *select*."""
        if self.relative_drop is None:
            return self
        return replace(self, limit=replace(self.limit, max_drop=self.relative_drop * abs(score)), relative_drop=None)
