"""The cluster interval: against scipy, statsmodels, theory and its own written contract."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from invarlock.core.exceptions import ConfigError, DataError, PairingError
from invarlock.stats.intervals import cluster_codes, resample_indices, weighted_mean_interval


def clustered(clusters: int, seed: int = 0, tails: int = 3) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Heavy-tailed values around 0 with a document effect, uneven documents and token counts."""
    rng = np.random.default_rng(seed)
    lengths = rng.geometric(0.4, clusters)
    labels = np.repeat(np.arange(clusters), lengths)
    values = rng.standard_t(tails, clusters)[labels] + 0.5 * rng.standard_t(tails, len(labels))
    return values, rng.integers(64, 513, len(labels)).astype(float), [f"doc-{i}" for i in labels]


def totals(values: np.ndarray, weights: np.ndarray, labels: list[str]) -> tuple[np.ndarray, np.ndarray]:
    codes = cluster_codes(labels)
    return np.bincount(codes, weights=values * weights), np.bincount(codes, weights=weights)


@pytest.mark.parametrize("clusters", [100, 173, 400])
@pytest.mark.parametrize("method", ["BCa", "percentile"])
def test_interval_from_the_same_draws_matches_scipy(clusters: int, method: str) -> None:
    from scipy.stats import bootstrap

    values, weights, labels = clustered(clusters)
    sums, sizes = totals(values, weights, labels)

    def ratio(rows: np.ndarray, axis: int = -1) -> np.ndarray:
        return sums[rows].sum(axis=axis) / sizes[rows].sum(axis=axis)

    numbers = (np.arange(clusters),)
    seen = bootstrap(numbers, ratio, n_resamples=9, vectorized=True, method="percentile")
    seen.bootstrap_distribution = ratio(np.concatenate(list(resample_indices(clusters, 2000, 7))))
    theirs = bootstrap(
        numbers, ratio, n_resamples=0, bootstrap_result=seen, vectorized=True, method=method
    ).confidence_interval
    ours = weighted_mean_interval(values, weights, labels, replicates=2000, seed=7, bca=method == "BCa")
    assert ours.method == method.lower()
    assert (ours.lo, ours.hi) == pytest.approx((theirs.low, theirs.high), rel=1e-10)


