"""What the answers of a network on data say: the values that `evaluate` asks with and gives back, and the arithmetic between them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hasten.applying import Columns
from hasten.core.data import Array, View
from hasten.core.errors import DataRefused, UsageError
from hasten.core.network import Arrays
from hasten.core.score import Score
from hasten.measure import scores, statistics
from hasten.measure.calibration import calibration_error
from hasten.search.bench import check_alike, finite
from hasten.search.prover import drop_bound
from hasten.search.summary import by_class

_ROWS = 1024  # that get their noise at a time


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How the answers are got and judged.

    Args:
        columns: which labels, groups and score.
        batch: examples of a call, >= 1; the last call is filled up, so a network that is fixed to a size is asked with that size.
        confidence: of the intervals, in (0.5, 1).
        ray: address of a Ray cluster whose nodes share the examples; None for this machine alone.
        workers: in the cluster; None for one on each node.
        noise: if above 0, the score is taken again with Gaussian noise on every input of floats: of this share of the deviation that a
            feature or channel (axis 1) has over the examples, and no further than its least and largest value.
        seed: of the bootstrap and the noise.
    """

    columns: Columns = field(default_factory=Columns)
    batch: int = 64
    confidence: float = 0.95
    ray: str | None = None
    workers: int | None = None
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.noise < math.inf:
            raise UsageError(f"noise must be a finite share of at least 0, got {self.noise}")
        if self.batch < 1:
            raise UsageError(f"batch must be at least 1, got {self.batch}")
        if not 0.5 < self.confidence < 1:
            raise UsageError(f"confidence must be in (0.5, 1), got {self.confidence}")
        if self.workers is not None and (self.workers < 1 or self.ray is None):
            raise UsageError(f"workers are for a Ray cluster and at least 1, got {self.workers} and --ray {self.ray}")


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """The examples of one class: how many, and their score, `against` that of the other network."""

    name: str
    examples: int
    score: float
    against: float | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What a network scores on data.

    Args:
        network: what was evaluated; against: what it was held against, None for nothing.
        score_name, score: higher is better.
        low, high: where the score of the population lies that the examples were drawn from, at `confidence`, None for a score that
            is no mean over examples.
        examples: how many.
        seconds: of the answers of `network`, its start included.
        score_against: of the other network.
        drop: of the score from the other network to this one; drop_upper: the most it is, at `confidence`, one-sided.
        lost, won: examples that only the other one, or only this one has right; None but for a score of right and wrong.
        calibration, calibration_against: expected calibration error in [0, 1]: how far it is from being right as often as it is sure;
            None where the labels are no classes.
        noise, score_in_noise, score_in_noise_against: see `Asked`; None without.
        classes: where the labels are classes.
        notes: what must be said about the data.
    """

    network: str
    score_name: str
    score: float
    low: float | None
    high: float | None
    confidence: float
    examples: int
    seconds: float
    against: str | None = None
    score_against: float | None = None
    drop: float | None = None
    drop_upper: float | None = None
    lost: int | None = None
    won: int | None = None
    calibration: float | None = None
    calibration_against: float | None = None
    noise: float | None = None
    score_in_noise: float | None = None
    score_in_noise_against: float | None = None
    classes: tuple[ClassScore, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the fields."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        sure = f"{100 * self.confidence:.4g}%"
        between = "" if self.low is None else f" ({sure}: {self.low:.4f} to {self.high:.4f})"
        lines = [self.network, f"{self.score_name} {self.score:.4f}{between} on {self.examples:,} examples in {self.seconds:.1f} s"]
        if self.against is not None:
            flips = "" if self.lost is None else f"; right only there {self.lost:,}, only here {self.won:,}"
            drop = f"a drop of {self.drop:.4f}, at most {self.drop_upper:.4f} ({sure})"
            lines.append(f"against {self.against}: {self.score_against:.4f}, {drop}{flips}")
        if self.calibration is not None:
            lines.append(f"calibration error {self.calibration:.4f}" + _beside(self.calibration_against))
        if self.score_in_noise is not None:
            lines.append(
                f"{self.score_name} with noise of {self.noise:g}: {self.score_in_noise:.4f}" + _beside(self.score_in_noise_against)
            )
        width = max((len(c.name) for c in self.classes), default=0)
        for c in self.classes:
            lines.append(f"  {c.name:{width}}  {c.examples:7,}  {c.score:.4f}" + _beside(c.against))
        return "\n".join([*lines, *self.notes])


def _beside(value: float | None) -> str:
    return "" if value is None else f"  against {value:.4f}"


def noisy(view: View, asked: Asked) -> Arrays:
    """The inputs with noise; nothing where none is asked for. Raises UsageError where no input is of floats."""
    if not asked.noise:
        return ()
    inputs = [np.asarray(a) for a in view.inputs]
    if not any(a.dtype.kind == "f" for a in inputs):
        raise UsageError(f"noise is for inputs of floats, the data has {', '.join(str(a.dtype) for a in inputs)}")
    draw = np.random.default_rng(asked.seed)
    return tuple(_troubled(a, asked.noise, draw) if a.dtype.kind == "f" else a for a in inputs)


def _troubled(values: Array, share: float, draw: np.random.Generator) -> Array:
    others = (0, *range(2, values.ndim))
    deviation = share * values.std(others, dtype=np.float64, keepdims=True)
    low, high = values.min(others, keepdims=True), values.max(others, keepdims=True)
    found = np.empty_like(values)
    for at in range(0, len(values), _ROWS):
        rows = values[at : at + _ROWS]
        found[at : at + _ROWS] = (rows + deviation * draw.standard_normal(rows.shape, dtype=np.float32)).clip(low, high)
    return found


def early(view: View, asked: Asked, *, alone: bool) -> None:
    """Raises UsageError on what needs no answers to be known: a score of labels or of another network, and there are none."""
    name = asked.columns.score
    if name is None and alone and view.labels is None:
        raise UsageError(
            "the data names no labels (y, label, labels or target), and without them one network is held against another: say with "
            "--target where the labels are, or give the other network with --against"
        )
    score = None if name is None else scores.by_name(name)
    if score is not None and score.target == "original" and alone:
        raise UsageError(f"the score {score.name} holds one network against another: give the other one with --against")
    if score is not None and score.target == "labels" and view.labels is None:
        raise UsageError(f"the score {score.name} needs labels, and the data has none")


def judged(answers: list[Arrays], troubled: list[Arrays], view: View, task: dict[str, Any], asked: Asked) -> dict[str, Any]:
    """The fields of `Evaluated` that come from outputs."""
    outputs, reference = answers[0], answers[-1]
    check_alike(reference, outputs)
    score = scores.choose(view.labels, reference, name=asked.columns.score)
    _check_classes(task["classes"], outputs)
    target = view.labels if score.target == "labels" else reference[0]
    assert target is not None
    values = [score.per_example(a, target) for a in answers]
    low, high = _interval(values[0], score, asked)
    found: dict[str, Any] = {"score_name": score.name, "score": finite(score.value(outputs, target)), "low": low, "high": high}
    if len(answers) == 2:
        bound = drop_bound(reference, outputs, target, score=score, confidence=asked.confidence, seed=asked.seed)
        found |= {"score_against": score.value(reference, target), "drop": bound.value, "drop_upper": bound.upper}
        found |= {"lost": bound.lost, "won": bound.won}
    found |= _named("calibration", [_calibration(a[0], view.labels) for a in answers])
    if troubled:
        found |= {"noise": asked.noise, **_named("score_in_noise", [score.value(a, target) for a in troubled])}
    known = by_class(view.labels, values, task["classes"]) if score.unit == "pt" else ()
    found["classes"] = tuple(ClassScore(name=name, examples=n, **_named("score", means, "against")) for name, n, means in known)
    return {**found, "confidence": asked.confidence, "examples": len(view), "notes": tuple(task["notes"])}


def _named(name: str, values: Sequence[float | None], other: str = "") -> dict[str, Any]:
    """One value or two by the names of the fields that they stand in."""
    return dict(zip((name, other or f"{name}_against"), values, strict=False))


def _calibration(outputs: Array, labels: Array | None) -> float | None:
    """None where there are no classes with a score each."""
    if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iu" or outputs.ndim != 2 or outputs.shape[1] <= max(labels.max(), 1):
        return None
    shares = scores.shares_of_classes(outputs)
    return calibration_error(shares, labels) if np.isfinite(shares).all() else None


def _check_classes(names: Sequence[str], outputs: Arrays) -> None:
    if names and outputs[0].ndim == 2 and max(outputs[0].shape[1], 2) != len(names):
        raise DataRefused(
            f"the labels name {len(names)} classes and the network has {outputs[0].shape[1]}: which number a name has cannot be told; "
            "give the labels as numbers"
        )


def _interval(values: Array | None, score: Score, asked: Asked) -> tuple[float | None, float | None]:
    """Two-sided: Clopper and Pearson's for right and wrong, else of the mean as a proof bounds it (`statistics.mean_upper`)."""
    if values is None or len(values) < 2:
        return None, None
    each = (1 + asked.confidence) / 2
    if score.zero_one:
        right = int(values.sum())
        wrong = len(values) - right
        upper = [statistics.clopper_pearson_upper(k, len(values), confidence=each) for k in (wrong, right)]
        return 1 - upper[0], upper[1]
    if not np.isfinite(values).all():
        return None, None
    none, share = np.zeros_like(values), score.unit == "pt"
    low = -statistics.mean_upper(none, values, confidence=each, seed=asked.seed, ceiling=0.0 if share else None)
    high = statistics.mean_upper(values, none, confidence=each, seed=asked.seed, ceiling=1.0 if share else None)
    return low, min(high, 0.0) if (values <= 0).all() else high
