"""How sure a difference is: bounds on paired score drops, intervals of time ratios, and how many examples they take.

Every bound here is one-sided and upper, at `confidence` = 1 − α; a drop is positive where the score fell. All of it is
deterministic: random draws come from the seed alone.

Letters: n examples; lost, those that the original had right and the new network has wrong; won, the reverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from hasten.core.data import Array

RESAMPLES = 4000
SET_RESAMPLES = 2000
_GROUPS = 20_000
_JACKKNIFE_GROUPS = 400
_DRAWS_AT_ONCE = 500_000


class Ratio(NamedTuple):
    """A ratio with its two-sided interval."""

    value: float
    low: float
    high: float


def tango_upper(lost: int, won: int, n: int, *, confidence: float) -> float:
    """Upper bound of the drop of a paired 0/1 score, p(lost) − p(won), from Tango's score interval.

    The drop δ at which (lost − won − nδ) / √(n(2q + δ(1 − δ))) = −z, where q is the maximum-likelihood p(won) given δ:
    the upper end of the two-sided interval at 1 − 2α. With nothing lost and nothing won it is z² / (n + z²).
    An asymptotic bound: with one flip or none its real level can exceed α by about two points (0.99²⁶⁸ = 0.068).

    Args:
        lost, won: counts, >= 0, together at most n.
        n: number of pairs, >= 1.
        confidence: in (0.5, 1).

    Raises:
        ValueError: if the counts make no table.

    >>> round(tango_upper(0, 0, 268, confidence=0.95), 5)
    0.00999

    T. Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample design",
    Statistics in Medicine 17:891–908 (1998).
    """
    _check_counts(lost, won, n)
    z2 = _z(confidence) ** 2
    low, high = (lost - won) / n, 1.0
    if lost == n:
        return 1.0
    while low < (middle := (low + high) / 2) < high:
        beyond = (lost - won - n * middle) ** 2 > z2 * n * (2 * _constrained(lost, won, n, middle) + middle * (1 - middle))
        low, high = (low, middle) if beyond else (middle, high)
    return high


def tango_interval(lost: int, won: int, n: int, *, confidence: float) -> tuple[float, float]:
    """Tango's two-sided score interval of the drop; its ends are two one-sided bounds at (1 + confidence) / 2.

    >>> [round(end, 4) for end in tango_interval(60, 20, 1000, confidence=0.95)]
    [0.0231, 0.0584]
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    side = (1 + confidence) / 2
    return -tango_upper(won, lost, n, confidence=side), tango_upper(lost, won, n, confidence=side)


def clopper_pearson_upper(successes: int, n: int, *, confidence: float) -> float:
    """Exact upper bound of a binomial probability: the `confidence` quantile of Beta(successes + 1, n − successes).

    >>> round(clopper_pearson_upper(0, 299, confidence=0.95), 5)
    0.00997

    C. Clopper, E. Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial",
    Biometrika 26:404–413 (1934).
    """
    from scipy.special import betaincinv

    _check_counts(successes, 0, n)
    _check_confidence(confidence)
    return 1.0 if successes == n else float(betaincinv(successes + 1, n - successes, confidence))


def mean_upper(base: Array, new: Array, *, confidence: float, seed: int, ceiling: float | None = None, resamples: int = RESAMPLES) -> float:
    """Upper bound of mean(base − new) for paired per-example scores: the larger of BCa and Gaffke's bound.

    BCa alone knows only losses that it has seen: with skewed losses it misses two to three times as often as it says,
    and with nothing changed it says 0. Gaffke's bound adds one unseen example that loses `ceiling`.

    Args:
        base, new: (n,) scores of the same examples, n >= 2, finite.
        confidence: in (0.5, 1).
        ceiling: the most that one example can lose: 1 for a score in [0, 1]; None where scores have no bound. Then it is
            twice the largest difference seen; and where fewer than ten examples differ at all, so that the sample tells
            little of what a difference costs, at least the range of the scores (their size where they are all equal).

    Raises:
        ValueError: on NaN, fewer than two examples, or a difference above the ceiling.
    """
    differences = _differences(base, new)
    if ceiling is None:
        ceiling = _observed_ceiling(base, new)
    guard = gaffke_upper(differences, ceiling=ceiling, confidence=confidence, seed=seed, resamples=resamples)
    return max(guard, bca_upper(base, new, confidence=confidence, seed=seed, resamples=resamples))


