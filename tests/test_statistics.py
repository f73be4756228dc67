"""The bounds: against printed values, against slow independent solvers, against SciPy, and against their own promise."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from statistics import NormalDist

import numpy as np
import pytest
from scipy import optimize, stats

from hasten.measure import statistics as s

TABLES = [(0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 300), (3, 1, 40), (1, 3, 40), (20, 20, 2000), (5, 0, 50), (0, 5, 50), (30, 9, 60)]


def slow_upper(lost: int, won: int, n: int, z: float) -> float:
    """Tango's bound from its definition: the likelihood under p(lost) − p(won) = δ is maximised numerically."""

    def statistic(drop: float) -> float:
        def minus_likelihood(q: float) -> float:
            shares = np.array([q + drop, q, 1 - 2 * q - drop])
            counts = np.array([lost, won, n - lost - won])
            return -float(sum(c * math.log(max(p, 1e-300)) for c, p in zip(counts, shares, strict=True) if c))

        least, most = max(0.0, -drop), (1 - drop) / 2
        found = optimize.minimize_scalar(minus_likelihood, bounds=(least, most), method="bounded", options={"xatol": 1e-12}).x
        q = min((least, found, most), key=minus_likelihood)
        return (lost - won - n * drop) / math.sqrt(n * (2 * q + drop * (1 - drop)))

    return optimize.brentq(lambda d: statistic(d) + z, (lost - won) / n + 1e-9, 1 - 1e-9, xtol=1e-12)


@pytest.mark.parametrize(
    ("lost", "won", "n", "confidence", "low", "high", "digits"),
    [
        # Tango 1998, section 6.1 (soft contact lenses): lower end of the 90 % interval
        (0, 1, 44, 0.90, -0.096, None, 3),
        # Fagerland, Lydersen, Laake 2014, Statistics in Medicine 33:2850–2875 (airway hyper-responsiveness)
        (1, 7, 21, 0.95, -0.517, -0.026, 3),
        # R, PropCIs::scoreci.mp(25, 28, 618, 0.90) and (20, 60, 1000, 0.95)
        (28, 25, 618, 0.90, -0.0148, 0.0247, 4),
        (60, 20, 1000, 0.95, 0.0231, 0.0584, 4),
    ],
)
def test_tango_gives_the_printed_values(
    lost: int, won: int, n: int, confidence: float, low: float, high: float | None, digits: int
) -> None:
    got = s.tango_interval(lost, won, n, confidence=confidence)
    assert round(got[0], digits) == low
    assert high is None or round(got[1], digits) == high


@pytest.mark.parametrize(("lost", "won", "n"), [t for t in TABLES if t[0] < t[2]])
def test_tango_solves_its_own_definition(lost: int, won: int, n: int) -> None:
    z = NormalDist().inv_cdf(0.95)
    assert s.tango_upper(lost, won, n, confidence=0.95) == pytest.approx(slow_upper(lost, won, n, z), abs=1e-7)


@pytest.mark.parametrize("n", [1, 2, 10, 268, 10_000, 10**7])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
def test_tango_with_no_flip_has_a_closed_form(n: int, confidence: float) -> None:
    z = NormalDist().inv_cdf(confidence)
    assert s.tango_upper(0, 0, n, confidence=confidence) == pytest.approx(z**2 / (n + z**2), rel=1e-9)


@pytest.mark.parametrize(("lost", "won", "n"), TABLES)
def test_tango_mirrors_and_holds_the_estimate(lost: int, won: int, n: int) -> None:
    low, high = s.tango_interval(lost, won, n, confidence=0.9)
    assert s.tango_interval(won, lost, n, confidence=0.9) == (-high, -low)
    assert -1 <= low <= (lost - won) / n <= high <= 1
    assert s.tango_upper(lost, won, n, confidence=0.95) == pytest.approx(high, abs=1e-12)
    assert s.tango_upper(lost, won, n, confidence=0.99) >= high


def test_tango_rises_with_every_lost_example_up_to_one() -> None:
    bounds = [s.tango_upper(lost, 0, 30, confidence=0.95) for lost in range(31)]
    assert all(a < b for a, b in itertools.pairwise(bounds))
    assert bounds[-1] == 1


