"""Primary metrics of a pair of models on the same windows, and the three-way decision on their intervals.

Log-losses are mean natural-log losses per scored token of a window, tokens their counts. Ratios are perplexity
ratios; an interval of a log ratio stays in log space, its exponential is for display and for the decision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from invarlock.core.exceptions import DataError, PairingError
from invarlock.stats.intervals import Interval, cluster_codes, cluster_sums, linearised_interval, weighted_mean_interval

__all__ = [
    "HYSTERESIS",
    "MIN_EXAMPLES",
    "POWER",
    "AccuracyComparison",
    "Decision",
    "accuracy_paired",
    "confidence_label",
    "decide_lower_pp",
    "decide_upper",
    "drift",
    "flip_rate_interval",
    "paired_log_ratio",
    "perplexity",
    "safe_exp",
]

HYSTERESIS = 0.002
POWER = 0.8
MIN_EXAMPLES = 200


@dataclass(frozen=True)
class Decision:
    """Outcome of one gate.

    `hysteresis_applied`: the interval lies beyond the limit, but not beyond limit + hysteresis, so FAIL was withheld.
    `mde`: the distance from the limit (as a ratio, or in percentage points) at which this sample decides with 80 %
    power, (z of the level + z of the power) * standard error, with the interval's half width for the first product
    where that is wider (Student's t); None without an interval. `windows_needed`: the number of windows (examples) of
    the same kind whose `mde` is the distance seen; None for a decided gate, and where the estimate sits in the
    hysteresis band so that no number decides.
    """

    status: Literal["pass", "fail", "inconclusive"]
    reason: str
    hysteresis_applied: bool
    mde: float | None
    windows_needed: int | None
    documents_needed: int | None = None  # in the place of windows, by the rules of the second derivation


@dataclass(frozen=True)
class AccuracyComparison:
    """Paired accuracy: `delta_pp` = subject - baseline in percentage points, `interval` of it in the same unit.

    `mcnemar_p` is the exact two-sided p-value on the flips (1.0 without flips, NaN with scores that are not finite).
    `design_effect` of the clusters is recorded where it widened the interval (`proportions`).
    """

    delta_pp: float
    interval: Interval
    mcnemar_p: float
    right_to_wrong: int
    wrong_to_right: int
    n: int
    design_effect: float | None = None


def paired_log_ratio(
    baseline_loss: ArrayLike,
    subject_loss: ArrayLike,
    tokens: ArrayLike,
    documents: Sequence[Hashable],
    *,
    level: float = 0.95,
    replicates: int = 1200,
    seed: int = 42,
    bca: bool = True,
) -> Interval:
    """Interval of sum(t (ls - lb)) / sum(t), the log perplexity ratio in nats; exactly 0.0 for identical losses.

    All arguments have n entries, one a window. A loss that is not finite gives an estimate of NaN. Errors as in
    `weighted_mean_interval`.
    """
    delta = _difference(baseline_loss, subject_loss)
    return weighted_mean_interval(delta, tokens, documents, level=level, replicates=replicates, seed=seed, bca=bca)


def drift(
    baseline_loss: ArrayLike,
    subject_loss: ArrayLike,
    tokens: ArrayLike,
    documents: Sequence[Hashable],
    is_final: ArrayLike,
    *,
    level: float = 0.95,
) -> Interval:
    """Log of (final / preview of the subject) / (final / preview of the baseline), perplexities; exp() is the drift.

    That is the mean of ls - lb over the final windows less its mean over the preview windows; `is_final` is the boolean
    mask, shape (n,). The interval is cluster-t of the linearised difference, a document that occurs in both parts
    being one cluster. Raises DataError where a part is empty; otherwise errors as in `weighted_mean_interval`.
    """
    delta = _difference(baseline_loss, subject_loss)
    weights, final = np.asarray(tokens, dtype=np.float64), np.asarray(is_final, dtype=np.bool_)
    whole = weighted_mean_interval(delta, weights, documents, level=level, replicates=1, seed=0, bca=False)
    if final.shape != delta.shape:
        raise PairingError(f"got {final.size} part marks for {delta.size} windows; expected one a window")
    if final.all() or not final.any():
        raise DataError("got windows of one part only; expected preview and final windows; check the window counts")
    if not math.isfinite(whole.estimate):
        return whole
    if whole.degenerate:
        bound = math.nan if whole.method == "none" else 0.0
        return replace(whole, estimate=0.0, lo=bound, hi=bound)
    codes, sign = cluster_codes(documents), np.where(final, 1.0, -1.0)
    size = np.where(final, weights[final].sum(), weights[~final].sum())
    mean_final, mean_preview = (float(np.average(delta[part], weights=weights[part])) for part in (final, ~final))
    centred = delta - np.where(final, mean_final, mean_preview)
    influence = cluster_sums(codes, sign * weights * centred / size)
    blank = replace(whole, estimate=math.nan, lo=math.nan, hi=math.nan, method="none", std_error=math.nan)
    return linearised_interval(
        mean_final - mean_preview, influence, cluster_sums(codes, weights / size) / 2.0, like=blank
    )


def accuracy_paired(
    baseline_correct: ArrayLike,
    subject_correct: ArrayLike,
    clusters: Sequence[Hashable],
    *,
    level: float = 0.95,
    replicates: int = 1200,
    seed: int = 42,
    bca: bool = True,
) -> AccuracyComparison:
    """Compare two models on the same n examples; correctness is 0/1, boolean or a soft score in [0, 1] (VQA).

    A soft score counts as right from 0.5 on for flips and McNemar; the difference uses it as it is. Errors as in
    `weighted_mean_interval`.
    """
    before, after = (np.asarray(x, dtype=np.float64) for x in (baseline_correct, subject_correct))
    delta = 100.0 * _difference(before, after)
    interval = weighted_mean_interval(
        delta, np.ones(delta.shape), clusters, level=level, replicates=replicates, seed=seed, bca=bca
    )
    known = np.isfinite(delta)
    was, now = before[known] >= 0.5, after[known] >= 0.5
    lost, won = int(np.count_nonzero(was & ~now)), int(np.count_nonzero(~was & now))
    p = _mcnemar_exact(lost, won) if known.all() else math.nan
    return AccuracyComparison(interval.estimate, interval, p, lost, won, delta.size)


def flip_rate_interval(
    flips: ArrayLike,
    tokens: ArrayLike,
    documents: Sequence[Hashable],
    *,
    level: float = 0.95,
    replicates: int = 1200,
    seed: int = 42,
    bca: bool = True,
) -> Interval:
    """Share of scored tokens whose top-1 prediction changed, sum(flips) / sum(tokens), bounds kept within [0, 1].

    `flips` are counts per window, shape (n,), 0 <= flips <= tokens (else DataError).
    """
    counts, sizes = np.asarray(flips, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    if counts.shape != sizes.shape:
        raise PairingError(f"got {counts.shape} flip counts for {sizes.shape} token counts; expected one each a window")
    if (counts < 0).any() or (counts > sizes).any():
        raise DataError("got a flip count below zero or above the tokens of its window; recount the flips")
    with np.errstate(divide="ignore", invalid="ignore"):  # a window without tokens is refused below
        rates = counts / sizes
    found = weighted_mean_interval(rates, sizes, documents, level=level, replicates=replicates, seed=seed, bca=bca)
    if found.method == "none":
        return found
    return replace(found, lo=max(found.lo, 0.0), hi=min(found.hi, 1.0))


def perplexity(loss: ArrayLike, tokens: ArrayLike) -> float:
    """exp of the token-weighted mean log-loss; NaN where a loss is not finite, inf where it overflows."""
    whole = weighted_mean_interval(loss, tokens, range(np.size(loss)), replicates=1, bca=False)
    return safe_exp(whole.estimate)


def decide_upper(interval: Interval, limit: float, hysteresis: float = HYSTERESIS, *, n_windows: int) -> Decision:
    """Judge a log ratio against an upper `limit` on the ratio scale (1.10: at most ten per cent worse).

    PASS iff exp(hi) <= limit, FAIL iff exp(lo) > limit + hysteresis, otherwise INCONCLUSIVE. An estimate or a limit
    that is not finite fails; NaN bounds of a finite estimate (too few clusters) are inconclusive.
    """
    return _decide(interval, limit, hysteresis, n_windows, "ratio", to_shown=safe_exp, to_scale=_safe_log)


def decide_lower_pp(
    interval: Interval,
    floor_pp: float,
    hysteresis_pp: float = 100.0 * HYSTERESIS,
    *,
    n_windows: int,
    min_examples: int = MIN_EXAMPLES,
) -> Decision:
    """Judge a difference in percentage points against a lower `floor_pp` (-1.0: at most one point worse).

    The rule of `decide_upper` mirrored: PASS iff lo >= floor, FAIL iff hi < floor - hysteresis. With fewer than
    `min_examples` examples PASS becomes INCONCLUSIVE.
    """
    mirrored = replace(interval, estimate=0.0 - interval.estimate, lo=0.0 - interval.hi, hi=0.0 - interval.lo)
    found = _decide(mirrored, -floor_pp, hysteresis_pp, n_windows, "loss in pp", to_shown=float, to_scale=float)
    if found.status == "pass" and not n_windows >= min_examples:
        return replace(found, status="inconclusive", reason=f"{n_windows} examples, {min_examples} needed",
                       windows_needed=min_examples)  # fmt: skip
    return found


def confidence_label(
    interval: Interval, drift_ok: bool, *, scale: float = math.log(1.10)
) -> Literal["High", "Medium", "Low"]:
    """How firmly the interval pins the metric down, relative to `scale`, the room that the limit leaves.

    `scale` is log(limit) for a ratio and |floor| for points. High: width <= scale / 4 and a stable measurement
    (`drift_ok`); Medium: width <= scale and stable; Low: all else, intervals without bounds included.
    """
    width = interval.hi - interval.lo
    if drift_ok and width <= scale / 4.0:
        return "High"
    return "Medium" if drift_ok and width <= scale else "Low"


def safe_exp(value: float) -> float:
    """exp(value), inf where it overflows, NaN for NaN."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _safe_log(value: float) -> float:
    return math.log(value) if value > 0.0 else -math.inf


def _decide(
    interval: Interval,
    limit: float,
    hysteresis: float,
    n_windows: int,
    what: str,
    *,
    to_shown: Callable[[float], float],
    to_scale: Callable[[float], float],
) -> Decision:
    """The three-way rule for an upper limit; `to_shown` maps the interval's scale to the limit's, `to_scale` back."""
    if not (math.isfinite(interval.estimate) and math.isfinite(limit) and hysteresis >= 0.0):
        shown = f"{what} {interval.estimate} against limit {limit} with hysteresis {hysteresis}"
        return Decision("fail", f"{shown}: not finite, or no hysteresis at or above 0", False, None, None)
    if not (math.isfinite(interval.lo) and math.isfinite(interval.hi)):
        text = f"{interval.clusters} cluster(s) give no interval: fewer than 2, or one outweighs all others"
        return Decision("inconclusive", text, False, None, None)
    lo, hi = to_shown(interval.lo), to_shown(interval.hi)
    quantiles = NormalDist()
    half = max(quantiles.inv_cdf((1.0 + interval.level) / 2.0) * interval.std_error, (interval.hi - interval.lo) / 2.0)
    effect = half + quantiles.inv_cdf(POWER) * interval.std_error
    mde = to_shown(effect) if math.isfinite(effect) else None
    text = f"{what} {to_shown(interval.estimate):.6g}, interval [{lo:.6g}, {hi:.6g}], limit {limit:g}"
    if hi <= limit:
        return Decision("pass", text, False, mde, None)
    if lo > limit + hysteresis:
        return Decision("fail", f"{text}, hysteresis {hysteresis:g}", False, mde, None)
    below, above = to_scale(limit) - interval.estimate, interval.estimate - to_scale(limit + hysteresis)
    needed = _windows_needed(effect, max(below, above), n_windows)
    return Decision("inconclusive", f"{text}, hysteresis {hysteresis:g}", lo > limit, mde, needed)


def _windows_needed(effect: float, gap: float, n_windows: int) -> int | None:
    """n * (effect / gap)**2, at least one more than there are; None where there is no gap to resolve."""
    if not (gap > 0.0 and math.isfinite(effect)):
        return None
    needed = n_windows * (effect / gap) ** 2
    return max(n_windows + 1, math.ceil(needed)) if math.isfinite(needed) else None


def _difference(baseline: ArrayLike, subject: ArrayLike) -> NDArray[np.float64]:
    before, after = np.asarray(baseline, dtype=np.float64), np.asarray(subject, dtype=np.float64)
    if before.shape != after.shape:
        raise PairingError(f"got {before.shape} baseline and {after.shape} subject values; expected one pair a window")
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is judged by the caller
        return after - before


def _mcnemar_exact(lost: int, won: int) -> float:
    """Two-sided exact binomial test of equal flips; scipy.special is used as scipy.stats takes seconds to import."""
    if lost + won == 0:
        return 1.0
    from scipy.special import bdtr

    return min(1.0, 2.0 * float(bdtr(min(lost, won), lost + won, 0.5)))