def gaffke_upper(differences: Array, *, ceiling: float, confidence: float, seed: int, resamples: int = RESAMPLES) -> float:
    """Upper bound of the mean of values that never exceed `ceiling`, with no other assumption on their distribution.

    The `confidence` quantile of Σ wᵢdᵢ + w₀·ceiling, w ~ Dirichlet(1, …, 1). For 0/1 losses it is the exact
    Clopper–Pearson bound, for n zeros ceiling · (1 − α^(1/n)). Its level is proved for some families and has no known exception.

    Args:
        differences: (n,), finite, none above the ceiling.
        ceiling: the largest value possible.

    Raises:
        ValueError: on NaN, or a ceiling that does not hold.

    N. Gaffke, "Three test statistics for a nonparametric one-sided hypothesis on the mean of a nonnegative variable",
    Mathematical Methods of Statistics 14:451–467 (2005); M. Phan, P. Thomas, E. Learned-Miller, "Towards practical mean
    bounds for small samples", ICML 2021, arXiv 2106.03163.
    """
    _check_confidence(confidence)
    differences = np.asarray(differences, dtype=float)
    largest = float(differences.max())
    if not largest <= ceiling * (1 + 1e-9) < math.inf:
        raise ValueError(f"the ceiling must be finite and no difference above it, got {ceiling} and a difference of {largest}")
    scale = max(float(np.abs(differences).max()), abs(ceiling)) or 1.0
    rng = np.random.default_rng(seed)
    values = (np.append(_pooled(differences, rng), ceiling) / scale).astype(np.float32)
    means = np.empty(resamples)
    for rows in _chunks(resamples, len(values)):
        weights = rng.standard_exponential((rows.stop - rows.start, len(values)), dtype=np.float32)
        means[rows] = (weights @ values) / weights.sum(axis=1)
    return float(np.quantile(means, confidence)) * scale


def bca_upper(base: Array, new: Array, *, confidence: float, seed: int, resamples: int = RESAMPLES) -> float:
    """Upper bound of mean(base − new) by the paired BCa bootstrap.

    The mean over examples drawn with replacement, at the quantile Φ(z₀ + (z₀ + z) / (1 − a(z₀ + z))): z₀ corrects the bias,
    a = Σe³ / 6(Σe²)^1.5 with e = d − mean(d) the skewness. Where all differences are equal the bound is that value, which
    says nothing about examples not seen: `mean_upper` does.

    Raises:
        ValueError: on NaN or fewer than two examples.

    B. Efron, "Better bootstrap confidence intervals", Journal of the American Statistical Association 82:171–185 (1987).
    """
    _check_confidence(confidence)
    differences = _differences(base, new)
    mean = float(differences.mean())
    if np.ptp(differences) == 0:
        return mean
    rng = np.random.default_rng(seed)
    errors = _pooled(differences, rng) - mean
    n = len(errors)
    index_type = np.uint16 if n <= 2**16 else np.uint32
    means = np.empty(resamples)
    for rows in _chunks(resamples, n):
        means[rows] = errors[rng.integers(0, n, (rows.stop - rows.start, n), dtype=index_type)].mean(axis=1)
    return mean + _bca_quantile(means, 0.0, errors, confidence)