def passing_share(n: int, lost: float, won: float, max_drop: float) -> float:
    """The exact probability that Tango's bound at 95 % comes out within the limit."""
    total = 0.0
    most = 0
    for w in range(int(stats.binom.ppf(1 - 1e-9, n, won)) + 1):
        while s.tango_upper(most, w, n, confidence=0.95) <= max_drop:
            most += 1
        total += stats.binom.pmf(w, n, won) * stats.binom.cdf(most - 1, n - w, lost / (1 - won))
    return float(total)


@pytest.mark.parametrize("n", [300, 500, 1000])
@pytest.mark.parametrize("won", [0.0, 0.002, 0.01])
def test_tango_keeps_its_level_at_the_limit(n: int, won: float) -> None:
    assert passing_share(n, won + 0.01, won, 0.01) < 0.052


def test_tango_exceeds_its_level_where_one_flip_decides() -> None:
    assert passing_share(268, 0.01, 0.0, 0.01) == pytest.approx(0.99**268, abs=1e-9)  # 0.068: stated in the docstring


@pytest.mark.parametrize(("n", "expected"), [(360, 0.33), (1000, 0.69), (2000, 0.92)])
def test_power_with_two_percent_flipped(n: int, expected: float) -> None:
    assert passing_share(n, 0.01, 0.01, 0.01) == pytest.approx(expected, abs=0.006)


def test_fewest_is_the_first_number_that_can_pass() -> None:
    for max_drop, confidence in ((0.01, 0.95), (0.005, 0.95), (0.02, 0.99)):
        n = s.fewest(max_drop, confidence)
        assert n is not None
        assert s.tango_upper(0, 0, n, confidence=confidence) <= max_drop < s.tango_upper(0, 0, n - 1, confidence=confidence)
        assert s.enough(0, 0, max_drop, confidence=confidence) == n
    assert s.fewest(0.01, 0.95) == 268
    assert s.fewest(0, 0.95) is None


@pytest.mark.parametrize(("lost", "won"), [(0.01, 0.01), (0.012, 0.01), (0.005, 0.001), (0.03, 0.04)])
def test_enough_gives_the_power_it_says(lost: float, won: float) -> None:
    n = s.enough(lost, won, 0.01, confidence=0.95)
    assert n is not None
    assert passing_share(n, lost, won, 0.01) == pytest.approx(0.9, abs=0.025)


def test_enough_is_none_where_no_number_would_do() -> None:
    assert s.enough(0.02, 0.01, 0.01, confidence=0.95) is None
    assert s.enough_by_spread(0.01, 0.02, 100, 0.01, confidence=0.95) is None
    assert s.enough_by_spread(0.0, math.inf, 100, 0.01, confidence=0.95) is None
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        s.enough(0.8, 0.8, 0.01, confidence=0.95)


def test_enough_by_spread_agrees_with_enough_on_a_normal_bound() -> None:
    n = 3000
    sd = math.sqrt(0.02)
    upper = NormalDist().inv_cdf(0.95) * sd / math.sqrt(n)
    exact = ((NormalDist().inv_cdf(0.95) + NormalDist().inv_cdf(0.9)) * sd / 0.01) ** 2
    assert s.enough_by_spread(0.0, upper, n, 0.01, confidence=0.95) == math.ceil(exact)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 299), (5, 100), (99, 2000), (7, 7)])
def test_clopper_pearson_is_scipys(k: int, n: int) -> None:
    expected = stats.binomtest(k, n, alternative="less").proportion_ci(0.95, method="exact").high
    assert s.clopper_pearson_upper(k, n, confidence=0.95) == pytest.approx(expected, rel=1e-9)


def losses(kind: str, n: int) -> np.ndarray:
    rng = np.random.default_rng(5)
    return {"normal": rng.normal(0.1, 1, n), "right": rng.lognormal(0, 1, n), "left": -rng.exponential(1, n)}[kind]


