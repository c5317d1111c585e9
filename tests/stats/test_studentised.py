"""The studentised upper end: against a plain reading of its docstring, theory, and what must never happen."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest

from invarlock.core.exceptions import ConfigError, DataError, PairingError
from invarlock.stats.intervals import resample_indices, weighted_mean_interval
from invarlock.stats.studentised import _least_error, studentised_interval, studentised_reach


def skewed(clusters: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Skewed values with a document effect, uneven documents and token counts."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(clusters), rng.geometric(0.4, clusters))
    values = rng.exponential(1.0, clusters)[labels] + rng.normal(0.0, 0.5, len(labels))
    return values, rng.integers(64, 513, len(labels)).astype(float), [f"doc-{i}" for i in labels]


def plain_upper(
    values: np.ndarray, weights: np.ndarray, labels: list[str], level: float, replicates: int, seed: int
) -> float:
    """Bootstrap-t as the textbook has it: a standard error and a quotient of each resampled data set."""
    names = list(dict.fromkeys(labels))
    groups = [np.flatnonzero(np.array(labels) == name) for name in names]

    def mean_and_error(chosen: list[np.ndarray]) -> tuple[float, float]:
        rows = np.concatenate(chosen)
        mean = np.average(values[rows], weights=weights[rows])
        parts = [np.sum(weights[g] * (values[g] - mean)) for g in chosen]
        size = len(chosen)
        return mean, math.sqrt(size / (size - 1) * sum(p * p for p in parts)) / weights[rows].sum()

    estimate, error = mean_and_error(groups)
    least = error * _least_error((1 - level) / 2)
    found = []
    for numbers in np.concatenate(list(resample_indices(len(groups), replicates, seed))):
        mean, spread = mean_and_error([groups[i] for i in numbers])
        found.append((mean - estimate) / max(spread, least))
    return estimate - error * float(np.quantile(found, (1 - level) / 2, method="weibull"))


@pytest.mark.slow
@pytest.mark.parametrize("clusters", [5, 30, 120])
@pytest.mark.parametrize("level", [0.95, 0.98])
def test_upper_end_matches_the_textbook(clusters: int, level: float) -> None:
    data = skewed(clusters, seed=clusters)
    found = studentised_interval(*data, level=level, replicates=600, seed=7)
    upper = plain_upper(*data, level, 600, 7)
    simple = weighted_mean_interval(*data, level=level) if clusters < 100 else None
    assert upper > found.estimate
    assert found.hi == pytest.approx(max(upper, -math.inf if simple is None else simple.hi), rel=1e-9)
    assert found.method == "studentised"


@pytest.mark.parametrize("clusters", [2, 10, 99])
def test_lower_end_is_that_of_cluster_t(clusters: int) -> None:
    data = skewed(clusters, seed=1)
    simple, found = weighted_mean_interval(*data), studentised_interval(*data)
    assert simple.method == "cluster_t"
    assert (found.estimate, found.lo, found.std_error) == (simple.estimate, simple.lo, simple.std_error)
    assert found.hi >= simple.hi


def test_standard_error_matches_statsmodels_at_any_size() -> None:
    from scipy.stats import t
    from statsmodels.regression.linear_model import WLS

    values, weights, labels = skewed(250, seed=5)
    codes = np.unique(labels, return_inverse=True)[1]
    fit = WLS(values, np.ones(len(values)), weights=weights).fit(cov_type="cluster", cov_kwds={"groups": codes})
    found = studentised_interval(values, weights, labels)
    shares = np.bincount(codes, weights=weights) / weights.sum()
    assert found.std_error == pytest.approx(fit.bse[0], rel=1e-10)
    assert found.effective_clusters == pytest.approx(1 / np.sum(shares**2), rel=1e-12)
    half = t.ppf(0.975, 1 / np.sum(shares**2) - 1) * fit.bse[0]
    assert found.lo == pytest.approx(fit.params[0] - half, rel=1e-9)


def test_reach_on_normal_values_is_that_of_student_against_theory() -> None:
    """Of normal samples the quotient follows Student's t, so that the mean reach is its quantile, a little above."""
    from scipy.stats import t

    rng = np.random.default_rng(0)
    values = rng.normal(size=(80, 300))
    reach = studentised_reach(values - values.mean(axis=0), np.ones((80, 300)), tail=0.025, replicates=2000, seed=42)
    assert reach.mean() == pytest.approx(t.ppf(0.975, 79), abs=0.05)
    assert reach.std() < 0.25


