"""Tango's interval: against published examples, brute force, McNemar, and coverage at the floor."""

from __future__ import annotations

import math

import numpy as np
import pytest

from invarlock.core.exceptions import ConfigError, DataError, PairingError
from invarlock.stats.paired import accuracy_paired, decide_lower_pp
from invarlock.stats.proportions import accuracy_score_paired, score_interval


@pytest.mark.parametrize(
    ("counts", "level", "expected"),
    [
        # airway hyper-responsiveness before and after transplantation, in Fagerland, Lydersen & Laake (2014)
        ((1, 1, 7, 12), 0.95, (0.026, 0.517)),
        # complete response before and after consolidation, in the same authors' book, chapter 8
        ((59, 6, 16, 80), 0.95, (0.0054, 0.1240)),
        # R's PropCIs::scoreci.mp(25, 28, 618) at 90 %
        ((300, 25, 28, 265), 0.90, (-0.0148, 0.0247)),
    ],
)
def test_interval_matches_published_examples(
    counts: tuple[int, int, int, int], level: float, expected: tuple[float, float]
) -> None:
    digits = 3 if sum(counts) == 21 else 4
    assert tuple(round(x, digits) for x in score_interval(*counts, level=level)) == expected


def brute_force(n10: int, n01: int, n: int, z: float) -> tuple[float, float]:
    """Invert the score test with a numerical likelihood, nothing solved by hand."""
    from scipy.optimize import brentq, minimize_scalar
    from scipy.special import xlogy

    def statistic(delta: float) -> float:
        def minus_log_likelihood(p10: float) -> float:
            p01 = p10 + delta
            return -(xlogy(n10, p10) + xlogy(n01, p01) + xlogy(n - n10 - n01, 1 - p10 - p01))

        low, high = max(0.0, -delta), (1.0 - delta) / 2.0
        p10 = minimize_scalar(minus_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-13}).x
        return (n01 - n10 - n * delta) / math.sqrt(n * (2 * p10 + delta - delta**2))

    estimate, edge = (n01 - n10) / n, 1 - 1e-9
    return (
        brentq(lambda d: statistic(d) - z, -edge, estimate, xtol=1e-12),
        brentq(lambda d: statistic(d) + z, estimate, edge, xtol=1e-12),
    )


@pytest.mark.parametrize(("n10", "n01", "n"), [(3, 9, 40), (20, 40, 160), (1, 0, 200), (7, 2, 50), (60, 61, 400)])
@pytest.mark.parametrize("effect", [1.0, 2.5])
def test_interval_matches_a_numerical_inversion(n10: int, n01: int, n: int, effect: float) -> None:
    from scipy.stats import norm

    found = score_interval(n - n10 - n01, n10, n01, 0, level=0.98, design_effect=effect)
    assert found == pytest.approx(brute_force(n10, n01, n, norm.ppf(0.99) * math.sqrt(effect)), abs=2e-6)


@pytest.mark.parametrize(("n10", "n01"), [(5, 17), (12, 3), (40, 22)])
def test_an_end_meets_zero_at_the_level_of_mcnemar(n10: int, n01: int) -> None:
    """Under no difference the score test is McNemar's, here statsmodels'."""
    from statsmodels.stats.contingency_tables import mcnemar

    p = mcnemar([[50, n10], [n01, 50]], exact=False, correction=False).pvalue
    found = score_interval(50, n10, n01, 50, level=1 - p)
    assert min(map(abs, found)) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("n", [1, 30, 200, 5000])
def test_no_discordant_example_is_no_certainty(n: int) -> None:
    z2 = 1.959963984540054**2
    assert score_interval(n, 0, 0, 0) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)), rel=1e-12)