def test_bca_from_other_draws_matches_scipy_within_monte_carlo_error() -> None:
    from scipy.stats import bootstrap

    values, weights, labels = clustered(150, seed=3)
    sums, sizes = totals(values, weights, labels)
    theirs = bootstrap(
        (np.arange(150),),
        lambda rows, axis: sums[rows].sum(axis=axis) / sizes[rows].sum(axis=axis),
        n_resamples=20000, vectorized=True, batch=2000, method="BCa", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    ours = weighted_mean_interval(values, weights, labels, replicates=20000)
    # a 2.5 % quantile of 20000 draws has a standard error near 0.02 of the spread, twice in a difference, plus z0's
    assert (ours.lo, ours.hi) == pytest.approx((theirs.low, theirs.high), abs=0.12 * ours.std_error)


@pytest.mark.slow
@pytest.mark.parametrize("clusters", [2, 10, 99, 150])
def test_standard_error_matches_statsmodels_cluster_robust_regression(clusters: int) -> None:
    from scipy.stats import t
    from statsmodels.regression.linear_model import WLS

    values, weights, labels = clustered(clusters, seed=clusters)
    codes = cluster_codes(labels)
    fit = WLS(values, np.ones(len(values)), weights=weights).fit(
        cov_type="cluster", cov_kwds={"groups": codes, "df_correction": True}, use_t=True
    )
    ours = weighted_mean_interval(values, weights, labels)
    assert ours.estimate == pytest.approx(fit.params[0], rel=1e-10)
    assert ours.std_error == pytest.approx(fit.bse[0], rel=1e-10)
    if clusters < 100:
        shares = totals(values, weights, labels)[1] / weights.sum()
        half = t.ppf(0.975, 1.0 / np.sum(shares**2) - 1.0) * fit.bse[0]
        assert ours.method == "cluster_t"
        assert (ours.lo, ours.hi) == pytest.approx((fit.params[0] - half, fit.params[0] + half), rel=1e-8)


@pytest.mark.parametrize("clusters", [2, 10, 99])
def test_interval_of_equal_clusters_matches_statsmodels(clusters: int) -> None:
    from statsmodels.regression.linear_model import OLS

    values = np.random.default_rng(0).normal(size=3 * clusters)
    codes = np.arange(3 * clusters) // 3
    fit = OLS(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds={"groups": codes}, use_t=True)
    ours = weighted_mean_interval(values, np.full(3 * clusters, 17), codes.tolist())
    assert (ours.lo, ours.hi) == pytest.approx(tuple(fit.conf_int(0.05)[0]), rel=1e-8)


@pytest.mark.parametrize(("longest", "method"), [(1, "bca"), (12, "bca"), (30, "cluster_t"), (1000, "cluster_t")])
def test_bca_needs_clusters_of_weight_not_just_many(longest: int, method: str) -> None:
    """150 documents, one of them `longest` times the others: too few effective clusters leave cluster-t."""
    labels = [0] * longest + list(range(1, 150))
    values = np.random.default_rng(1).normal(size=len(labels))
    assert weighted_mean_interval(values, np.ones(len(labels)), labels).method == method


@pytest.mark.slow
def test_ci_covers_where_one_document_holds_most_tokens() -> None:
    """The document is one draw; G - 1 degrees of freedom would cover 0.04 here. Too wide is the safe side."""
    rng = np.random.default_rng(0)
    labels = [0] * 200 + list(range(1, 10))
    hits = 0
    for _ in range(500):
        values = rng.normal(size=10)[labels] + 0.5 * rng.normal(size=len(labels))
        found = weighted_mean_interval(values, np.ones(len(labels)), labels)
        hits += not (found.lo > 0.0 or found.hi < 0.0)
    assert hits / 500 >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tails", "clusters", "simulations", "at_least"),
    [(3, 10, 1500, 0.93), (3, 40, 1500, 0.93), (50, 150, 800, 0.905), (3, 150, 800, 0.88)],
)
def test_ci_covers_at_nominal_rate(tails: int, clusters: int, simulations: int, at_least: float) -> None:
    """Student values of `tails` degrees of freedom, uneven documents, truth 0.

    `at_least` lies two to three binomial standard errors under the rate of a longer simulation: cluster-t reaches the
    nominal 0.95, BCa 0.925 with light and 0.91 with heavy tails.
    """
    found = [
        weighted_mean_interval(*clustered(clusters, 10_000 + i, tails), seed=i, replicates=1000)
        for i in range(simulations)
    ]
    covers = np.mean([f.lo <= 0.0 <= f.hi for f in found])
    assert at_least <= covers <= 0.975
    methods = [f.method for f in found]
    assert methods.count("bca" if clusters >= 100 else "cluster_t") >= 0.9 * simulations


def test_documents_not_windows_are_resampled() -> None:
    """Ten equal copies of every window in its document carry no information: the interval must not shrink."""
    rng = np.random.default_rng(0)
    one = rng.normal(size=150)
    single = weighted_mean_interval(one, np.ones(150), range(150))
    copied = weighted_mean_interval(np.repeat(one, 10), np.ones(1500), np.repeat(np.arange(150), 10).tolist())
    naive = weighted_mean_interval(np.repeat(one, 10), np.ones(1500), range(1500))
    assert (copied.lo, copied.hi) == pytest.approx((single.lo, single.hi), rel=1e-9)
    assert naive.hi - naive.lo < 0.4 * (single.hi - single.lo)


@pytest.mark.parametrize("clusters", [2, 50, 99, 100, 300])
@pytest.mark.parametrize("constant", [0.0, -0.0, 0.1, 1 / 3])
def test_equal_values_give_themselves_exactly(clusters: int, constant: float) -> None:
    weights = np.random.default_rng(0).integers(1, 999, clusters) / 7.0
    found = weighted_mean_interval(np.full(clusters, constant), weights, range(clusters))
    assert (found.estimate, found.lo, found.hi, found.std_error) == (constant, constant, constant, 0.0)
    assert found.degenerate
    assert found.method == ("percentile" if clusters >= 100 else "cluster_t")
    assert math.copysign(1.0, found.lo) == 1.0


def test_equal_cluster_means_fall_back_to_percentile_without_being_called_degenerate() -> None:
    values = np.tile([0.1, 0.3], 120)
    found = weighted_mean_interval(values, np.ones(240), np.repeat(np.arange(120), 2).tolist())
    assert found.method == "percentile"
    assert not found.degenerate
    assert (found.lo, found.hi) == pytest.approx((0.2, 0.2), abs=1e-12)


@pytest.mark.parametrize("values", [[0.3, 0.1, 0.2], [0.2, 0.2, 0.2]])
def test_one_cluster_has_an_estimate_and_no_interval(values: list[float]) -> None:
    found = weighted_mean_interval(values, [1, 2, 3], ["a"] * 3)
    assert found.estimate == pytest.approx(np.average(values, weights=[1, 2, 3]))
    assert found.method == "none"
    assert math.isnan(found.lo) and math.isnan(found.hi) and math.isnan(found.std_error)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e308])
