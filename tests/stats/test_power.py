"""Detectable effects and documents: against scipy's and statsmodels' noncentral t, simulation, and the edges."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from invarlock.core.exceptions import ConfigError
from invarlock.stats.intervals import Interval
from invarlock.stats.power import AT_THE_LIMIT, documents_needed, minimum_detectable_effect
from invarlock.stats.studentised import studentised_interval


def interval(estimate: float, error: float, documents: int, *, level: float = 0.95, wider: float = 1.0) -> Interval:
    from scipy.stats import t

    half = float(t.ppf((1 + level) / 2, documents - 1)) * error if documents > 1 else math.nan
    return Interval(estimate, estimate - half, estimate + wider * half, level, "studentised", 1200, 42, documents, False,
                    error, float(documents))  # fmt: skip


@pytest.mark.parametrize("documents", [2, 5, 30, 400])
@pytest.mark.parametrize("level", [0.95, 0.998])
@pytest.mark.parametrize("power", [0.8, 0.9])
def test_effect_matches_the_noncentral_t_of_scipy(documents: int, level: float, power: float) -> None:
    from scipy.stats import nct, t

    found = minimum_detectable_effect(interval(0.3, 0.02, documents, level=level), power=power)
    assert found is not None
    quantile = t.ppf((1 + level) / 2, documents - 1)
    assert nct.sf(quantile, documents - 1, found / 0.02) == pytest.approx(power, abs=1e-4)


@pytest.mark.parametrize("documents", [10, 80])
def test_effect_matches_the_power_of_statsmodels(documents: int) -> None:
    from statsmodels.stats.power import TTestPower

    theirs = TTestPower().solve_power(nobs=documents, alpha=0.025, power=0.8, alternative="larger")
    ours = minimum_detectable_effect(interval(0.0, 1 / math.sqrt(documents), documents))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_documents_match_the_sample_size_of_statsmodels() -> None:
    from statsmodels.stats.power import TTestPower

    for gap in (0.25, 0.4, 1.0):
        theirs = TTestPower().solve_power(effect_size=gap, alpha=0.025, power=0.8, alternative="larger")
        found = documents_needed(interval(0.0, 1 / math.sqrt(10), 10), gap, gap + 0.1)
        assert found.documents == max(math.ceil(theirs), 11)
        mirrored = documents_needed(interval(0.5 + gap, 1 / math.sqrt(10), 10), 0.2, 0.5)
        assert mirrored.documents == found.documents


@pytest.mark.slow
def test_the_effect_is_decided_with_the_power_stated() -> None:
    """3000 normal samples whose truth lies the effect inside the limit."""
    rng = np.random.default_rng(0)
    effect = minimum_detectable_effect(interval(0.0, 1 / math.sqrt(30), 30))
    assert effect is not None
    found = [
        studentised_interval(row - effect, np.ones(30), range(30), replicates=400).hi <= 0
        for row in rng.normal(size=(3000, 30))
    ]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)  # the larger of two ends costs up to 2 %


def test_a_longer_reach_needs_a_larger_effect_and_more_documents() -> None:
    plain, skewed = interval(0.0, 0.1, 40), interval(0.0, 0.1, 40, wider=1.8)
    assert minimum_detectable_effect(skewed) > 1.3 * minimum_detectable_effect(plain)  # type: ignore[operator]
    few, more = (documents_needed(x, 0.15, 0.2).documents for x in (plain, skewed))
    assert few is not None and more is not None and 40 < few < more < 2 * few


def test_an_estimate_at_the_limit_is_said_to_be_so() -> None:
    at = interval(0.1, 0.02, 50)
    for passes, fails in ((0.1, 0.102), (0.0999, 0.102), (0.1001, 0.102), (0.09, 0.0999), (0.05, 0.15)):
        assert documents_needed(at, passes, fails) == (None, AT_THE_LIMIT)
    assert documents_needed(at, 0.2, 0.21).documents == 51
    far = documents_needed(at, 0.11, 0.12)
    assert far.documents is not None and 51 < far.documents <= 5000
    assert documents_needed(at, 0.11, 0.12, largest=2) == (None, AT_THE_LIMIT)


@pytest.mark.parametrize("heaviest", [1, 29, 400, 10**6, 10**12])
@pytest.mark.parametrize("documents", [1, 2, 30])
def test_every_figure_is_finite_or_absent(heaviest: int, documents: int) -> None:
    """One dominating document once made an infinite effect, which JSON cannot hold."""
    weights = np.r_[heaviest, np.ones(documents - 1)]
    found = studentised_interval(np.random.default_rng(1).normal(size=documents), weights, range(documents))
    effect, needed = minimum_detectable_effect(found), documents_needed(found, 3.0, 3.1)
    json.dumps([effect, needed], allow_nan=False)
    if found.effective_clusters is not None and found.effective_clusters < 1.99:
        assert effect is None and needed.documents is None
        assert "documents" in needed.reason


def test_equal_values_need_no_effect() -> None:
    same = studentised_interval(np.zeros(20), np.ones(20), range(20))
    assert minimum_detectable_effect(same) == 0.0


def test_a_value_that_is_not_finite_has_no_figures() -> None:
    lost = studentised_interval([math.nan, *[0.0] * 19], np.ones(20), range(20))
    assert minimum_detectable_effect(lost) is None
    assert documents_needed(lost, 0.1, 0.2).documents is None


def test_wrong_input_is_refused() -> None:
    at = interval(0.1, 0.02, 50)
    with pytest.raises(ConfigError, match="got power"):
        minimum_detectable_effect(at, power=0.3)
    for passes, fails in ((0.2, 0.1), (math.nan, 0.1), (0.1, math.inf)):
        with pytest.raises(ConfigError, match="got limits"):
            documents_needed(at, passes, fails)
