"""Tail statistics of per-window differences and their gate."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from invarlock.core.exceptions import ConfigError, DataError, PairingError
from invarlock.stats.intervals import cluster_codes, resample_indices
from invarlock.stats.tail import tail_gate, tail_statistics

POLICY = {"mode": "fail", "min_windows": 50, "quantile": 0.95, "quantile_max": 0.2, "epsilon": 0.1, "mass_max": 0.1}


def test_quantiles_are_numpys_linear_ones() -> None:
    delta = np.random.default_rng(0).standard_t(3, 217)
    found = tail_statistics(delta, epsilon=0.5, quantile=0.9)
    expected = np.quantile(delta, [0.5, 0.9, 0.95, 0.99, 0.9], method="linear")
    assert (found.q50, found.q90, found.q95, found.q99, found.value) == pytest.approx(tuple(expected), rel=1e-14)
    assert found.max == delta.max()
    assert found.tail_mass == np.mean(delta > 0.5)
    assert (found.windows, found.clusters, found.non_finite) == (217, 217, 0)


@pytest.mark.slow
@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.95])
def test_interval_matches_resampling_spelled_out(quantile: float) -> None:
    """The multiplicities give what concatenating the drawn documents and calling numpy gives."""
    rng = np.random.default_rng(1)
    documents = np.repeat(np.arange(30), rng.integers(1, 6, 30))
    delta = np.round(rng.normal(size=len(documents)), 1)  # with ties
    codes = cluster_codes(documents.tolist())
    draws = [
        np.quantile(np.concatenate([delta[codes == c] for c in row]), quantile)
        for chunk in resample_indices(30, 500, 9)
        for row in chunk
    ]
    found = tail_statistics(
        delta, epsilon=0.1, documents=documents.tolist(), quantile=quantile, level=0.9, replicates=500, seed=9
    )
    assert (found.lo, found.hi) == pytest.approx(tuple(np.quantile(draws, [0.05, 0.95])), abs=1e-12)


@pytest.mark.slow
def test_quantile_interval_covers_at_about_the_nominal_rate() -> None:
    """q95 of 200 exponential windows; the truth is log 20. A percentile bootstrap of a quantile is a little short."""
    rng = np.random.default_rng(3)
    hits = 0
    for i in range(400):
        found = tail_statistics(rng.exponential(size=200), epsilon=1.0, replicates=500, seed=i)
        hits += found.lo <= math.log(20) <= found.hi
    assert 0.90 <= hits / 400 <= 0.98


def test_identical_models_have_no_tail() -> None:
    found = tail_statistics(np.zeros(60), epsilon=0.1)
    assert {found.q50, found.q99, found.max, found.value, found.lo, found.hi, found.tail_mass} == {0.0}
    assert tail_gate(found, POLICY).status == "pass"


def test_one_document_has_no_interval() -> None:
    found = tail_statistics(np.arange(60.0), epsilon=0.1, documents=["a"] * 60)
    assert math.isnan(found.lo) and math.isnan(found.hi)
    assert found.clusters == 1 and found.q50 == 29.5


@pytest.mark.parametrize("mode", ["warn", "fail"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_difference_that_is_not_finite_fails_even_as_a_warning(mode: str, bad: float) -> None:
    delta = np.zeros(60)
    delta[5] = bad
    found = tail_statistics(delta, epsilon=0.1)
    assert found.non_finite == 1 and math.isnan(found.q50) and math.isnan(found.tail_mass)
    gate = tail_gate(found, POLICY | {"mode": mode})
    assert (gate.acceptable, gate.status) == (False, "fail")
    assert "1 of 60" in gate.reason


@pytest.mark.parametrize(
    ("size", "policy", "evaluated", "acceptable", "status"),
    [
        (0.01, {}, True, True, "pass"),
        (0.01, {"mass_max": None}, True, True, "pass"),
        (0.5, {}, True, False, "fail"),
        (0.5, {"mode": "warn"}, True, False, "warn"),
        (0.5, {"mode": "off"}, False, True, "off"),
        (0.15, {}, True, False, "fail"),
        (0.15, {"mass_max": None}, True, True, "pass"),
        (0.01, {"min_windows": 61}, False, False, "inconclusive"),
        (0.01, {"min_windows": 61, "mode": "warn"}, False, False, "warn"),
        (0.01, {"quantile_max": None}, True, False, "fail"),
        (0.01, {"quantile_max": math.nan}, True, False, "fail"),
        (0.01, {"mass_max": math.nan}, True, False, "fail"),
        (0.01, {"min_windows": math.nan}, False, False, "inconclusive"),
    ],
)
def test_gate_follows_its_policy(
    size: float, policy: dict[str, Any], evaluated: bool, acceptable: bool, status: str
) -> None:
    delta = np.where(np.arange(60) % 5 == 0, size, 0.0)
    gate = tail_gate(tail_statistics(delta, epsilon=0.1), POLICY | policy)
    assert (gate.evaluated, gate.acceptable, gate.status) == (evaluated, acceptable, status)
    assert gate.reason


def test_a_missing_limit_never_passes() -> None:
    found = tail_statistics(np.zeros(60), epsilon=0.1)
    assert not tail_gate(found, {"mode": "warn"}).acceptable


@pytest.mark.parametrize("policy", [{"mode": "soft"}, {"quantile": 0.9}, {"epsilon": 0.2}])
def test_a_policy_that_does_not_fit_the_statistics_is_refused(policy: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        tail_gate(tail_statistics(np.zeros(60), epsilon=0.1), POLICY | policy)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(PairingError):
        tail_statistics(np.zeros(3), epsilon=0.1, documents=["a"])
    with pytest.raises(DataError):
        tail_statistics([], epsilon=0.1)
    with pytest.raises(ConfigError):
        tail_statistics(np.zeros(3), epsilon=0.1, quantile=1.0)


def test_the_tail_shows_what_the_mean_hides() -> None:
    hurt = np.where(np.arange(200) % 12 == 0, 0.9, 0.0)
    found = tail_statistics(hurt, epsilon=0.1)
    assert hurt.mean() < math.log(1.1)
    assert tail_gate(found, POLICY).status == "fail"
    assert tail_gate(replace(found, value=0.1), POLICY).acceptable