def bca_upper_of(
    statistic: Callable[[Array], float],
    n: int,
    *,
    confidence: float,
    seed: int,
    ceiling: float | None = None,
    resamples: int = SET_RESAMPLES,
) -> float:
    """Upper bound of a drop that is a function of the whole set (F1, AUC), by the BCa bootstrap over examples.

    As `bca_upper`, with the acceleration from the jackknife (in 400 groups at most). With a ceiling, it is at least
    Gaffke's bound of the jackknife's pseudo-values. Resamples where the statistic is NaN (a class is missing) are left out.

    Args:
        statistic: the drop on the examples at an index array; NaN where it is undefined.
        n: number of examples, >= 2.
        ceiling: the most that one example can add to the drop, times n; None trusts that what was not seen does not matter.

    Returns:
        The bound; infinite if more than one resample in twenty is undefined.
    """
    _check_confidence(confidence)
    if n < 2:
        raise ValueError(f"a bootstrap needs at least 2 examples, got {n}")
    everything = np.arange(n)
    estimate = float(statistic(everything))
    if not math.isfinite(estimate):
        raise ValueError(f"the statistic must be finite on the whole set, got {estimate}")
    rng = np.random.default_rng(seed)
    groups = np.array_split(rng.permutation(n), min(n, _JACKKNIFE_GROUPS))
    without = np.array([statistic(np.delete(everything, group)) for group in groups])
    draws = np.array([statistic(rng.integers(0, n, n)) for _ in range(resamples)])
    if np.isnan(draws).mean() > 0.05:
        return math.inf
    draws = draws[~np.isnan(draws)]
    influence = _influence(without, estimate, groups)
    bound = _bca_quantile(draws, estimate, influence, confidence)
    if ceiling is None:
        return bound
    top = max(ceiling * len(groups) / n, float(influence.max()))
    return max(bound, estimate + gaffke_upper(influence, ceiling=top, confidence=confidence, seed=seed, resamples=resamples))


def ratio_interval(log_ratios: Array, *, confidence: float = 0.95) -> Ratio:
    """The ratio exp(mean) with its t-interval, from the logarithms of one ratio for each pair of launches.

    Args:
        log_ratios: (pairs,), at least two, finite.
        confidence: of the two-sided interval, in (0, 1).

    >>> ratio = ratio_interval(np.log([1.9, 2.0, 2.1, 2.0]))
    >>> round(ratio.value, 2), round(ratio.low, 2), round(ratio.high, 2)
    (2.0, 1.87, 2.13)
    """
    logs, reach = _logs(log_ratios), half_width(log_ratios, confidence=confidence)
    value = math.exp(logs.mean())
    return Ratio(value, value / (1 + reach), value * (1 + reach))


def half_width(log_ratios: Array, *, confidence: float = 0.95) -> float:
    """How far `ratio_interval` reaches above its value, as a share of it: exp(t · s / √pairs) − 1."""
    from scipy.special import stdtrit

    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    logs = _logs(log_ratios)
    return math.expm1(stdtrit(len(logs) - 1, (1 + confidence) / 2) * logs.std(ddof=1) / math.sqrt(len(logs)))


def fewest(max_drop: float, confidence: float) -> int | None:
    """The number of examples below which no 0/1 score can be proved within `max_drop`, even with no example flipped.

    From z² / (n + z²) <= max_drop. None where no number would do (max_drop 0).

    >>> fewest(0.01, 0.95)
    268
    """
    z2 = _z(confidence) ** 2
    return math.ceil(z2 * (1 - max_drop) / max_drop) if max_drop > 0 else None


def enough(lost_share: float, won_share: float, max_drop: float, *, confidence: float, power: float = 0.9) -> int | None:
    """How many examples would show a drop within `max_drop`, were the true shares of lost and won examples those observed.

    n = ((z·σ₀ + z_power·σ₁) / (max_drop − drop))², with σ₁² = lost + won − drop² the variance of one pair, and σ₀² the
    variance that Tango's bound assumes at `max_drop`.

    Returns:
        The number at which the proof comes out with probability `power`; None where the drop itself is not below `max_drop`.
    """
    if not (0 <= lost_share <= 1 and 0 <= won_share <= 1 and lost_share + won_share <= 1 and 0 < power < 1):
        raise ValueError(f"shares and power must lie in [0, 1], got lost {lost_share}, won {won_share}, power {power}")
    drop = lost_share - won_share
    if drop >= max_drop or max_drop <= 0:
        return None
    null = 2 * _constrained(lost_share, won_share, 1, max_drop) + max_drop * (1 - max_drop)
    reach = _z(confidence) * math.sqrt(null) + _z_power(power) * math.sqrt(lost_share + won_share - drop**2)
    return math.ceil((reach / (max_drop - drop)) ** 2 - 1e-9)


def enough_by_spread(estimate: float, upper: float, n: int, max_drop: float, *, confidence: float, power: float = 0.9) -> int | None:
    """As `enough` for any other score: from the estimate and its bound on n examples, whose distance shrinks with √n."""
    if estimate >= max_drop or not math.isfinite(upper):
        return None
    reach = (upper - estimate) * (1 + _z_power(power) / _z(confidence))
    return math.ceil(n * (reach / (max_drop - estimate)) ** 2)


