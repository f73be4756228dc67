"""The scores that hasten knows. All of them look at the first output array.

Shapes: outputs (n, k) or (n, positions…, k) class scores, also (n, k, positions…) against labels, (n,) or (n, 1) single
logits; labels (n,) or (n, positions…). An output of NaN or +inf is wrong wherever something can be wrong; −inf among class
scores is a class that was masked out.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from hasten.core.data import Array
from hasten.core.errors import DataRefused, UsageError
from hasten.core.network import Arrays
from hasten.core.score import Score
from hasten.measure import distances

Values = np.ndarray[Any, np.dtype[np.float64]]
Target = Literal["labels", "original"]
_WRONG = -1
_RUINOUS = 1e3


class _Share(ABC):
    """A score in [0, 1] of class labels, the mean of its per-example values. Those that differ say so."""

    unit: ClassVar[str] = "pt"
    target: ClassVar[Target] = "labels"

    @abstractmethod
    def per_example(self, outputs: Arrays, target: Array) -> Values: ...

    def value(self, outputs: Arrays, target: Array) -> float:
        """The mean over examples."""
        return float(self.per_example(outputs, target).mean())


@dataclass(frozen=True, kw_only=True)
class Accuracy(_Share):
    """The share of examples whose class is predicted right.

    The prediction is the largest class score; of a single logit, the side of `threshold` on which it lies; integer outputs
    in the shape of the labels are predictions themselves.

    Args:
        threshold: of a single output; None takes 0.5 where all outputs lie in [0, 1] (a sigmoid at the end), else 0.
        per_position: with labels for each position, an example's value is the share of positions that are right;
            otherwise it is right where all of them are.
    """

    threshold: float | None = None
    per_position: bool = False

    @property
    def name(self) -> str:
        """As a person says it."""
        return "accuracy per position" if self.per_position else "accuracy"

    @property
    def zero_one(self) -> bool:
        """False where an example's value is a share of its positions."""
        return not self.per_position

    def per_example(self, outputs: Arrays, target: Array) -> Values:
        """(n,) values. Raises DataRefused where labels and outputs do not fit."""
        labels = _labels(target)
        return _shares(_predictions(outputs[0], labels, self.threshold) == labels, self.per_position)


@dataclass(frozen=True, kw_only=True)
class TopK(_Share):
    """The share of examples whose class is among the `k` largest scores; of equal scores the first counts as larger."""

    zero_one: ClassVar[bool] = True
    k: int = 5

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UsageError(f"k must be >= 1, got {self.k}")

    @property
    def name(self) -> str:
        """ "top-5 accuracy"."""
        return f"top-{self.k} accuracy"

    def per_example(self, outputs: Arrays, target: Array) -> Values:
        """(n,) values, 0 or 1. Raises DataRefused where labels and outputs do not fit."""
        scores, labels = outputs[0], _labels(target)
        if scores.ndim != 2 or labels.shape != scores.shape[:1] or scores.shape[1] < 2:
            raise DataRefused(f"{self.name} needs outputs (n, classes) and labels (n,), got {scores.shape} and {labels.shape}")
        _check_classes(labels, scores.shape[1])
        own = np.take_along_axis(scores, labels[:, None].astype(int), axis=1)
        ahead = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < labels[:, None]))
        right = (ahead.sum(axis=1) < self.k) & _usable(scores, -1) & np.isfinite(own[:, 0])
        return np.asarray(right.astype(float))


@dataclass(frozen=True, kw_only=True)
class SquaredError(_Share):
    """Minus the mean squared error, in the square of the labels' unit.

    No single error counts as more than a thousand times the range of the labels, and an output of NaN or infinity counts
    as just that: it is never better than a finite one.
    """

    name: ClassVar[str] = "minus squared error"
    unit: ClassVar[str] = ""
    zero_one: ClassVar[bool] = False

    def per_example(self, outputs: Arrays, target: Array) -> Values:
        """(n,) values, at most 0: the mean over the other axes. Raises DataRefused on NaN in the labels or other sizes."""
        labels = np.asarray(target, dtype=float)
        if outputs[0].size != labels.size or len(outputs[0]) != len(labels):
            raise DataRefused(f"squared error needs outputs like the labels {labels.shape}, got {outputs[0].shape}")
        if not np.isfinite(labels).all():
            raise DataRefused(f"labels must be finite, got {int((~np.isfinite(labels)).sum())} NaN or infinite values")
        worst = _RUINOUS * (float(np.ptp(labels)) or float(np.abs(labels).max()) or 1.0)
        error = np.abs(outputs[0].reshape(len(labels), -1).astype(float) - labels.reshape(len(labels), -1))
        return np.asarray(-(np.where(error < worst, error, worst) ** 2).mean(axis=1))


