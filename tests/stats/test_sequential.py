"""Looks and their levels: against the published constants, another integration, and a simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from invarlock.core.exceptions import ConfigError
from invarlock.stats.sequential import ERROR, FRACTIONS, looks, spending_levels


def test_levels_are_the_constants_of_the_contract() -> None:
    from scipy.special import ndtri

    levels = spending_levels(FRACTIONS)
    assert [round(x, 5) for x in levels] == [0.00100, 0.00332, 0.00990, 0.01903]
    assert [round(-float(ndtri(x)), 4) for x in levels] == [3.0902, 2.7141, 2.3301, 2.0741]


@pytest.mark.slow
@pytest.mark.parametrize("fractions", [FRACTIONS, (0.5, 1.0), (0.3, 0.35, 0.9), (0.1, 0.25, 0.5, 0.75, 1.0)])
def test_the_error_spent_by_each_look_matches_the_multivariate_normal(fractions: tuple[float, ...]) -> None:
    """The statistics of the looks are jointly normal with correlations sqrt(t_i / t_j)."""
    from scipy.stats import multivariate_normal, norm

    t = np.array(fractions)
    correlation = np.sqrt(np.minimum.outer(t, t) / np.maximum.outer(t, t))
    bounds = norm.isf(spending_levels(fractions))
    for k in range(1, len(t) + 1):
        kept = multivariate_normal(cov=correlation[:k, :k], seed=1).cdf(bounds[:k]) if k > 1 else norm.cdf(bounds[0])
        assert 1.0 - kept == pytest.approx(ERROR * t[k - 1] ** 2, abs=3e-5)


def test_the_error_spent_in_all_matches_simulation() -> None:
    rng = np.random.default_rng(0)
    steps = np.diff(FRACTIONS, prepend=0.0)
    paths = np.cumsum(rng.normal(size=(400_000, 4)) * np.sqrt(steps), axis=1) / np.sqrt(FRACTIONS)
    from scipy.special import ndtri

    crossed = (paths > -ndtri(spending_levels(FRACTIONS))).any(axis=1).mean()
    assert crossed == pytest.approx(ERROR, abs=4 * math.sqrt(ERROR / 400_000))


def test_many_looks_still_spend_the_error_and_one_spends_all() -> None:
    assert spending_levels([1.0]) == pytest.approx((ERROR,), abs=1e-12)
    many = spending_levels([i / 50 for i in range(1, 51)])
    assert all(a < b for a, b in zip(many, many[1:], strict=False))
    assert 0.01 < many[-1] < 0.015


@pytest.mark.parametrize(
    ("planned", "minimum", "expected"),
    [
        (1000, 30, [200, 400, 700, 1000]),
        (400, 30, [80, 160, 280, 400]),
        (101, 1, [21, 41, 71, 101]),
        (60, 30, [30, 42, 60]),
        (40, 30, [30, 40]),
        (30, 30, [30]),
        (12, 30, [12]),
        (1, 1, [1]),
        (3, 1, [1, 2, 3]),
    ],
)
def test_looks_keep_the_minimum(planned: int, minimum: int, expected: list[int]) -> None:
    found = looks(planned, minimum)
    assert [look.documents for look in found] == expected
    assert all(0.0 < look.level <= ERROR + 1e-12 for look in found)
    assert [look.level for look in found] == list(spending_levels([n / planned for n in expected]))


def test_levels_of_whole_documents_are_those_of_the_shares() -> None:
    assert [round(look.level, 5) for look in looks(1000, 30)] == [0.00100, 0.00332, 0.00990, 0.01903]


@pytest.mark.parametrize("fractions", [[], [0.5, 0.5], [0.5, 0.4], [0.0, 1.0], [0.5, 1.1], [math.nan]])
def test_fractions_that_do_not_rise_are_refused(fractions: list[float]) -> None:
    with pytest.raises(ConfigError, match="expected rising"):
        spending_levels(fractions)


def test_other_wrong_input_is_refused() -> None:
    for planned, minimum in ((0, 1), (5, 0)):
        with pytest.raises(ConfigError, match="expected at least 1"):
            looks(planned, minimum)
    with pytest.raises(ConfigError):
        spending_levels([1.0], error=0.5)