def _constrained(lost: float, won: float, n: float, drop: float) -> float:
    """The maximum-likelihood p(won) given p(lost) − p(won) = drop: the larger root of 2nq² + bq + c."""
    b = (2 * n - lost + won) * drop - lost - won
    c = -won * drop * (1 - drop)
    root = math.sqrt(max(b * b - 8 * n * c, 0.0))
    q = -2 * c / (b + root) if b > 0 else (root - b) / (4 * n)
    return max(q, 0.0, -drop)


def _bca_quantile(draws: Array, estimate: float, influence: Array, confidence: float) -> float:
    from scipy.special import ndtr, ndtri

    below = ((draws < estimate).mean() + (draws <= estimate).mean()) / 2
    bias = float(ndtri(np.clip(below, 0.5 / len(draws), 1 - 0.5 / len(draws))))
    square = float((influence**2).sum())
    skew = float((influence**3).sum()) / (6 * square**1.5) if square > 0 else 0.0
    reach = bias + _z(confidence)
    level = float(ndtr(bias + reach / (1 - skew * reach))) if skew * reach < 1 else 1.0
    return float(np.quantile(draws, level))


def _influence(without: Array, estimate: float, groups: list[Array]) -> Array:
    """What each group adds to the statistic, as a mean over its examples, centred: the jackknife's pseudo-values."""
    n = sum(len(g) for g in groups)
    share = np.array([(n - len(g)) / len(g) for g in groups])
    pseudo: Array = np.where(np.isnan(without), 0.0, share * (estimate - without))
    return np.asarray(pseudo - pseudo.mean())


def _observed_ceiling(base: Array, new: Array) -> float:
    difference = np.abs(base - new)
    ceiling = 2 * float(difference.max())
    if (difference > 0).sum() < 10:
        both = np.concatenate([base, new])
        ceiling = max(ceiling, float(np.ptp(both))) or float(np.abs(both).max()) or 1.0
    return ceiling


def _differences(base: Array, new: Array) -> Array:
    base, new = np.asarray(base, dtype=float), np.asarray(new, dtype=float)
    if base.ndim != 1 or base.shape != new.shape:
        raise ValueError(f"base and new must be (n,) scores of the same examples, got shapes {base.shape} and {new.shape}")
    if len(base) < 2:
        raise ValueError(f"a bootstrap needs at least 2 examples, got {len(base)}")
    difference: Array = base - new
    if not np.isfinite(difference).all():
        raise ValueError(f"scores must be finite, got {int((~np.isfinite(difference)).sum())} NaN or infinite differences")
    return difference


def _logs(log_ratios: Array) -> Array:
    logs = np.asarray(log_ratios, dtype=float)
    if logs.ndim != 1 or len(logs) < 2 or not np.isfinite(logs).all():
        raise ValueError(f"log_ratios must be at least 2 finite numbers, one for each pair of launches, got {logs.tolist()}")
    return logs


def _pooled(differences: Array, rng: np.random.Generator) -> Array:
    """At most 20,000 values with the same mean: averages of random groups, which keep variance and skewness of the mean."""
    n = len(differences)
    if n <= _GROUPS:
        return differences
    starts = np.arange(_GROUPS) * n // _GROUPS
    return np.asarray(np.add.reduceat(rng.permutation(differences), starts)) * (_GROUPS / n)


def _chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices of `rows` that hold a few million numbers each."""
    step = max(1, _DRAWS_AT_ONCE // width)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _check_counts(lost: int, won: int, n: int) -> None:
    if n < 1 or lost < 0 or won < 0 or lost + won > n:
        raise ValueError(f"counts must be >= 0 and add up to at most n >= 1, got {lost} and {won} of {n}")


def _check_confidence(confidence: float) -> None:
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence must be in (0.5, 1), got {confidence}")


def _z(confidence: float) -> float:
    _check_confidence(confidence)
    return NormalDist().inv_cdf(confidence)


def _z_power(power: float) -> float:
    return NormalDist().inv_cdf(power)