@dataclass(frozen=True, kw_only=True)
class Agreement(_Share):
    """The share of examples on which the prediction is the original network's. Classes lie on the last axis.

    Predictions as in `Accuracy`. Where the original gives NaN nothing agrees.

    Args:
        threshold: as in `Accuracy`; None looks at the original's outputs.
        per_position: an example's value is the share of its positions that agree; otherwise all of them must.
    """

    target: ClassVar[Target] = "original"
    threshold: float | None = None
    per_position: bool = False

    @property
    def name(self) -> str:
        """As a person says it."""
        return "agreement with the original per position" if self.per_position else "agreement with the original"

    @property
    def zero_one(self) -> bool:
        """False where an example's value is a share of its positions."""
        return not self.per_position

    def per_example(self, outputs: Arrays, target: Array) -> Values:
        """(n,) values, `target` being the original's first output. Raises DataRefused where the shapes differ."""
        if outputs[0].shape != target.shape:
            raise DataRefused(f"outputs must have the original's shape {target.shape}, got {outputs[0].shape}")
        threshold = _threshold(target) if self.threshold is None else self.threshold
        ours, theirs = (_classes(a, -1, threshold) for a in (outputs[0], target))
        return _shares((ours == theirs) & (ours != _WRONG), self.per_position)


@dataclass(frozen=True, kw_only=True)
class Fidelity(_Share):
    """How much of the original's outputs y₀ is left, for outputs that are values: the mean of 1 − ‖y − y₀‖² / v, in [0, 1].

    v is the mean over examples of ‖y₀ − mean(y₀)‖² (of ‖y₀‖² where they do not vary), so that without the clipping of each
    example to [0, 1] the score is R² of y against y₀. NaN or infinity, unless the same in both, costs the whole example.
    """

    name: ClassVar[str] = "fidelity to the original"
    target: ClassVar[Target] = "original"
    zero_one: ClassVar[bool] = False

    def per_example(self, outputs: Arrays, target: Array) -> Values:
        """(n,) values, `target` being the original's first output. Raises DataRefused where the shapes differ."""
        if outputs[0].shape != target.shape:
            raise DataRefused(f"outputs must have the original's shape {target.shape}, got {outputs[0].shape}")
        return distances.kept(outputs[0], target)


@dataclass(frozen=True, kw_only=True)
class MacroF1:
    """The mean over the classes that occur in the labels of F1 = 2·hits / (predicted + occurring). A set function.

    Args:
        threshold: as in `Accuracy`.
    """

    name: ClassVar[str] = "macro F1"
    unit: ClassVar[str] = "pt"
    target: ClassVar[Target] = "labels"
    zero_one: ClassVar[bool] = False
    threshold: float | None = None

    def per_example(self, outputs: Arrays, target: Array) -> None:
        """None: it is no mean over examples."""

    def value(self, outputs: Arrays, target: Array) -> float:
        """F1 of the set. Raises DataRefused where labels and outputs do not fit."""
        labels = _labels(target).ravel()
        predicted = _predictions(outputs[0], _labels(target), self.threshold).ravel()
        size = int(max(labels.max(), predicted.max())) + 1
        hits, occurring, guessed = (
            np.bincount(a, minlength=size) for a in (labels[predicted == labels], labels, predicted[predicted != _WRONG])
        )
        present = occurring > 0
        return float((2 * hits[present] / (occurring + guessed)[present]).mean())


