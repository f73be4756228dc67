"""The values of a finished search: measurements, trials, the limit and the report. All of them are plain JSON.

docs/format.md describes the JSON; tests/golden pins its bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from dataclasses import field
from typing import Any, ClassVar, Literal, Self, TypeVar, dataclass_transform

from pydantic import ConfigDict, TypeAdapter

from hasten.core.data import Provenance
from hasten.core.errors import StorageError, UsageError

FORMAT: Literal[1] = 1
Verdict = Literal["equal", "kept", "not shown", "exceeded"]
T = TypeVar("T")
Accept = Literal["proof", "point"]
Goal = Literal["latency", "throughput", "size", "memory", "energy"]


@dataclass_transform(frozen_default=True, kw_only_default=True)
def _value(cls: type[T]) -> type[T]:
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


_adapter: Callable[[object], TypeAdapter[Any]] = functools.cache(TypeAdapter)


class _Json:
    """Reading and writing of a value as JSON."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    def to_json(self) -> dict[str, Any]:
        """The value as a JSON object."""
        record: dict[str, Any] = _adapter(type(self)).dump_python(self, mode="json")
        return record

    @classmethod
    def from_json(cls, record: object) -> Self:
        """The value that `to_json` wrote. Raises StorageError on anything else."""
        try:
            value: Self = _adapter(cls).validate_json(json.dumps(record))
        except ValueError as why:
            raise StorageError(f"not a {cls.__name__}: {str(why).splitlines()[0]}; start again in a new run folder") from why
        return value


@_value
class Interval(_Json):
    """An estimate with its two-sided interval, for one batch size. Ratios are old ÷ new time: above 1 is faster."""

    batch: int
    value: float
    low: float
    high: float
    launches: int = 1

    @property
    def faster(self) -> bool:
        """Whether a speed-up is shown: the low end lies above 1.02."""
        return self.low > 1.02

    @property
    def vague(self) -> bool:
        """Whether its ends lie further apart than a factor of two: then the estimate says nothing."""
        return self.high > 2 * self.low


@_value
class Latency(_Json):
    """Times of one call at one batch size, in milliseconds. p99 is given from 1,000 calls on."""

    batch: int
    p50_ms: float
    p95_ms: float
    p99_ms: float | None = None
    calls: int
    launches: int
    first_call_ms: float


@_value
class Measurement(_Json):
    """What a recipe's result measures on this machine, in its final engine. The score is that of the *select* view.

    Args:
        score: mean or set value, higher is better.
        score_drop: the original's minus this one's, in the score's unit.
        flips: share of examples whose score differs from the original's; None for a set score.
        max_difference: largest |output − original's output| divided by the largest |original's output|.
        latency: one entry per batch size.
        size_bytes: of the files that the user receives.
        peak_memory_bytes: resident set of the process that runs it, at its highest.
        parameters: numbers held in weights; macs: multiply-accumulates for one example; None where they cannot be told.
        energy_mj: of one call at the user's batch size, in millijoules; None where it was not asked for.
        distance: root mean square of output − original's output, as a share of that of the original's output; of several outputs the
            largest. None where it was not taken.
    """

    score: float
    score_drop: float
    flips: float | None
    max_difference: float
    latency: tuple[Latency, ...]
    size_bytes: int
    peak_memory_bytes: int
    parameters: int | None = None
    macs: int | None = None
    energy_mj: float | None = None
    distance: float | None = None

    def at(self, batch: int) -> Latency:
        """The latency at a batch size."""
        return next(entry for entry in self.latency if entry.batch == batch)


@_value
class Limit(_Json):
    """What the user can afford.

    Args:
        max_drop: in the score's unit (0.01 of an accuracy is one point), >= 0.
        confidence: of the statement that the drop is at most `max_drop`, in (0.5, 1).
        accept: "proof" asks for the bound, "point" is content with the estimate and says so.
        latency_ms, size_bytes, peak_memory_bytes: the result must not exceed these.
        energy_mj: of a call at the user's batch size; must not be exceeded either.
        min_speedup: over the network as given, at the user's batch size; examples_per_s: at that size. The result must reach these.
    """

    max_drop: float = 0.01
    confidence: float = 0.95
    accept: Accept = "proof"
    latency_ms: float | None = None
    size_bytes: int | None = None
    peak_memory_bytes: int | None = None
    min_speedup: float | None = None
    energy_mj: float | None = None
    examples_per_s: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_drop) and self.max_drop >= 0):
            raise UsageError(f"max_drop must be a number >= 0 in the score's unit, got {self.max_drop}")
        if not 0.5 < self.confidence < 1:
            raise UsageError(f"confidence must be in (0.5, 1), got {self.confidence}")
        for name in ("latency_ms", "size_bytes", "peak_memory_bytes", "min_speedup", "energy_mj", "examples_per_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} must be above 0, got {value}")