def test_bounds_are_shares_mirror_and_shrink() -> None:
    assert score_interval(0, 0, 5, 0)[1] == 1.0
    assert score_interval(0, 5, 0, 0)[0] == -1.0
    lo, hi = score_interval(30, 4, 9, 57)
    assert score_interval(57, 9, 4, 30) == pytest.approx((-hi, -lo), abs=1e-15)
    assert score_interval(30 / 3, 4 / 3, 9 / 3, 57 / 3) == pytest.approx(
        score_interval(30, 4, 9, 57, design_effect=3.0), abs=1e-12
    )


@pytest.mark.parametrize(
    ("counts", "more", "error"),
    [
        ((1, 1, -1, 1), {}, DataError),
        ((0, 0, 0, 0), {}, DataError),
        ((1, math.nan, 1, 1), {}, DataError),
        ((1, math.inf, 1, 1), {}, DataError),
        ((1, 1, 1, 1), {"level": 1.0}, ConfigError),
        ((1, 1, 1, 1), {"design_effect": 0.9}, ConfigError),
        ((1, 1, 1, 1), {"design_effect": math.nan}, ConfigError),
    ],
)
def test_wrong_input_is_refused(
    counts: tuple[float, float, float, float], more: dict[str, float], error: type[Exception]
) -> None:
    with pytest.raises(error, match="got .*expected"):
        score_interval(*counts, **more)


