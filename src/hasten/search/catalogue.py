"""What a search may use and what it is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

from hasten.core.errors import UsageError
from hasten.core.recipe import Aim, Engine, Step
from hasten.core.report import Goal, Limit, Measurement
from hasten.search.objective import Objective

_TIMING_S = (40.0, 100.0)  # of the heats, the ablation and the final timing: a quarter of the time, within these
_PROVED = 2.5  # times as long as the network as given takes for *prove*: it, and some that are faster


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """The methods that a search may combine.

    Args:
        as_given: the engine that runs the network the way the user does today; the baseline of every speed-up.
        engines: to race on the unchanged network, each with its usual settings.
        steps: kinds of steps; the search varies what their `space` says may vary.
        tune: vary the fields of steps and engines that came out best.
        trainings: most trainings at each of the two lengths, short and long, >= 0; with 0 nothing is trained that needs it.
    """

    as_given: Engine
    engines: tuple[Engine, ...]
    steps: tuple[type[Step], ...]
    tune: bool = True
    trainings: int = 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user asked for, and what a search may know of the data: sizes.

    Args:
        limit: what may be lost, and caps.
        goals: what is to become small, see `Objective`.
        batch: the batch size whose latency is to fall, >= 1.
        batches: all sizes that are measured and reported; holds `batch`. The largest is the one of the throughput.
        seed: of every random choice.
        trials: most recipes to try; None for as many as the search thinks worth it.
        time_limit_s: for the whole run; None for as long as it takes.
        finals_s: what follows the last trial takes about this; of a time limit it gets half at most.
        aside_s: what came before the search and is no trial.
        relative_drop: a limit as a share of the original's score; it becomes `limit.max_drop` once that is known.
        train_examples: how many there are, 0 where not known.
        select_examples: how many there are to choose with, 0 where not known.
        prove_examples: how many there will be to prove with; None where the proof is not that of a 0/1 score.
    """

    limit: Limit
    goals: tuple[Goal, ...] = ("latency",)
    batch: int = 1
    batches: tuple[int, ...] = (1, 32)
    seed: int = 0
    trials: int | None = None
    time_limit_s: float | None = None
    finals_s: float = 150.0
    aside_s: float = 0.0
    relative_drop: float | None = None
    train_examples: int = 0
    select_examples: int = 0
    prove_examples: int | None = None

    def __post_init__(self) -> None:
        if self.batch < 1 or min(self.batches) < 1:
            raise UsageError(f"a batch size must be at least 1, got {min(self.batch, *self.batches)}")
        if self.batch not in self.batches:
            raise UsageError(f"batches {self.batches} must hold the batch size {self.batch}")
        if self.trials is not None and self.trials < 1:
            raise UsageError(f"trials must be at least 1, got {self.trials}")
        if self.time_limit_s is not None and not self.time_limit_s > 0:
            raise UsageError(f"the time limit must be above 0 seconds, got {self.time_limit_s:g}")
        self.objective  # noqa: B018 - its checks are ours

    @property
    def objective(self) -> Objective:
        """The goals as one number."""
        return Objective(goals=self.goals, batch=self.batch, full=max(self.batches))

    @property
    def aims(self) -> frozenset[Aim]:
        """What a step must aim at to be of use: at a goal, or at a cap."""
        capped = self.limit.size_bytes is not None or self.limit.peak_memory_bytes is not None
        return self.objective.aims | (frozenset({"size"}) if capped else frozenset())

    @property
    def counts_energy(self) -> bool:
        """Whether energy is asked for, as a goal or as a cap."""
        return "energy" in self.goals or self.limit.energy_mj is not None

    @property
    def search_s(self) -> float:
        """Seconds for trials: the time limit without what comes before and behind them."""
        return float("inf") if self.time_limit_s is None else self.time_limit_s - self.reserve_s - self.aside_s

    @property
    def reserve_s(self) -> float:
        """Seconds for the heat, the ablation, the proof and the final timing."""
        return 0.0 if self.time_limit_s is None else min(self.finals_s, self.time_limit_s / 2)

    def promising(self, measured: Measurement) -> bool:
        """Whether a proof is to be expected: from the drop, and what so many proving examples leave open at that share of flips."""
        open_ = 0.0
        if self.prove_examples and measured.flips is not None and self.limit.accept == "proof":
            z = NormalDist().inv_cdf(self.limit.confidence)
            open_ = z * math.sqrt(measured.flips / self.prove_examples)
        return measured.score_drop + open_ <= self.limit.max_drop + 1e-9

    def settled(self, score: float, proof_s: float = 0.0) -> Settings:
        """The same with a relative limit turned into the score's unit, and with time for the proof.

        Args:
            score: of the original on *select*.
            proof_s: seconds that the outputs of one candidate on *prove* will take.
        """
        least, most = _TIMING_S
        timing_s = min(most, max(least, (self.time_limit_s or math.inf) / 4))
        settled = replace(self, finals_s=timing_s + _PROVED * proof_s)
        if self.relative_drop is None:
            return settled
        return replace(settled, limit=replace(self.limit, max_drop=self.relative_drop * abs(score)), relative_drop=None)
