"""What is to become small: time, bytes, energy, or several at once, as one number per trial."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from hasten.core.errors import UsageError
from hasten.core.recipe import Aim
from hasten.core.report import Goal, Interval, Limit, Measurement

TIMED: tuple[Goal, ...] = ("latency", "throughput")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The cost of a measurement; lower is better.

    cost = (Π value of each goal)^(1/k): halving one value counts as much as halving another, whatever their units. Values are
    milliseconds of a call ("latency"), milliseconds per example of a full batch ("throughput"), bytes ("size", "memory"),
    millijoules of a call ("energy").

    Args:
        goals: one or more, each once.
        batch: whose latency counts, >= 1.
        full: batch size of the throughput, >= 1.

    >>> Objective(goals=("latency", "size")).goals
    ('latency', 'size')

    Raises:
        UsageError: on an unknown goal, a repeated one, or none.
    """

    goals: tuple[Goal, ...] = ("latency",)
    batch: int = 1
    full: int = 32

    def __post_init__(self) -> None:
        known = get_args(Goal)
        if not self.goals or len(set(self.goals)) < len(self.goals) or not set(self.goals) <= set(known):
            raise UsageError(f"the objective must be one or more of {', '.join(known)}, each once, got {', '.join(self.goals) or 'none'}")

    @property
    def aims(self) -> frozenset[Aim]:
        """What a step must aim at to be of use."""
        return frozenset("size" if goal in ("size", "memory") else "speed" for goal in self.goals)

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes whose times count; the latency's where none does, for the caps and the report."""
        wanted = {"latency": self.batch, "throughput": self.full}
        return tuple(sorted({wanted[g] for g in self.goals if g in TIMED})) or (self.batch,)

    def cost(self, measured: Measurement) -> float:
        """The geometric mean of the goals' values; infinite where one of them was not measured."""
        values = [self._value(goal, measured) for goal in self.goals]
        return math.exp(sum(math.log(max(v, 1e-12)) for v in values) / len(values)) if all(map(math.isfinite, values)) else math.inf

    def gain(self, old: Measurement, new: Measurement, over: Sequence[Interval]) -> Interval:
        """Old cost ÷ new cost with its interval: times from `over`, the old ÷ new times of each batch size; the rest counted."""
        ratios = [self._ratio(goal, old, new, over) for goal in self.goals]
        value, low, high = (math.exp(sum(math.log(max(r[i], 1e-12)) for r in ratios) / len(ratios)) for i in range(3))
        return replace(over[0], batch=self.batch, value=value, low=low, high=high)

    def _ratio(self, goal: Goal, old: Measurement, new: Measurement, over: Sequence[Interval]) -> tuple[float, float, float]:
        if goal in TIMED:
            found = next(i for i in over if i.batch == (self.batch if goal == "latency" else self.full))
            return found.value, found.low, found.high
        ratio = self._value(goal, old) / max(self._value(goal, new), 1e-12)
        return ratio, ratio, ratio

    def _value(self, goal: Goal, measured: Measurement) -> float:
        if goal == "latency":
            return measured.at(self.batch).p50_ms
        if goal == "throughput":
            return measured.at(self.full).p50_ms / self.full
        if goal == "energy":
            return math.inf if measured.energy_mj is None else measured.energy_mj
        return float(measured.size_bytes if goal == "size" else measured.peak_memory_bytes)


def timed(measured: Measurement, times: dict[int, float]) -> Measurement:
    """The measurement with medians from another, better timing; `times`: batch size → milliseconds."""
    latency = tuple(replace(entry, p50_ms=times.get(entry.batch, entry.p50_ms)) for entry in measured.latency)
    return replace(measured, latency=latency)


def missed(measured: Measurement, speedup: float, limit: Limit, batch: int) -> list[str]:
    """Which caps a result misses, in words.

    Args:
        measured: with its times and memory.
        speedup: over the network as given.
    """
    ms, memory = measured.at(batch).p50_ms, measured.peak_memory_bytes
    energy, rate = measured.energy_mj, 1e3 * batch / ms
    found = [
        (limit.size_bytes, measured.size_bytes, 1, f"{measured.size_bytes:,} bytes on disk, cap {limit.size_bytes or 0:,}"),
        (limit.peak_memory_bytes, memory, 1, f"{memory:,} bytes of memory, cap {limit.peak_memory_bytes or 0:,}"),
        (limit.latency_ms, ms, 1, f"{ms:.3g} ms, cap {limit.latency_ms or 0:g} ms"),
        (limit.energy_mj, energy, 1, f"{energy or 0:.3g} mJ, cap {limit.energy_mj or 0:g} mJ"),
        (limit.min_speedup, speedup, -1, f"{speedup:.2f}× faster, minimum {limit.min_speedup or 0:g}×"),
        (limit.examples_per_s, rate, -1, f"{rate:,.0f} examples per second, minimum {limit.examples_per_s or 0:,.0f}"),
    ]
    return [words for cap, value, sign, words in found if cap is not None and (value is None or sign * value > sign * cap)]