@pytest.mark.parametrize("kind", ["normal", "right", "left"])
def test_bca_is_scipys(kind: str) -> None:
    difference = losses(kind, 150)
    theirs = stats.bootstrap((difference,), np.mean, n_resamples=20_000, alternative="less", method="BCa", rng=1)
    expected = theirs.confidence_interval.high
    mean = float(difference.mean())
    same_draws = s._bca_quantile(theirs.bootstrap_distribution, mean, difference - mean, 0.95)
    assert same_draws == pytest.approx(expected, rel=1e-9)
    got = s.bca_upper(difference, np.zeros(150), confidence=0.95, seed=0, resamples=20_000)
    assert got == pytest.approx(expected, abs=0.1 * stats.sem(difference))
    rng = np.random.default_rng(2)
    base = rng.normal(size=150)
    assert s.bca_upper(base + difference, base, confidence=0.95, seed=0, resamples=20_000) == pytest.approx(got, abs=1e-9)


@pytest.mark.parametrize("kind", ["right", "left"])
def test_bca_of_a_set_function_is_scipys(kind: str) -> None:
    values = losses(kind, 120)
    expected = stats.bootstrap((values,), np.std, n_resamples=9_000, alternative="less", method="BCa", rng=1)
    got = s.bca_upper_of(lambda i: float(np.std(values[i])), 120, confidence=0.95, seed=0, resamples=9_000)
    assert got == pytest.approx(expected.confidence_interval.high, abs=0.1 * expected.standard_error)


def test_bca_of_a_set_function_groups_its_jackknife() -> None:
    values = losses("right", 5000)
    calls: list[int] = []

    def mean(index: np.ndarray) -> float:
        calls.append(len(index))
        return float(values[index].mean())

    got = s.bca_upper_of(mean, 5000, confidence=0.95, seed=0, resamples=1000)
    assert len(calls) == 1 + 400 + 1000
    assert got == pytest.approx(s.bca_upper(values, 0 * values, confidence=0.95, seed=1), abs=0.15 * stats.sem(values))


def test_bca_of_an_undefined_statistic() -> None:
    def often(index: np.ndarray) -> float:
        return 0.0 if 0 in index else math.nan  # 37 % of the resamples leave example 0 out

    assert s.bca_upper_of(often, 50, confidence=0.95, seed=0, resamples=200) == math.inf
    with pytest.raises(ValueError, match="finite on the whole set"):
        s.bca_upper_of(lambda _: math.nan, 50, confidence=0.95, seed=0)


@pytest.mark.parametrize(("k", "n"), [(0, 5), (0, 300), (1, 300), (12, 300)])
def test_gaffke_of_zeros_and_ones_is_clopper_pearson(k: int, n: int) -> None:
    lost = (np.arange(n) < k).astype(float)
    got = s.gaffke_upper(lost, ceiling=1.0, confidence=0.95, seed=0, resamples=40_000)
    assert got == pytest.approx(s.clopper_pearson_upper(k, n, confidence=0.95), rel=0.03)


def test_nothing_changed_is_no_proof_of_zero() -> None:
    same = np.linspace(-2, 0, 5)
    assert s.bca_upper(same, same, confidence=0.95, seed=0) == 0
    assert s.mean_upper(same, same, confidence=0.95, seed=0, ceiling=1.0) == pytest.approx(1 - 0.05 ** (1 / 5), rel=0.05)
    assert s.mean_upper(same, same, confidence=0.95, seed=0) == pytest.approx(2 * (1 - 0.05 ** (1 / 5)), rel=0.05)
    assert s.mean_upper(np.zeros(5), np.zeros(5), confidence=0.95, seed=0) > 0.4


def test_a_set_function_that_did_not_change_is_no_proof_of_zero() -> None:
    for n in (20, 4000):
        got = s.bca_upper_of(lambda _: 0.0, n, confidence=0.95, seed=0, resamples=4000, ceiling=1.0)
        assert got == pytest.approx(1 - 0.05 ** (1 / n), rel=0.1)