def test_many_samples_at_once_are_the_single_ones() -> None:
    rng = np.random.default_rng(3)
    values, sizes = rng.exponential(size=(40, 6)), rng.integers(1, 9, (40, 6)).astype(float)
    residuals = sizes * (values - (sizes * values).sum(axis=0) / sizes.sum(axis=0))
    whole = studentised_reach(residuals, sizes, tail=0.01, replicates=700, seed=3)
    for j in range(6):
        single = studentised_reach(residuals[:, j], sizes[:, j], tail=0.01, replicates=700, seed=3)
        assert single[0] == pytest.approx(whole[j], rel=1e-9)
        found = studentised_interval(values[:, j], sizes[:, j], range(40), level=0.98, replicates=700, seed=3)
        assert found.hi >= found.estimate + found.std_error * whole[j] - 1e-12


@pytest.mark.parametrize("level", [0.95, 0.998])
def test_one_damaged_document_among_silent_ones_has_the_poisson_limit(level: float) -> None:
    from scipy.stats import chi2

    values = np.zeros(60)
    values[17] = 1.0
    found = studentised_interval(values, np.ones(60), range(60), level=level, replicates=3000)
    limit = chi2.ppf((1 + level) / 2, 4) / 2  # of the mean of a Poisson count, one event seen
    assert found.hi == pytest.approx(limit / 60, rel=1e-9)


@pytest.mark.parametrize("hit", [1, 2, 3, 5])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("noise", [0.0, 1e-9, 1e-3])
def test_replicates_without_variance_never_make_the_upper_end_smaller(hit: int, sign: float, noise: float) -> None:
    """Compared with an upper end from which they are left out, and with cluster-t."""
    rng = np.random.default_rng(hit)
    values = noise * rng.normal(size=40)
    values[:hit] = sign * rng.exponential(1.0, hit)
    residuals = values - values.mean()
    error = math.sqrt(40 / 39 * np.sum(residuals**2)) / 40
    rows = np.concatenate(list(resample_indices(40, 1200, 42)))
    spread = residuals[rows].std(axis=1, ddof=1) / math.sqrt(40)
    kept = spread >= _least_error(0.025) * error
    assert not kept.all() if hit == 1 else True
    quotient = residuals[rows].mean(axis=1)[kept] / spread[kept]
    without = values.mean() - error * float(np.quantile(quotient, 0.025, method="weibull"))
    found = studentised_interval(values, np.ones(40), range(40))
    simple = weighted_mean_interval(values, np.ones(40), range(40))
    assert found.hi >= max(without, simple.hi) - 1e-12
    assert math.isfinite(found.hi)


@pytest.mark.parametrize("constant", [0.0, -0.0, 0.1, 1 / 3])
@pytest.mark.parametrize("clusters", [2, 150])
def test_equal_values_give_themselves_exactly(clusters: int, constant: float) -> None:
    found = studentised_interval(np.full(clusters, constant), np.arange(1, clusters + 1) / 7, range(clusters))
    assert (found.estimate, found.lo, found.hi, found.std_error) == (constant, constant, constant, 0.0)
    assert found.degenerate and found.method == "cluster_t"
    assert math.copysign(1.0, found.lo) == 1.0


def test_equal_document_means_keep_cluster_t() -> None:
    found = studentised_interval(np.tile([0.1, 0.3], 120), np.ones(240), np.repeat(np.arange(120), 2).tolist())
    assert found.method == "cluster_t" and not found.degenerate
    assert (found.lo, found.hi) == pytest.approx((0.2, 0.2), abs=1e-12)


