"""Paired metrics and the three-way decision."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from invarlock.core.exceptions import DataError, PairingError
from invarlock.stats.intervals import Interval, weighted_mean_interval
from invarlock.stats.paired import (
    accuracy_paired,
    confidence_label,
    decide_lower_pp,
    decide_upper,
    drift,
    flip_rate_interval,
    paired_log_ratio,
    perplexity,
)

Z = 1.959963984540054
Z80 = 0.8416212335729143


def interval(estimate: float, lo: float, hi: float, std_error: float | None = None) -> Interval:
    error = (hi - lo) / (2 * Z) if std_error is None else std_error
    return Interval(estimate, lo, hi, 0.95, "bca", 1200, 42, 200, False, error)


def ratio_interval(lo: float, hi: float) -> Interval:
    return interval((math.log(lo) + math.log(hi)) / 2, math.log(lo), math.log(hi))


def losses(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    return rng.normal(3.0, 0.5, n), rng.integers(30, 512, n), (np.arange(n) // 2).tolist()


@pytest.mark.parametrize("n", [4, 60, 400])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_identical_losses_pass_with_a_ratio_of_exactly_one(n: int, dtype: type) -> None:
    loss, tokens, documents = losses(n)
    found = paired_log_ratio(loss.astype(dtype), loss.astype(dtype), tokens, documents)
    assert (found.estimate, found.lo, found.hi) == (0.0, 0.0, 0.0)
    assert found.degenerate
    decision = decide_upper(found, 1.0 + 1e-15, n_windows=n)
    assert (decision.status, decision.mde) == ("pass", 1.0)
    moved = drift(loss, loss, tokens, documents, np.arange(n) % 2 == 0)
    assert (moved.estimate, moved.lo, moved.hi) == (0.0, 0.0, 0.0)


def test_ratio_is_the_ratio_of_perplexities() -> None:
    loss, tokens, documents = losses(300)
    worse = loss + np.random.default_rng(1).normal(0.05, 0.1, 300)
    found = paired_log_ratio(loss, worse, tokens, documents)
    assert math.exp(found.estimate) == pytest.approx(perplexity(worse, tokens) / perplexity(loss, tokens), rel=1e-12)
    assert perplexity(loss, tokens) == pytest.approx(math.exp(np.average(loss, weights=tokens)), rel=1e-12)
    assert found.lo < found.estimate < found.hi


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_fails(side: int, bad: float) -> None:
    pair = [losses(200)[0], losses(200)[0]]
    pair[side][3] = bad
    _, tokens, documents = losses(200)
    found = paired_log_ratio(*pair, tokens, documents)
    assert math.isnan(found.estimate)
    assert decide_upper(found, 1.1, n_windows=200).status == "fail"
    assert math.isnan(drift(*pair, tokens, documents, np.arange(200) < 100).estimate)
    assert confidence_label(found, True) == "Low"


def test_one_document_is_inconclusive_however_good_it_looks() -> None:
    loss, tokens, _ = losses(200)
    found = paired_log_ratio(loss, loss - 0.1 * loss, tokens, [0] * 200)
    decision = decide_upper(found, 1.1, n_windows=200)
    assert (decision.status, decision.mde, decision.windows_needed) == ("inconclusive", None, None)
    assert "cluster" in decision.reason


def test_one_document_among_crumbs_does_not_pass_for_many() -> None:
    """99 windows of one document and one each of four others: the standard error is tiny, the evidence is one text."""
    rng = np.random.default_rng(0)
    delta = np.where(np.arange(103) < 99, -0.05, -0.04) + rng.normal(0, 1e-3, 103)
    found = paired_log_ratio(np.ones(103), 1.0 + delta, np.full(103, 512), [0] * 99 + [1, 2, 3, 4])
    assert found.std_error < 1e-3
    assert decide_upper(found, 1.10, n_windows=103).status == "inconclusive"


def test_unequal_pairs_are_refused() -> None:
    loss, tokens, documents = losses(10)
    with pytest.raises(PairingError, match="baseline"):
        paired_log_ratio(loss, loss[:9], tokens, documents)
    with pytest.raises(PairingError, match="part marks"):
        drift(loss, loss, tokens, documents, [True] * 9)
    with pytest.raises(DataError, match="one part"):
        drift(loss, loss, tokens, documents, [True] * 10)


@pytest.mark.parametrize(
    ("lo", "hi", "status", "hysteresis_applied"),
    [
        (1.00, 1.0999, "pass", False),
        (0.50, 0.60, "pass", False),
        (1.00, 1.1001, "inconclusive", False),
        (1.0999, 1.2, "inconclusive", False),
        (1.101, 1.2, "inconclusive", True),
        (1.1019, 1.2, "inconclusive", True),
        (1.1021, 1.2, "fail", False),
    ],
)
def test_decision_follows_the_interval(lo: float, hi: float, status: str, hysteresis_applied: bool) -> None:
    decision = decide_upper(ratio_interval(lo, hi), 1.10, n_windows=200)
    assert (decision.status, decision.hysteresis_applied) == (status, hysteresis_applied)
    lower = decide_lower_pp(interval(-(lo + hi) / 2, -hi, -lo), -1.10, 0.002, n_windows=200)
    assert (lower.status, lower.hysteresis_applied) == (status, hysteresis_applied)


@pytest.mark.parametrize("hysteresis", [0.0, 0.002, 0.5, 1e9])
def test_hysteresis_never_loosens_pass(hysteresis: float) -> None:
    for hi in np.linspace(1.05, 1.15, 41):
        passed = decide_upper(ratio_interval(1.0, float(hi)), 1.1, hysteresis, n_windows=50).status == "pass"
        assert passed == (math.exp(math.log(hi)) <= 1.1)


@pytest.mark.parametrize(
    "change",
    [
        {"interval": replace(ratio_interval(1.0, 1.01), estimate=math.nan)},
        {"interval": replace(ratio_interval(1.0, 1.01), estimate=math.inf)},
        {"interval": replace(ratio_interval(1.0, 1.01), hi=math.nan)},
        {"interval": replace(ratio_interval(1.0, 1.01), lo=math.nan)},
        {"interval": replace(ratio_interval(1.0, 1.01), hi=math.inf)},
        {"interval": replace(ratio_interval(1.0, 1.01), hi=1e9)},
        {"limit": math.nan},
        {"limit": math.inf},
        {"limit": -1.0},
        {"hysteresis": math.nan},
        {"hysteresis": -0.1},
    ],
)
def test_no_number_that_is_missing_or_absurd_passes(change: dict[str, Any]) -> None:
    given = {"interval": ratio_interval(1.0, 1.01), "limit": 1.1, "hysteresis": 0.002} | change
    mirrored = replace(given["interval"], lo=-given["interval"].hi, hi=-given["interval"].lo)
    assert decide_upper(**given, n_windows=200).status != "pass"
    shifted = -given["limit"] if given["limit"] != -1.0 else 1.0
    assert decide_lower_pp(mirrored, shifted, given["hysteresis"], n_windows=200).status != "pass"


def test_minimum_detectable_effect_and_windows_needed_follow_their_formula() -> None:
    error, estimate, n = 0.03, math.log(1.05), 120
    decision = decide_upper(interval(estimate, estimate - Z * error, estimate + Z * error, error), 1.10, n_windows=n)
    effect = (Z + Z80) * error
    assert decision.status == "inconclusive"
    assert decision.mde == pytest.approx(math.exp(effect))
    assert decision.windows_needed == math.ceil(n * (effect / (math.log(1.10) - estimate)) ** 2)


@pytest.mark.parametrize("ratio", [1.1, 1.1001, 1.1019])
def test_an_estimate_within_the_hysteresis_band_is_decided_by_no_number_of_windows(ratio: float) -> None:
    middle = math.log(ratio)
    decision = decide_upper(interval(middle, middle - 0.01, middle + 0.01), 1.10, n_windows=200)
    assert (decision.status, decision.windows_needed) == ("inconclusive", None)


@pytest.mark.slow
@pytest.mark.parametrize("true_ratio", [1.05, 1.16])
def test_windows_needed_decide_with_the_promised_power(true_ratio: float) -> None:
    """Data of a known effect: a sample of the size asked for is decided in 80 % of the cases, and rightly."""
    rng = np.random.default_rng(0)
    effect, spread = math.log(true_ratio), 0.4
    error = spread / math.sqrt(100)
    pilot = interval(effect, effect - Z * error, effect + Z * error, error)
    needed = decide_upper(pilot, 1.10, n_windows=100).windows_needed
    assert needed is not None and needed > 100
    outcomes = []
    for _ in range(400):
        delta = rng.normal(effect, spread, needed)
        found = weighted_mean_interval(delta, np.ones(needed), range(needed), replicates=300)
        outcomes.append(decide_upper(found, 1.10, n_windows=needed).status)
    right, wrong = ("pass", "fail") if true_ratio < 1.1 else ("fail", "pass")
    assert outcomes.count(right) / 400 == pytest.approx(0.80, abs=0.06)
    assert outcomes.count(wrong) == 0


@pytest.mark.slow
def test_false_pass_is_rarer_than_one_in_forty_at_the_limit() -> None:
    """A subject exactly at the limit passes with probability about 2.5 %."""
    rng = np.random.default_rng(5)
    passes = 0
    for _ in range(1000):
        delta = rng.normal(math.log(1.10), 0.3, 80)
        found = weighted_mean_interval(delta, rng.integers(100, 500, 80), range(80))
        passes += decide_upper(found, 1.10, n_windows=80).status == "pass"
    assert passes / 1000 <= 0.04


def test_accuracy_counts_both_directions_and_matches_the_exact_mcnemar_tests() -> None:
    from scipy.stats import binomtest
    from statsmodels.stats.contingency_tables import mcnemar

    rng = np.random.default_rng(2)
    before = rng.random(500) < 0.7
    after = np.where(rng.random(500) < 0.06, ~before, before)
    found = accuracy_paired(before, after, range(500))
    table = [[np.sum(before & after), np.sum(before & ~after)], [np.sum(~before & after), np.sum(~before & ~after)]]
    lost, won = int(table[0][1]), int(table[1][0])
    assert (found.right_to_wrong, found.wrong_to_right, found.n) == (lost, won, 500)
    assert lost > 0 and won > 0
    assert found.delta_pp == pytest.approx(100.0 * (after.mean() - before.mean()))
    assert found.mcnemar_p == pytest.approx(mcnemar(table, exact=True).pvalue, rel=1e-12)
    assert found.mcnemar_p == pytest.approx(binomtest(lost, lost + won, 0.5).pvalue, rel=1e-12)
    assert found.interval.lo < found.delta_pp < found.interval.hi


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (0, 1), (3, 3), (4, 3), (0, 12), (20, 41)])
def test_mcnemar_matches_scipy_at_the_edges(lost: int, won: int) -> None:
    from scipy.stats import binomtest

    before = np.array([True] * lost + [False] * won + [True] * 50)
    after = np.array([False] * lost + [True] * won + [True] * 50)
    expected = binomtest(lost, lost + won, 0.5).pvalue if lost + won else 1.0
    assert accuracy_paired(before, after, range(len(before))).mcnemar_p == pytest.approx(expected, rel=1e-12)


def test_identical_answers_pass_and_unknown_answers_fail() -> None:
    right = np.random.default_rng(0).random(250) < 0.8
    same = accuracy_paired(right, right, range(250))
    assert (same.delta_pp, same.interval.lo, same.interval.hi, same.mcnemar_p) == (0.0, 0.0, 0.0, 1.0)
    assert decide_lower_pp(same.interval, -0.5, n_windows=250, min_examples=200).status == "pass"
    few = decide_lower_pp(same.interval, -0.5, n_windows=150, min_examples=200)
    assert (few.status, few.windows_needed) == ("inconclusive", 200)
    unknown = right.astype(float)
    unknown[7] = math.nan
    lost = accuracy_paired(right, unknown, range(250))
    assert math.isnan(lost.delta_pp) and math.isnan(lost.mcnemar_p)
    assert decide_lower_pp(lost.interval, -0.5, n_windows=250).status == "fail"


def test_soft_scores_move_the_difference_and_flip_at_one_half() -> None:
    found = accuracy_paired([1.0, 0.6, 0.3, 0.0], [0.6, 0.3, 1.0, 0.0], range(4))
    assert found.delta_pp == pytest.approx(0.0)
    assert (found.right_to_wrong, found.wrong_to_right) == (1, 1)


@pytest.mark.slow
def test_drift_is_the_ratio_of_perplexity_ratios_with_a_regression_standard_error() -> None:
    """The authority: the coefficient of `final` in a weighted regression with document-robust covariance."""
    import statsmodels.api as sm

    loss, tokens, documents = losses(240)
    rng = np.random.default_rng(4)
    final = rng.random(240) < 0.5
    after = loss + np.where(final, 0.03, 0.0) + rng.normal(0, 0.05, 240)
    found = drift(loss, after, tokens, documents, final)
    ppl = {(i, part): perplexity(x[m], tokens[m]) for i, x in enumerate((loss, after))
           for part, m in (("final", final), ("preview", ~final))}  # fmt: skip
    expected = (ppl[1, "final"] / ppl[1, "preview"]) / (ppl[0, "final"] / ppl[0, "preview"])
    assert math.exp(found.estimate) == pytest.approx(expected, rel=1e-12)
    fit = sm.WLS(after - loss, sm.add_constant(final.astype(float)), weights=tokens).fit(
        cov_type="cluster", cov_kwds={"groups": np.array(documents), "use_correction": False}
    )
    assert found.std_error == pytest.approx(fit.bse[1] * math.sqrt(120 / 119), rel=1e-9)
    assert found.lo < found.estimate < found.hi


def test_drift_of_one_document_has_no_interval() -> None:
    loss, tokens, _ = losses(20)
    found = drift(loss, loss + np.arange(20) / 100, tokens, ["a"] * 20, np.arange(20) >= 10)
    assert found.estimate == pytest.approx(0.1, abs=0.02)
    assert found.method == "none" and math.isnan(found.lo) and math.isnan(found.hi)


def test_flip_rate_is_token_weighted_and_stays_within_its_range() -> None:
    found = flip_rate_interval([0, 0, 0, 0, 8], [10, 20, 30, 40, 10], range(5))
    assert found.estimate == pytest.approx(8 / 110)
    assert found.lo == 0.0 and found.estimate < found.hi <= 1.0
    full = flip_rate_interval([10, 20], [10, 20], range(2))
    assert (full.estimate, full.lo, full.hi) == (1.0, 1.0, 1.0)
    none = flip_rate_interval([0, 0], [10, 20], range(2))
    assert (none.estimate, none.lo, none.hi) == (0.0, 0.0, 0.0)
    assert math.isnan(flip_rate_interval([1, 2], [10, 20], ["a", "a"]).hi)
    assert math.isnan(flip_rate_interval([1, math.nan], [10, 20], range(2)).estimate)


@pytest.mark.parametrize(("flips", "tokens"), [([-1, 0], [5, 5]), ([6, 0], [5, 5]), ([0, 0], [5, 0])])
def test_impossible_flip_counts_are_refused(flips: list[int], tokens: list[int]) -> None:
    with pytest.raises(DataError, match="got"):
        flip_rate_interval(flips, tokens, range(2))


def test_perplexity_of_extreme_losses() -> None:
    assert perplexity([1e4, 1e4], [3, 4]) == math.inf
    assert math.isnan(perplexity([1.0, math.nan], [3, 4]))
    with pytest.raises(DataError):
        perplexity([], [])


@pytest.mark.parametrize(
    ("width", "stable", "label"),
    [(0.0, True, "High"), (0.02, True, "High"), (0.03, True, "Medium"), (0.09, True, "Medium"), (0.1, True, "Low"),
     (0.0, False, "Low"), (math.nan, True, "Low"), (math.inf, True, "Low")],
)  # fmt: skip
def test_confidence_follows_width_and_stability(width: float, stable: bool, label: str) -> None:
    assert confidence_label(interval(0.0, 0.0, width), stable) == label
    assert confidence_label(interval(0.0, 0.0, 10 * width), stable, scale=10 * math.log(1.1)) == label