@dataclass(frozen=True, kw_only=True)
class AUC:
    """The area under the ROC curve: the probability that an example of the class is ranked above one that is not, ties half.

    Of a single logit or two class scores for class 1; of more, the mean over classes of one against the rest, by softmax
    where they are no probabilities yet. NaN or infinity is ranked where it hurts: lowest for the example's own class,
    highest for another. A set function.
    """

    name: ClassVar[str] = "AUC"
    unit: ClassVar[str] = "pt"
    target: ClassVar[Target] = "labels"
    zero_one: ClassVar[bool] = False

    def per_example(self, outputs: Arrays, target: Array) -> None:
        """None: it is no mean over examples."""

    def value(self, outputs: Arrays, target: Array) -> float:
        """The area. Raises DataRefused where the labels hold one class only, or do not fit the outputs."""
        labels, scores = _labels(target), outputs[0].astype(float)
        scores = scores.reshape(len(scores), -1)
        if labels.shape != scores.shape[:1]:
            raise DataRefused(f"AUC needs outputs (n, classes) and labels (n,), got {outputs[0].shape} and {labels.shape}")
        _check_classes(labels, max(2, scores.shape[1]))
        present = np.flatnonzero(np.bincount(labels))
        if len(present) < 2:
            raise DataRefused("AUC needs labels of at least two classes, got one; give more examples")
        with np.errstate(invalid="ignore", over="ignore"):
            if scores.shape[1] <= 2:
                rank_by = scores[:, 0] if scores.shape[1] == 1 else scores[:, 1] - scores[:, 0]
                return _area(rank_by, labels == 1)
            shares = shares_of_classes(scores)
        return float(np.mean([_area(shares[:, c], labels == c) for c in present]))


_KNOWN: tuple[tuple[str, Score], ...] = (
    ("accuracy", Accuracy()),
    ("accuracy-per-position", Accuracy(per_position=True)),
    ("top5", TopK(k=5)),
    ("squared-error", SquaredError()),
    ("agreement", Agreement()),
    ("agreement-per-position", Agreement(per_position=True)),
    ("fidelity", Fidelity()),
    ("macro-f1", MacroF1()),
    ("auc", AUC()),
)


def by_name(name: str) -> Score:
    """The score of that name, short or in full; `top3` for any number. Raises UsageError on another.

    >>> by_name("top3") == by_name("top-3 accuracy") == TopK(k=3)
    True
    """
    key = _key(name)
    if top := re.fullmatch(r"top-?([1-9]\d*)(-accuracy)?", key):
        return TopK(k=int(top[1]))
    found = [score for short, score in _KNOWN if key in (short, _key(score.name))]
    if not found:
        raise UsageError(f"no score named {name!r}; choose one of {', '.join(short for short, _ in _KNOWN)}")
    return found[0]


def choose(labels: Array | None, outputs: Arrays, *, name: str | None = None) -> Score:
    """The score that fits the labels and the original's outputs, or the one of that name.

    Integer labels are classes: accuracy (squared error where one output stands against more than two values). Float labels
    are values: squared error. Without labels: agreement where the outputs are class scores (n, k >= 2) or integers, else
    fidelity; so too where all have length 1, as embeddings. Accuracy and agreement are per position where there are several.

    Args:
        labels: (n, …) or None; outputs: of any number of examples.
        name: one that `by_name` knows.

    Raises:
        UsageError: on another name, or a score of labels where there are none.

    >>> choose(np.array([0, 2, 1]), (np.eye(3),)).name
    'accuracy'
    >>> choose(None, (np.zeros((4, 1)),)).name
    'fidelity to the original'
    """
    score = by_name(name) if name is not None else _fitting(labels, outputs[0])
    if score.target == "labels" and labels is None:
        raise UsageError(f"the score {score.name} needs labels, and the data has none; give labels or choose agreement")
    if score == Accuracy() and labels is not None:
        return Accuracy(per_position=math.prod(labels.shape[1:]) > 1)
    if score == Agreement():
        positions = outputs[0].shape[1:] if outputs[0].dtype.kind in "iub" else outputs[0].shape[1:-1]
        return Agreement(per_position=math.prod(positions) > 1)
    return score


def _key(name: str) -> str:
    return re.sub(r"[\s_]+", "-", name.strip().lower())