@pytest.mark.parametrize("values", [[0.3, 0.1, 0.2], [0.2, 0.2, 0.2]])
def test_one_document_has_an_estimate_and_no_interval(values: list[float]) -> None:
    found = studentised_interval(values, [1, 2, 3], ["a"] * 3)
    assert found.estimate == pytest.approx(np.average(values, weights=[1, 2, 3]))
    assert (found.method, found.effective_clusters) == ("none", 1.0)
    assert math.isnan(found.lo) and math.isnan(found.hi) and math.isnan(found.std_error)


@pytest.mark.parametrize("longest", [50, 400, 10**5, 10**9])
def test_one_dominating_document_widens_the_interval_to_no_bound(longest: int) -> None:
    """93 % of the weight in one document, and more: finite and wide, or no interval, never a narrow one."""
    weights = np.r_[longest, np.ones(29)]
    values = np.random.default_rng(0).normal(size=30)
    found = studentised_interval(values, weights, range(30))
    assert found.effective_clusters == pytest.approx((longest + 29) ** 2 / (longest**2 + 29))
    assert found.method == "none" or found.hi - found.lo > 1.0
    assert math.isfinite(found.estimate)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e308])
@pytest.mark.parametrize("clusters", [1, 5, 120])
def test_a_value_that_is_not_finite_leaves_no_number(bad: float, clusters: int) -> None:
    values = np.zeros(120)
    values[17] = bad
    found = studentised_interval(values, np.full(120, 1e3), (np.arange(120) % clusters).tolist())
    assert found.method == "none"
    assert all(math.isnan(x) for x in (found.estimate, found.lo, found.hi))


def test_extreme_levels_draw_enough_replicates_and_say_so() -> None:
    data = skewed(40)
    assert studentised_interval(*data, replicates=1200).replicates == 1200
    assert studentised_interval(*data, level=0.998, replicates=1200).replicates == 5000
    with pytest.raises(ConfigError, match="at most 0.9999"):
        studentised_interval(*data, level=1 - 1e-9)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"weights": [1.0, 2.0]}, PairingError),
        ({"values": [], "weights": [], "clusters": []}, DataError),
        ({"weights": [1.0, 0.0, 1.0]}, DataError),
        ({"level": 1.0}, ConfigError),
        ({"replicates": 0}, ConfigError),
    ],
)
def test_wrong_input_is_refused(change: dict[str, object], error: type[Exception]) -> None:
    good: dict[str, object] = {"values": [1.0, 2.0, 4.0], "weights": [1.0, 1.0, 2.0], "clusters": ["a", "b", "c"]}
    with pytest.raises(error, match="got .*expected"):
        studentised_interval(**(good | change))  # type: ignore[arg-type]


def test_scale_and_place_move_the_interval_with_them() -> None:
    values, weights, labels = skewed(60)
    one = studentised_interval(values, weights, labels)
    other = studentised_interval(1e-6 * values + 3e-6, 1e3 * weights, labels)
    assert (other.lo, other.hi) == pytest.approx((1e-6 * one.lo + 3e-6, 1e-6 * one.hi + 3e-6), rel=1e-8)
    assert replace(other, estimate=0, lo=0, hi=0, std_error=0, effective_clusters=0) == replace(
        one, estimate=0, lo=0, hi=0, std_error=0, effective_clusters=0
    )


def test_an_interval_is_frozen() -> None:
    """A recorded interval can be derived again, from data that need no generator."""
    values = [((37 * i) % 101) / 101 - 0.4 + (2.0 if i % 50 == 0 else 0.0) for i in range(240)]
    weights = [100 + (29 * i) % 57 for i in range(240)]
    found = studentised_interval(values, weights, [i // 2 for i in range(240)])
    assert (found.estimate, found.lo, found.hi) == pytest.approx(FROZEN_INTERVAL, rel=1e-12)


FROZEN_INTERVAL = (0.13489623187505098, 0.0898225908028624, 0.18519314995194908)


def test_3200_replicates_of_400_documents_take_less_than_a_third_of_a_second() -> None:
    data = skewed(400)
    best = math.inf
    for _ in range(3):
        start = time.process_time()
        studentised_interval(*data, replicates=3200)
        best = min(best, time.process_time() - start)
    assert best <= 0.3