@pytest.mark.parametrize("clusters", [1, 5, 120])
def test_a_value_that_is_not_finite_leaves_no_number(bad: float, clusters: int) -> None:
    values = np.zeros(120)
    values[17] = bad
    found = weighted_mean_interval(values, np.full(120, 1e3), (np.arange(120) % clusters).tolist())
    assert found.method == "none"
    assert all(math.isnan(x) for x in (found.estimate, found.lo, found.hi))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"weights": [1.0, 2.0]}, PairingError),
        ({"clusters": ["a", "b"]}, PairingError),
        ({"values": [[1.0, 2.0, 3.0]]}, PairingError),
        ({"values": [], "weights": [], "clusters": []}, DataError),
        ({"weights": [1.0, 0.0, 1.0]}, DataError),
        ({"weights": [1.0, -1.0, 1.0]}, DataError),
        ({"weights": [1.0, math.nan, 1.0]}, DataError),
        ({"level": 0.0}, ConfigError),
        ({"level": 1.0}, ConfigError),
        ({"level": math.nan}, ConfigError),
        ({"replicates": 0}, ConfigError),
        ({"seed": -1}, ConfigError),
    ],
)
def test_wrong_input_is_refused(change: dict[str, object], error: type[Exception]) -> None:
    good: dict[str, object] = {"values": [1.0, 2.0, 4.0], "weights": [1.0, 1.0, 2.0], "clusters": ["a", "b", "c"]}
    with pytest.raises(error, match="got .*expected"):
        weighted_mean_interval(**(good | change))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("clusters", [1, 2, 3, 97, 400, 70_001])
def test_the_stream_follows_its_written_mapping(clusters: int) -> None:
    """An independent reading of the docstring in plain integers, across the edges of chunks."""
    replicates = 3 if clusters > 400 else 5000
    rows = np.concatenate(list(resample_indices(clusters, replicates, 42)))
    assert rows.shape == (replicates, clusters)
    raw = np.random.PCG64(np.random.SeedSequence(42)).random_raw(replicates * clusters).tolist()
    assert rows.ravel().tolist() == [((r >> 32) * clusters) // 2**32 for r in raw]


def test_the_stream_is_frozen() -> None:
    """Numbers written down once: they change only if numpy breaks the guarantee of PCG64, or we the contract."""
    assert next(resample_indices(400, 1, 42))[0, :12].tolist() == FROZEN_400
    assert next(resample_indices(100, 1, 0))[0, :12].tolist() == FROZEN_100


FROZEN_400 = [309, 175, 343, 278, 37, 390, 304, 314, 51, 180, 148, 370]
FROZEN_100 = [63, 26, 4, 1, 81, 91, 60, 72, 54, 93, 81, 0]


def test_an_interval_is_frozen() -> None:
    """A recorded interval can be derived again, from data that need no generator."""
    values = [((37 * i) % 101) / 101 - 0.4 + (2.0 if i % 50 == 0 else 0.0) for i in range(240)]
    weights = [100 + (29 * i) % 57 for i in range(240)]
    found = weighted_mean_interval(values, weights, [i // 2 for i in range(240)])
    assert found == weighted_mean_interval(values, weights, [i // 2 for i in range(240)])
    assert found.method == "bca"
    assert (found.estimate, found.lo, found.hi) == pytest.approx(FROZEN_INTERVAL, rel=1e-12)


FROZEN_INTERVAL = (0.13489623187505098, 0.09498153326270699, 0.18578177460193185)


def test_label_types_do_not_matter_but_the_seed_does() -> None:
    values, weights, labels = clustered(120)
    found = weighted_mean_interval(values, weights, labels)
    assert weighted_mean_interval(values, weights, [hash(x) for x in labels]) == found
    other = weighted_mean_interval(values, weights, labels, seed=43)
    assert (other.lo, other.hi) != (found.lo, found.hi)
    assert replace(other, lo=0.0, hi=0.0, seed=0) == replace(found, lo=0.0, hi=0.0, seed=0)


def test_every_draw_is_equally_likely() -> None:
    from scipy.stats import chisquare

    counts = np.zeros(400)
    for rows in resample_indices(400, 2000, 1):
        counts += np.bincount(rows.ravel(), minlength=400)
    assert chisquare(counts).pvalue > 1e-4