def _fitting(labels: Array | None, outputs: Array) -> Score:
    if labels is None:
        classes = outputs.dtype.kind in "iub" or (outputs.ndim == 2 and outputs.shape[1] >= 2 and not _of_length_1(outputs))
        return Agreement() if classes else Fidelity()
    if labels.dtype.kind not in "iub":
        return SquaredError()
    one_each = math.prod(outputs.shape[1:]) == math.prod(labels.shape[1:])
    values = outputs.dtype.kind == "f" and one_each and not np.isin(labels, (0, 1)).all()
    return SquaredError() if values else Accuracy()


def _of_length_1(outputs: Array) -> bool:
    """Whether every row is a direction and not merely one class."""
    return bool(np.allclose(np.linalg.norm(outputs, axis=1), 1.0, atol=1e-3) and np.abs(outputs).max(axis=1).mean() < 0.99)


def _labels(target: Array) -> Array:
    """Integer labels, (n, 1) as (n,)."""
    labels = np.asarray(target)
    if labels.dtype.kind not in "iub":
        raise DataRefused(f"classes need integer labels, got {labels.dtype}; choose --score squared-error for values")
    labels = labels.astype(np.int64)
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def _predictions(outputs: Array, labels: Array, threshold: float | None) -> Array:
    """The predicted class for each label, `_WRONG` where the outputs cannot be used."""
    if outputs.dtype.kind in "iub" and outputs.size == labels.size:
        return outputs.reshape(labels.shape).astype(np.int64)
    if outputs.size == labels.size:
        _check_classes(labels, 2)
        return _sides(outputs, threshold).reshape(labels.shape)
    for axis, shape in ((-1, outputs.shape[:-1]), (1, outputs.shape[:1] + outputs.shape[2:])):
        if outputs.ndim > 1 and shape == labels.shape:
            _check_classes(labels, outputs.shape[axis])
            return _classes(outputs, axis, threshold)
    raise DataRefused(f"outputs must be class scores for labels {labels.shape}, got shape {outputs.shape}")


def _classes(outputs: Array, axis: int, threshold: float | None) -> Array:
    """The predicted classes: the largest along `axis`, the side of a single logit, or the integers themselves."""
    if outputs.dtype.kind in "iub":
        return outputs.astype(np.int64)
    if outputs.ndim == 1 or outputs.shape[axis] == 1:
        return _sides(outputs, threshold)
    return np.where(_usable(outputs, axis), outputs.argmax(axis=axis), _WRONG)


def _sides(logits: Array, threshold: float | None) -> Array:
    return np.where(np.isfinite(logits), logits > (_threshold(logits) if threshold is None else threshold), _WRONG)


def _threshold(logits: Array) -> float:
    finite = logits[np.isfinite(logits)]
    return 0.5 if finite.size and finite.min() >= 0 and finite.max() <= 1 else 0.0


def _usable(scores: Array, axis: int) -> Array:
    """Where class scores tell anything: no NaN, no +inf, and at least one is finite."""
    return np.asarray(np.isfinite(scores.max(axis=axis)))


def _shares(right: Array, per_position: bool) -> Values:
    flat = right.reshape(len(right), -1)
    return np.asarray(flat.mean(axis=1) if per_position else flat.all(axis=1).astype(float))


def _check_classes(labels: Array, count: int) -> None:
    if labels.size and not (labels.min() >= 0 and labels.max() < count):
        raise DataRefused(f"labels must be classes 0 to {count - 1}, got {labels.min()} to {labels.max()}")


def shares_of_classes(scores: Array) -> Array:
    """Rows of class scores as probabilities: their softmax, unless they are such already."""
    usable = scores[~(np.isnan(scores) | np.isposinf(scores)).any(axis=1)]
    if len(usable) and (usable >= 0).all() and (np.abs(usable.sum(axis=1) - 1) < 1e-3).all():
        return scores
    raised = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def _area(scores: Array, positive: Array) -> float:
    """The share of pairs of a positive and a negative in which the positive is ranked higher; a tie is half a pair."""
    scores = np.where(np.isfinite(scores), scores, np.where(positive, -math.inf, math.inf))
    above, others = np.sort(scores[positive]), np.sort(scores[~positive])
    pairs = np.searchsorted(others, above, "left").sum() + np.searchsorted(others, above, "right").sum()
    return float(pairs / (2 * len(above) * len(others)))
