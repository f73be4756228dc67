"""Freezing the candidates on *select* and testing them on *prove*: the statistics of the promise, on arrays alone.

Fixed-sequence testing: the candidates are put into an order before *prove* is opened, each is tested in turn at level
α = 1 − confidence, and the sequence stops at the first failure. For a false `kept` to come out, the first candidate of the
sequence that really exceeds the limit must pass its own test; that happens with probability α at most, however many
candidates were tried before and whatever they had in common. (A. Angelopoulos, S. Bates, E. Candès, M. Jordan, L. Lei,
"Learn then Test: Calibrating predictive algorithms to achieve risk control", 2021, arXiv 2110.01052.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from hasten.core.data import Array
from hasten.core.errors import DataRefused
from hasten.core.network import Arrays
from hasten.core.report import Bound, Certificate, Limit
from hasten.core.score import Score
from hasten.measure import distances, statistics

EQUAL_TOLERANCE = 1e-3
HOPELESS = 2.0
_BROKEN = 200


def freeze(points: Sequence[tuple[int, float, float, float]], *, limit: Limit, most: int = 8) -> list[int]:
    """The candidates that go before *prove*, safest first, fastest last.

    Those whose drop on *select* exceeds twice the limit are left out: testing them would only end the sequence. Of the rest
    the Pareto front of risk and latency stays; along it the risk rises and the latency falls. Where more than `most` are on it, the
    one whose neighbours lie closest together in latency goes, until they fit; the safest and the fastest always stay.

    Args:
        points: (trial number, score drop on *select*, risk, latency in milliseconds on *select*); NaN drops are left out. The risk may be
            the drop itself, or whatever orders candidates better, such as how far their answers lie from the original's.
        most: at least 2.

    Returns:
        Trial numbers; empty where every candidate is hopeless.

    Raises:
        ValueError: on a latency that is not above 0.

    >>> freeze([(1, 0.0, 0.0, 4.0), (2, 0.004, 0.1, 2.0), (3, 0.003, 0.2, 3.0), (4, 0.05, 0.3, 1.0)], limit=Limit(max_drop=0.01))
    [1, 2]
    """
    if most < 2:
        raise ValueError(f"most must be >= 2, got {most}")
    if bad := [p for p in points if not 0 < p[3] < math.inf]:
        raise ValueError(f"latencies must be above 0, got {bad[0][3]} of trial {bad[0][0]}")
    hopeful = [p for p in points if p[1] <= HOPELESS * limit.max_drop + 1e-9]
    front: list[tuple[int, float, float, float]] = []
    for point in sorted(hopeful, key=lambda p: (p[2], p[3], p[0])):
        if not front or point[3] < front[-1][3]:
            front.append(point)
    while len(front) > most:
        gaps = [before[3] / after[3] for before, after in zip(front, front[2:], strict=False)]
        del front[1 + gaps.index(min(gaps))]
    return [number for number, *_ in front]


def certify(
    base_outputs: Arrays,
    target: Array | None,
    candidates: Iterable[tuple[int, Arrays, bool]],
    *,
    score: Score,
    limit: Limit,
    seed: int,
) -> list[Certificate]:
    """Tests the candidates in turn on *prove*; the last certificate is the failure that ended the sequence, if one did.

    A candidate after a failure is not even drawn from `candidates`, unless the limit accepts the estimate: then no claim
    is made that an order would protect, and all are judged. A verdict says what was shown, in either case:
    `equal`: the recipe is lossless, the outputs are the original's (`equal_outputs`) and no 0/1 score flipped: a fact about
    how it was made, checked, so that its bound is the drop itself;
    `kept`: the upper bound of the drop is within the limit;
    `not shown`: the estimate is within, the bound is not; `enough` examples would do, were the estimate the truth;
    `exceeded`: the estimate itself is beyond the limit.

    Args:
        base_outputs: the original's on *prove*, each (n, …), n >= 2.
        target: labels; unused by a score whose target is the original.
        candidates: (trial number, outputs, whether the recipe is lossless), in the frozen order. May be lazy.
        seed: of the bootstrap.

    Raises:
        DataRefused: on fewer than two examples, or outputs whose shapes differ from the original's.
    """
    certificates = []
    for trial, outputs, lossless in candidates:
        certificate = _judge(trial, base_outputs, outputs, target, lossless=lossless, score=score, limit=limit, seed=seed)
        certificates.append(certificate)
        if limit.accept == "proof" and certificate.verdict not in ("equal", "kept"):
            break
    return certificates


def drop_bound(base_outputs: Arrays, outputs: Arrays, target: Array | None, *, score: Score, confidence: float, seed: int) -> Bound:
    """The drop of the score from the original to a candidate, on the same examples, with its upper bound.

    Tango's interval for 0/1 scores; for other per-example scores and for set functions paired BCa, but never less than
    Gaffke's bound, which allows for what the sample did not show. No share can drop by more than 1.
    """
    _check_shapes(base_outputs, outputs)
    against = _against(base_outputs, target, score)
    n = len(base_outputs[0])
    base, new = (score.per_example(o, against) for o in (base_outputs, outputs))
    if base is None or new is None:
        return _set_bound(base_outputs, outputs, against, score=score, confidence=confidence, seed=seed)
    if score.zero_one:
        lost, won = int((base > new).sum()), int((base < new).sum())
        upper = statistics.tango_upper(lost, won, n, confidence=confidence)
        return Bound(value=(lost - won) / n, upper=upper, n=n, method="Tango", lost=lost, won=won)
    ceiling = 1.0 if score.unit == "pt" else None
    upper = statistics.mean_upper(base, new, confidence=confidence, seed=seed, ceiling=ceiling)
    return Bound(value=float((base - new).mean()), upper=upper, n=n, method="BCa and Gaffke")


def equal_outputs(base_outputs: Arrays, outputs: Arrays) -> bool:
    """Whether no number differs by more than 0.001 of the largest |number| of the same output of the original.

    What is NaN or infinite must be so in both.
    """
    _check_shapes(base_outputs, outputs)
    return all(distances.close(a, b, EQUAL_TOLERANCE) for a, b in zip(base_outputs, outputs, strict=True))


def _judge(
    trial: int,
    base_outputs: Arrays,
    outputs: Arrays,
    target: Array | None,
    *,
    lossless: bool,
    score: Score,
    limit: Limit,
    seed: int,
) -> Certificate:
    exact = _equal(base_outputs, outputs, target, score=score, limit=limit) if lossless else None
    if exact:
        return Certificate(trial=trial, verdict="equal", bound=exact)
    bound = drop_bound(base_outputs, outputs, target, score=score, confidence=limit.confidence, seed=seed)
    if bound.upper <= limit.max_drop:
        return Certificate(trial=trial, verdict="kept", bound=bound)
    if bound.value <= limit.max_drop:
        return Certificate(trial=trial, verdict="not shown", bound=bound, enough=_enough(bound, limit))
    return Certificate(trial=trial, verdict="exceeded", bound=bound)


def mean(score: Score, outputs: Arrays, target: Array) -> float:
    """The score, by its values per example where it has them."""
    values = score.per_example(outputs, target)
    return score.value(outputs, target) if values is None else float(values.mean())


def _equal(base_outputs: Arrays, outputs: Arrays, target: Array | None, *, score: Score, limit: Limit) -> Bound | None:
    """What `equal` rests on: the same outputs, no flip of a 0/1 score, and no drop that would matter; else None."""
    if not equal_outputs(base_outputs, outputs):
        return None
    against = _against(base_outputs, target, score)
    base, new = mean(score, base_outputs, against), mean(score, outputs, against)
    if base - new > max(limit.max_drop, EQUAL_TOLERANCE * abs(base)):
        return None
    flips = 0 if score.zero_one else None
    if score.zero_one and not np.array_equal(score.per_example(base_outputs, against), score.per_example(outputs, against)):  # type: ignore[arg-type]
        return None
    return Bound(value=base - new, upper=base - new, n=len(outputs[0]), method="equal outputs", lost=flips, won=flips)


def _against(base_outputs: Arrays, target: Array | None, score: Score) -> Array:
    against = base_outputs[0] if score.target == "original" else target
    if against is None:
        raise DataRefused(f"the score {score.name} needs labels, and the data has none; choose agreement")
    return against


def _enough(bound: Bound, limit: Limit) -> int | None:
    """More examples than there were, or None where no number would do."""
    if bound.lost is not None and bound.won is not None:
        shares = bound.lost / bound.n, bound.won / bound.n
        number = statistics.enough(*shares, limit.max_drop, confidence=limit.confidence)
    else:
        number = statistics.enough_by_spread(bound.value, bound.upper, bound.n, limit.max_drop, confidence=limit.confidence)
    return None if number is None else max(number, bound.n + 1)


def _set_bound(base_outputs: Arrays, outputs: Arrays, target: Array, *, score: Score, confidence: float, seed: int) -> Bound:
    n = len(target)

    def value(of: Arrays, index: Array) -> float:
        try:
            return score.value(tuple(o[index] for o in of), target[index])
        except DataRefused:
            return math.nan  # a resample without one of the classes

    def drop(index: Array) -> float:
        return value(base_outputs, index) - value(outputs, index)

    estimate = score.value(base_outputs, target) - score.value(outputs, target)
    ceiling = n * _breakage(outputs, target, score, np.random.default_rng(seed))
    upper = statistics.bca_upper_of(drop, n, confidence=confidence, seed=seed, ceiling=ceiling)
    return Bound(value=estimate, upper=min(upper, 1.0) if score.unit == "pt" else upper, n=n, method="BCa and Gaffke")


def _breakage(outputs: Arrays, target: Array, score: Score, rng: np.random.Generator) -> float:
    """The most that the score falls when one example answers as another one: what an unseen failure can cost.

    Tried on 200 pairs; the examples that break include one of each class, as one of a rare class costs the most.
    """
    n, whole = len(target), score.value(outputs, target)
    flat = target.reshape(n, -1)[:, 0]
    each = np.unique(flat, return_index=True)[1][:_BROKEN]
    worst = 0.0
    for at in np.concatenate([each, rng.integers(0, n, _BROKEN - len(each))]):
        index = np.arange(n)
        index[at] = rng.integers(0, n)
        worst = max(worst, whole - score.value(tuple(o[index] for o in outputs), target))
    return worst


def _check_shapes(base_outputs: Arrays, outputs: Arrays) -> None:
    expected, got = [o.shape for o in base_outputs], [o.shape for o in outputs]
    if expected != got:
        raise DataRefused(f"outputs must have the original's shapes {expected}, got {got}")
    if len(base_outputs[0]) < 2:
        raise DataRefused(f"a proof needs at least 2 examples, got {len(base_outputs[0])}")