def answers(n: int, lost: int, won: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    before = np.random.default_rng(seed).integers(0, 2, n)
    before[:lost], before[lost : lost + won] = 1, 0
    after = before.copy()
    after[: lost + won] = 1 - before[: lost + won]
    return before, after


def test_examples_of_their_own_give_tangos_interval() -> None:
    before, after = answers(300, 12, 5)
    found = accuracy_score_paired(before, after, range(300))
    lo, hi = score_interval(283, 12, 5, 0)
    assert (found.interval.lo, found.interval.hi) == pytest.approx((100 * lo, 100 * hi), rel=1e-12)
    assert (found.design_effect, found.interval.method, found.interval.degenerate) == (1.0, "score", False)
    other = accuracy_paired(before, after, range(300))
    for name in ("delta_pp", "mcnemar_p", "right_to_wrong", "wrong_to_right", "n"):
        assert getattr(found, name) == getattr(other, name)
    z = 1.959963984540054
    assert found.interval.std_error == pytest.approx(100 * (hi - lo) / (2 * z))


def test_of_many_discordant_examples_score_and_wald_are_one() -> None:
    before, after = answers(6000, 900, 800)
    score, wald = (
        accuracy_score_paired(before, after, range(6000)),
        accuracy_paired(before, after, range(6000), bca=False),
    )
    assert score.interval.std_error == pytest.approx(wald.interval.std_error, rel=0.01)
    assert (score.interval.lo, score.interval.hi) == pytest.approx((wald.interval.lo, wald.interval.hi), abs=0.1)


def test_two_hundred_equal_answers_do_not_pass_the_tightest_floor() -> None:
    """The rule before read zero discordant answers as certainty."""
    same = np.ones(200)
    before = accuracy_paired(same, same, range(200))
    assert decide_lower_pp(before.interval, -0.5, n_windows=200).status == "pass"
    found = accuracy_score_paired(same, same, range(200))
    assert decide_lower_pp(found.interval, -0.5, n_windows=200).status == "inconclusive"
    assert decide_lower_pp(found.interval, -2.0, n_windows=200).status == "pass"


def test_copies_in_a_document_carry_no_information() -> None:
    """Each example five times over: the design effect brings the width of the single ones back, and a little more."""
    before, after = answers(400, 60, 20)
    one = accuracy_score_paired(before, after, range(400)).interval
    five = accuracy_score_paired(np.repeat(before, 5), np.repeat(after, 5), np.repeat(np.arange(400), 5).tolist())
    assert five.design_effect == pytest.approx(5.0, rel=0.01)
    assert five.interval.hi - five.interval.lo == pytest.approx(one.hi - one.lo, rel=0.02)
    assert five.interval.effective_clusters == pytest.approx(400)


def test_without_discordant_examples_documents_count_as_one_answer_each() -> None:
    same = np.ones(200)
    found = accuracy_score_paired(same, same, (np.arange(200) // 10).tolist())
    assert found.design_effect == pytest.approx(10.0)
    assert found.interval.hi > 15.0


def test_design_effect_is_the_ratio_of_variances_of_statsmodels() -> None:
    from statsmodels.regression.linear_model import OLS

    rng = np.random.default_rng(4)
    codes = np.arange(3000) // 6
    after = np.where(rng.random(500)[codes] < 0.5, rng.random(3000) < 0.8, rng.random(3000) < 0.2).astype(float)
    before = (rng.random(3000) < 0.5).astype(float)
    model = OLS(after - before, np.ones(3000))
    robust = model.fit(cov_type="cluster", cov_kwds={"groups": codes, "df_correction": True}).bse[0]
    ratio = (robust / model.fit().bse[0]) ** 2
    found = accuracy_score_paired(before, after, codes.tolist())
    discordant = np.abs(after - before).sum()
    assert ratio > 1.3
    assert found.design_effect == pytest.approx((discordant * ratio + 2 * 6) / (discordant + 2), rel=1e-3)


def test_soft_scores_err_on_the_wide_side() -> None:
    """Whole differences with the same sums vary the most."""
    rng = np.random.default_rng(2)
    before = rng.choice([0.0, 0.3, 0.6, 0.9, 1.0], 1000)
    after = np.clip(before + rng.choice([-0.3, 0.0, 0.3], 1000, p=[0.1, 0.8, 0.1]), 0.0, 1.0)
    found = accuracy_score_paired(before, after, range(1000)).interval
    wald = accuracy_paired(before, after, range(1000)).interval
    gains, losses = np.maximum(after - before, 0).sum(), np.maximum(before - after, 0).sum()
    assert (found.lo, found.hi) == pytest.approx(
        tuple(100 * x for x in score_interval(1000 - gains - losses, losses, gains, 0)), rel=1e-12
    )
    assert found.lo < wald.lo and wald.hi < found.hi


def test_what_has_no_interval_says_so() -> None:
    one = accuracy_score_paired([1, 0, 1], [1, 1, 1], ["a"] * 3)
    lost = accuracy_score_paired([1, math.nan, 1], [1, 1, 1], range(3))
    for found in (one, lost):
        assert found.interval.method == "none"
        assert math.isnan(found.interval.lo) and math.isnan(found.interval.hi)
    assert math.isnan(lost.delta_pp)
    heavy = accuracy_score_paired([1] * 2000, [1] * 2000, [0] * 1999 + [1]).interval
    assert heavy.method == "none" or heavy.hi > 99.0


def test_wrong_scores_are_refused() -> None:
    with pytest.raises(DataError, match="expected 0, 1 or a share"):
        accuracy_score_paired([0, 1, 2], [0, 1, 1], range(3))
    with pytest.raises(PairingError):
        accuracy_score_paired([0, 1], [0, 1, 1], range(3))


@pytest.mark.slow
@pytest.mark.parametrize(("documents", "per_document", "icc"), [(200, 1, 0.0), (100, 10, 0.3), (40, 5, 1.0)])
def test_at_the_floor_few_pass(documents: int, per_document: int, icc: float) -> None:
    """1500 samples whose true loss is the floor of 2 points; the bound is nominal 2.5 % and three standard errors."""
    rng = np.random.default_rng(documents)
    passed = 0
    for _ in range(1500):
        whole = rng.choice([-1.0, 0.0, 1.0], (documents, 1), p=[0.03, 0.96, 0.01])
        own = rng.choice([-1.0, 0.0, 1.0], (documents, per_document), p=[0.03, 0.96, 0.01])
        delta = np.where(rng.random(own.shape) < math.sqrt(icc), whole, own).ravel()
        labels = np.repeat(np.arange(documents), per_document).tolist()
        passed += accuracy_score_paired(delta < 0, delta > 0, labels).interval.lo >= -2.0
    assert passed / 1500 <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / 1500)
