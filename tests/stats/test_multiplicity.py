"""Multiple testing, against statsmodels and scipy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from invarlock.core.exceptions import ConfigError, DataError
from invarlock.stats.multiplicity import bh, bonferroni


def p_values(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 60))
    p = np.where(rng.random(n) < 0.3, rng.random(n) * 1e-3, rng.random(n))
    return np.round(p, 3) if seed % 2 else p  # rounding makes ties and zeros


@pytest.mark.slow
@pytest.mark.parametrize("level", [0.05, 6.25e-4, 0.5])
def test_rejections_match_statsmodels_and_scipy(level: float) -> None:
    from scipy.stats import false_discovery_control
    from statsmodels.stats.multitest import multipletests

    rejected = 0
    for seed in range(200):
        p = p_values(seed)
        assert (bh(p, level) == multipletests(p, level, method="fdr_bh")[0]).all()
        assert (bonferroni(p, level) == multipletests(p, level, method="bonferroni")[0]).all()
        adjusted = false_discovery_control(p)
        clear = np.abs(adjusted - level) > 1e-12  # at the level itself scipy's division rounds otherwise
        assert (bh(p, level) == (adjusted <= level))[clear].all()
        rejected += int(bh(p, level).sum())
    assert rejected > 200


@pytest.mark.parametrize("method", [bh, bonferroni])
def test_tests_that_were_left_out_count_as_not_rejected(method: Callable[..., np.ndarray]) -> None:
    for seed in range(50):
        p = p_values(seed)
        padded = np.concatenate([p, np.ones(30)])
        assert (method(p, 0.05, m=p.size + 30) == method(padded, 0.05)[: p.size]).all()


@pytest.mark.slow
def test_bonferroni_holds_the_family_wise_rate_and_bh_the_discovery_rate_on_null_data() -> None:
    null = np.random.default_rng(0).random((4000, 50))
    for method in (bh, bonferroni):  # on null data the two rates are the same thing
        assert np.mean([method(row, 0.05).any() for row in null]) == pytest.approx(0.05, abs=0.011)


def test_the_level_is_inclusive_and_no_p_values_reject_nothing() -> None:
    assert bh([0.05], 0.05).tolist() == bonferroni([0.05], 0.05).tolist() == [True]
    assert bh([], 0.05).shape == bonferroni([], 0.05).shape == (0,)
    assert bh([0.04, 0.05, 0.001], 0.05).tolist() == [True, True, True]  # step-up carries 0.04 along


@pytest.mark.parametrize("method", [bh, bonferroni])
@pytest.mark.parametrize("p", [[0.1, np.nan], [-0.1], [1.1], [[0.1]]])
def test_what_is_no_probability_is_refused(method: Callable[..., np.ndarray], p: list[float]) -> None:
    with pytest.raises(DataError, match="got .*expected"):
        method(p, 0.05)


@pytest.mark.parametrize(("level", "m"), [(0.0, None), (1.0, None), (float("nan"), None), (0.05, 1)])
def test_wrong_settings_are_refused(level: float, m: int | None) -> None:
    with pytest.raises(ConfigError, match="got .*expected"):
        bh([0.1, 0.2], level, m)