@pytest.mark.parametrize("draw", ["log-normal", "rare"])
def test_the_bound_holds_where_bca_alone_does_not(draw: str) -> None:
    n, runs, alone, guarded = 300, 300, 0, 0
    for run in range(runs):
        rng = np.random.default_rng([3, run])
        if draw == "log-normal":
            loss, truth = rng.lognormal(0, 2, n), math.exp(2)
        else:
            loss, truth = np.where(rng.random(n) < 0.03, rng.lognormal(0, 1, n), rng.normal(0, 0.01, n)), 0.03 * math.exp(0.5)
        zero = np.zeros(n)
        alone += s.bca_upper(loss, zero, confidence=0.95, seed=run, resamples=300) < truth
        guarded += s.mean_upper(loss, zero, confidence=0.95, seed=run, resamples=300) < truth
    assert alone / runs > 0.085
    assert guarded / runs < 0.07


def test_large_samples_take_little_memory_and_keep_the_bound() -> None:
    rng = np.random.default_rng(0)
    loss = rng.exponential(1, 100_000)
    tracemalloc.start()
    got = s.mean_upper(loss, 0 * loss, confidence=0.95, seed=0, resamples=400)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6
    error = float(stats.sem(loss))
    assert loss.mean() + 1.645 * error < got < loss.mean() + 2.6 * error
    bca = s.bca_upper(loss, 0 * loss, confidence=0.95, seed=0, resamples=2000)
    assert bca == pytest.approx(loss.mean() + 1.645 * error, abs=0.15 * error)


def test_pooling_keeps_the_mean_exactly() -> None:
    values = np.random.default_rng(0).normal(size=20_011)
    pooled = s._pooled(values, np.random.default_rng(1))
    assert len(pooled) == 20_000
    assert pooled.mean() == pytest.approx(values.mean(), abs=1e-12)


def test_the_same_seed_gives_the_same_bound() -> None:
    a, b = losses("right", 200), np.zeros(200)
    assert s.mean_upper(a, b, confidence=0.9, seed=3) == s.mean_upper(a, b, confidence=0.9, seed=3)
    assert s.mean_upper(a, b, confidence=0.9, seed=3) != s.mean_upper(a, b, confidence=0.9, seed=4)


def test_ratio_interval_is_the_t_interval() -> None:
    logs = np.random.default_rng(0).normal(0.7, 0.03, 12)
    ratio = s.ratio_interval(logs)
    low, high = stats.t.interval(0.95, 11, loc=logs.mean(), scale=stats.sem(logs))
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx(tuple(np.exp([logs.mean(), low, high])))
    assert s.half_width(logs) == pytest.approx(ratio.high / ratio.value - 1)
    assert s.ratio_interval(np.zeros(8)) == (1, 1, 1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: s.tango_upper(3, 3, 5, confidence=0.95), "add up to at most n"),
        (lambda: s.tango_upper(-1, 0, 5, confidence=0.95), "counts must be >= 0"),
        (lambda: s.tango_upper(0, 0, 0, confidence=0.95), "n >= 1"),
        (lambda: s.tango_upper(0, 0, 5, confidence=0.5), "confidence must be in"),
        (lambda: s.tango_interval(0, 0, 5, confidence=1), "confidence must be in"),
        (lambda: s.bca_upper(np.zeros(1), np.zeros(1), confidence=0.95, seed=0), "at least 2 examples, got 1"),
        (lambda: s.bca_upper_of(lambda _: 0.0, 1, confidence=0.95, seed=0), "at least 2 examples, got 1"),
        (lambda: s.bca_upper(np.array([0, np.nan]), np.zeros(2), confidence=0.95, seed=0), "must be finite, got 1 NaN"),
        (lambda: s.bca_upper(np.zeros(3), np.zeros(2), confidence=0.95, seed=0), "the same examples"),
        (lambda: s.mean_upper(np.ones(9), -np.ones(9), confidence=0.95, seed=0, ceiling=1), "no difference above it"),
        (lambda: s.gaffke_upper(np.array([np.nan]), ceiling=1, confidence=0.95, seed=0), "ceiling must be finite"),
        (lambda: s.ratio_interval(np.zeros(1)), "at least 2 finite numbers"),
        (lambda: s.ratio_interval(np.array([0, np.inf])), "at least 2 finite numbers"),
    ],
)
def test_refusals(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()  # type: ignore[operator]