@_value
class Trial(_Json):
    """One recipe that was tried: its measurement, or the reason why there is none.

    `seconds`: what it took; `pace_s`: what a training in it takes from its first step to its last, by its progress.
    """

    number: int
    recipe: dict[str, Any]
    words: str
    state: Literal["finished", "failed", "running"]
    measurement: Measurement | None = None
    reason: str | None = None
    seconds: float = 0.0
    pace_s: float | None = None


@_value
class Bound(_Json):
    """A score drop on *prove*: the estimate and its one-sided upper bound at the limit's confidence, in the score's unit."""

    value: float
    upper: float
    n: int
    method: str
    lost: int | None = None
    won: int | None = None


@_value
class Certificate(_Json):
    """What *prove* said of one frozen candidate."""

    trial: int
    verdict: Verdict
    bound: Bound | None
    enough: int | None = None


@_value
class Chosen(_Json):
    """The result."""

    trial: int
    recipe: dict[str, Any]
    words: str
    speedup: tuple[Interval, ...]
    speedup_over_best_plain: tuple[Interval, ...]
    score: float
    score_drop: Bound
    size_bytes: int
    peak_memory_bytes: int
    parameters: int | None
    macs: int | None
    latency_ms: tuple[Latency, ...]
    energy_mj: float | None = None


@_value
class Baseline(_Json):
    """The network as given, or the best plain engine of the unchanged network."""

    trial: int
    words: str
    score: float
    size_bytes: int
    peak_memory_bytes: int
    parameters: int | None
    macs: int | None
    latency_ms: tuple[Latency, ...]
    energy_mj: float | None = None


@_value
class LedgerLine(_Json):
    """What one part of the chosen recipe bought and cost: the recipe without it against the recipe with it, on *select*.

    `latency_ms` and `size_bytes` are what it saved, `score_drop` what it cost, in the score's unit.
    """

    part: str
    latency_ms: float | None
    size_bytes: int | None
    score_drop: float | None
    note: str = ""


@_value
class Finding(_Json):
    """What one method could do on this network and machine, on *select*.

    Args:
        method: name of the kind of step.
        forecast: old ÷ new cost where it was first seen alone, before any training; `score_drop`: what it cost there.
        gain: the largest such ratio among recipes that a proof was expected of; None where there is none.
        note: what became of it.
    """

    method: str
    forecast: float | None = None
    score_drop: float | None = None
    gain: float | None = None
    note: str


@_value
class ParetoPoint(_Json):
    """One trial on the front of ranking speed-up (against the network as given) and score drop, both on *select*."""

    trial: int
    speedup: float
    score_drop: float


@_value
class ClassChange(_Json):
    """The examples of one class on *prove*: their score with the original and with the result."""

    name: str
    n: int
    before: float
    after: float


@_value
class Opening(_Json):
    """One opening of the *prove* data; `reused` if the same data was opened before."""

    fingerprint: str
    when: str
    candidates: tuple[int, ...]
    reused: bool


@_value
class Report(_Json):
    """All that a run found out.

    `chosen` is None where a cap of the limit is met by no certified candidate, or where the run is not finished. `offers` are the
    certified candidates that were timed in the end and meet the caps, the chosen one first, the others by cost; any can be picked.
    `fixed_batch` is the only batch size that the network takes, if there is one. `input_shapes`: of one example, with the type, as all
    times were taken.
    """

    format: Literal[1] = FORMAT
    state: Literal["finished", "running", "interrupted"]
    verdict: Verdict | None
    sentence: str
    limit: Limit
    score_name: str
    provenance: Provenance
    examples: dict[str, int]
    baselines: dict[str, Baseline]
    chosen: Chosen | None
    closest_miss: str | None = None
    certificates: tuple[Certificate, ...] = ()
    pareto: tuple[ParetoPoint, ...] = ()
    ledger: tuple[LedgerLine, ...] = ()
    findings: tuple[Finding, ...] = ()
    classes: tuple[ClassChange, ...] = ()
    class_names: tuple[str, ...] = ()
    input_names: tuple[str, ...] = ()
    input_shapes: tuple[str, ...] = ()
    openings: tuple[Opening, ...] = ()
    trials: tuple[Trial, ...] = ()
    notes: tuple[str, ...] = ()
    batch: int = 1
    batches: tuple[int, ...] = (1,)
    fixed_batch: int | None = None
    objective: tuple[Goal, ...] = ("latency",)
    offers: tuple[Chosen, ...] = ()
    artifact: str | None = None
    command: str = ""
    seed: int = 0
    seconds: float = 0.0
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 with a result, 3 where a cap is met by no certified candidate, 130 while unfinished."""
        if self.state != "finished":
            return 130
        return 0 if self.chosen else 3
