"""The statistics of a pair, from its recorded rows: primary metric, drift, tail, divergence. Pure; verify runs it again.

How an interval is found depends on the derivation: `Estimators` holds the functions of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from invarlock.certificate.schema import Divergence, DivergenceRecord, Pair, PrimaryMetric, Tail
from invarlock.eval.metrics import Metric
from invarlock.evidence.histogram import histogram_quantile
from invarlock.evidence.plain import finite_or_none
from invarlock.evidence.rows import Array, Rows
from invarlock.policy.limits import Limits
from invarlock.stats.intervals import Interval, weighted_mean_interval
from invarlock.stats.paired import (
    AccuracyComparison,
    Decision,
    accuracy_paired,
    decide_lower_pp,
    decide_upper,
    drift,
    flip_rate_interval,
    paired_log_ratio,
    perplexity,
    safe_exp,
)
from invarlock.stats.tail import TailGate, TailStats, tail_gate, tail_statistics

__all__ = ["FIRST_ESTIMATORS", "Comparison", "Estimators", "Figures", "figures", "not_evaluated"]

_EDGES = "0, then 20 bins per decade from 1e-7 to 1e2 nats"


@dataclass(frozen=True)
class Estimators:
    """How the figures of one derivation are estimated and decided; arguments and results as in `stats`."""

    ratio: Callable[..., Interval]
    ratio_decision: Callable[..., Decision]
    accuracy: Callable[..., AccuracyComparison]
    accuracy_decision: Callable[..., Decision]
    drift: Callable[..., Interval]
    kl: Callable[..., Interval]
    flips: Callable[..., Interval]
    tail: Callable[..., TailStats]
    tail_decision: Callable[..., TailGate]


#: those of derivation 1; a better one gets another table
FIRST_ESTIMATORS = Estimators(
    ratio=paired_log_ratio,
    ratio_decision=decide_upper,
    accuracy=accuracy_paired,
    accuracy_decision=decide_lower_pp,
    drift=drift,
    kl=weighted_mean_interval,
    flips=flip_rate_interval,
    tail=tail_statistics,
    tail_decision=tail_gate,
)


@dataclass(frozen=True)
class Comparison:
    """What is compared, held to what, and how. `same_weights`: the two checkpoints hold the same tensors."""

    metric: Metric
    rows: Rows
    limits: Limits
    estimators: Estimators = FIRST_ESTIMATORS
    same_weights: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What every estimator takes."""
        bootstrap = self.limits.bootstrap
        drawn = {"replicates": bootstrap.replicates, "seed": bootstrap.seed}
        return {"level": self.limits.ratio.ci_level, **drawn, "bca": bootstrap.bca}


@dataclass(frozen=True)
class Figures:
    """All that follows from the rows. A metric that scores answers has no drift, tail or divergence."""

    metric: PrimaryMetric
    drift: Interval | None = None
    tail: Tail | None = None
    divergence: Divergence | None = None


def figures(c: Comparison, divergence: DivergenceRecord | None) -> Figures:
    """Compare the two sides over all windows, preview and final."""
    unit = _UNITS[c.metric.unit]
    metric = _identity(unit.compare(c), c, unit)
    if not unit.next_tokens:
        return Figures(metric)
    rows, level = c.rows, c.limits.ratio.ci_level
    moved = c.estimators.drift(rows.baseline, rows.subject, rows.tokens, rows.documents, rows.is_final, level=level)
    return Figures(metric, moved, _tail(c), _divergence(c, divergence))


def not_evaluated(metric: Metric, limits: Limits, reason: str) -> PrimaryMetric:
    """Return a primary metric whose numbers are absent, because nothing was evaluated."""
    nothing = math.nan
    drawn = (limits.bootstrap.replicates, limits.bootstrap.seed)
    blank = Interval(nothing, nothing, nothing, limits.ratio.ci_level, "none", *drawn, 0, False, nothing)
    return _metric(
        metric,
        limits,
        blank,
        Decision("inconclusive", reason, False, None, None),
        decision="not_evaluated",
        gating_basis="not evaluated",
    )


def _pair(interval: Interval) -> Pair:
    return finite_or_none(interval.lo), finite_or_none(interval.hi)


def _exp(value: float | None) -> float | None:
    return None if value is None else finite_or_none(safe_exp(value))


def _metric(metric: Metric, limits: Limits, interval: Interval, decided: Decision, **figures: Any) -> PrimaryMetric:
    """Fill in what every primary metric says; figures that are not given were not measured."""
    ratio = metric.unit == "perplexity"
    ci = _pair(interval)
    common: dict[str, Any] = {
        "kind": metric.kind,
        "unit": metric.unit,
        "direction": metric.direction,
        **dict.fromkeys(("preview", "final", "baseline_preview", "baseline_final", "ratio_vs_baseline", "log_ratio")),
        "ci": ci,
        "display_ci": tuple(map(_exp, ci)) if ratio else ci,
        "ci_level": interval.level,
        "method": interval.method,
        "replicates": interval.replicates,
        "seed": interval.seed,
        "clusters": interval.clusters,
        "degenerate": interval.degenerate,
        "std_error": finite_or_none(interval.std_error),
        "limit": limits.ratio.limit if ratio else limits.accuracy.floor_pp,
        "hysteresis": limits.ratio.hysteresis if ratio else None,
        "decision": decided.status,
        "reason": decided.reason,
        "hysteresis_applied": decided.hysteresis_applied,
        "minimum_detectable_effect": decided.mde,
        "windows_needed": decided.windows_needed,
        "documents_needed": decided.documents_needed,
    }
    return PrimaryMetric(**{**common, **figures})


def _by_split(value: Callable[[str, Any], float], rows: Rows) -> dict[str, float | None]:
    """Return the values of both sides on preview and final; `value` takes the side and a mask of windows."""
    splits = {"preview": ~rows.is_final, "final": rows.is_final}
    sides = {"": "subject", "baseline_": "baseline"}
    return {f"{a}{b}": finite_or_none(value(side, m)) for a, side in sides.items() for b, m in splits.items()}


def _perplexity(c: Comparison) -> PrimaryMetric:
    rows, limits = c.rows, c.limits.ratio
    interval = c.estimators.ratio(rows.baseline, rows.subject, rows.tokens, rows.documents, **c.settings)
    decision = c.estimators.ratio_decision(interval, limits.limit, limits.hysteresis, n_windows=len(rows.tokens))
    ratio = safe_exp(interval.estimate)
    changed: dict[str, Any] = {}
    if not math.isfinite(interval.estimate):
        changed["reason"] = _not_finite(rows)
    if limits.min is not None and decision.status == "pass" and not ratio >= limits.min:
        reason = f"ratio {ratio:.4f} is below the lowest acceptable {limits.min}"
        changed |= {"decision": "fail", "reason": reason}
    return _metric(
        c.metric,
        c.limits,
        interval,
        decision,
        **_by_split(lambda side, mask: perplexity(rows.need(f"{side}_loss")[mask], rows.tokens[mask]), rows),
        ratio_vs_baseline=finite_or_none(ratio),
        log_ratio=finite_or_none(interval.estimate),
        gating_basis="upper end of the interval of the ratio over all windows",
        **changed,
    )


def _not_finite(rows: Rows) -> str:
    """Say on which side and in how many windows the loss is no number."""
    lost = {side: int((~np.isfinite(rows.need(f"{side}_loss"))).sum()) for side in ("subject", "baseline")}
    found = " and ".join(f"{n} of {len(rows.tokens)} windows of the {side}" for side, n in lost.items() if n)
    return f"the ratio is not finite: the loss is NaN or infinite in {found or 'no window, their sum overflows'}"


def _accuracy(c: Comparison) -> PrimaryMetric:
    rows, limits = c.rows, c.limits.accuracy
    before, after = rows["baseline_correct"], rows["subject_correct"]
    if before is None or after is None:
        return not_evaluated(c.metric, c.limits, "no correctness was recorded")
    outcome = c.estimators.accuracy(before, after, rows.documents, **c.settings)
    decision = c.estimators.accuracy_decision(
        outcome.interval, limits.floor_pp, n_windows=len(before), min_examples=limits.min_examples
    )
    whole = float(before.mean())
    return _metric(
        c.metric,
        c.limits,
        outcome.interval,
        decision,
        **_by_split(lambda side, mask: float(rows.need(f"{side}_correct")[mask].mean()), rows),
        ratio_vs_baseline=finite_or_none(float(after.mean()) / whole) if whole else None,
        delta_pp=finite_or_none(outcome.delta_pp),
        gating_basis="lower end of the interval of the difference in percentage points",
        mcnemar_p=finite_or_none(outcome.mcnemar_p),
        right_to_wrong=outcome.right_to_wrong,
        wrong_to_right=outcome.wrong_to_right,
    )


class _Unit(NamedTuple):
    """How two sides compare by metrics of one unit: `column` holds the values, `same` is the display of no change."""

    compare: Callable[[Comparison], PrimaryMetric]
    column: str
    same: float
    next_tokens: bool  # whether it looks at distributions of next tokens


_UNITS = {
    "perplexity": _Unit(_perplexity, "loss", 1.0, next_tokens=True),
    "accuracy": _Unit(_accuracy, "correct", 0.0, next_tokens=False),
}


def _identity(metric: PrimaryMetric, c: Comparison, unit: _Unit) -> PrimaryMetric:
    """Let a model against itself pass on any sample: with the same weights and the same value in every window there is
    nothing to estimate, so that too few documents for an interval, or too few examples, do not count."""
    before, after = (c.rows[f"{side}_{unit.column}"] for side in ("baseline", "subject"))
    same = before is not None and after is not None and np.array_equal(before, after)  # NaN equals nothing
    if metric.decision != "inconclusive" or not (c.same_weights and same):
        return metric
    return metric.model_copy(
        update={
            "ci": (0.0, 0.0),
            "display_ci": (unit.same, unit.same),
            "method": "identity",
            "degenerate": True,
            "std_error": 0.0,
            "minimum_detectable_effect": None,
            "windows_needed": None,
            "documents_needed": None,
            "decision": "pass",
            "reason": f"the weights are the baseline's and every one of {len(c.rows.tokens)} windows gave the same value",
        }
    )


def _tail(c: Comparison) -> Tail:
    """Return the tail of the per-window differences of log-loss and its gate."""
    limits, settings = c.limits.tail, c.settings
    del settings["bca"]
    with np.errstate(invalid="ignore"):
        delta = c.rows.subject - c.rows.baseline
    stats = c.estimators.tail(
        delta, epsilon=limits.epsilon, documents=c.rows.documents, quantile=limits.quantile, **settings
    )
    gate = c.estimators.tail_decision(stats, limits.model_dump())
    names = ("q50", "q90", "q95", "q99", "max", "tail_mass", "value")
    return Tail(
        windows=stats.windows,
        **{name: finite_or_none(getattr(stats, name)) for name in names},
        epsilon=stats.epsilon,
        quantile=stats.quantile,
        ci=(finite_or_none(stats.lo), finite_or_none(stats.hi)),
        status=gate.status,
        reason=gate.reason,
    )


def _exact(rows: Rows, kl_sum: Array) -> dict[str, Any]:
    """Return the exact mean KL and the coarsened one on the same windows, in nats per token; None if not measured."""
    exact = rows["kl_exact_sum"]
    there = np.isfinite(exact) if exact is not None and np.isfinite(kl_sum).all() else np.zeros(len(kl_sum), bool)
    tokens = rows.tokens[there].sum()
    if exact is None or not tokens:
        return {"kl_exact_mean": None, "kl_coarsened_there": None, "kl_exact_windows": 0}
    means = [finite_or_none(float(sums[there].sum() / tokens)) for sums in (exact, kl_sum)]
    return {"kl_exact_mean": means[0], "kl_coarsened_there": means[1], "kl_exact_windows": int(there.sum())}


def _divergence(c: Comparison, record: DivergenceRecord | None) -> Divergence | None:
    """Return the divergence of the two sides, or None where it was not measured."""
    rows = c.rows
    kl_sum, kl_max, flips = rows["kl_sum"], rows["kl_max"], rows["flips"]
    if kl_sum is None or kl_max is None or flips is None or record is None:
        return None
    with np.errstate(invalid="ignore"):
        per_token = kl_sum / rows.tokens
    kl = c.estimators.kl(per_token, rows.tokens, rows.documents, **c.settings)
    flip = c.estimators.flips(flips, rows.tokens, rows.documents, **c.settings)
    return Divergence(
        kl_mean=finite_or_none(kl.estimate),
        kl_ci=_pair(kl),
        kl_q50=histogram_quantile(record.histogram, 0.50),
        kl_q99=histogram_quantile(record.histogram, 0.99),
        kl_max=finite_or_none(float(kl_max.max())),
        **_exact(rows, kl_sum),
        flip_rate=finite_or_none(flip.estimate),
        flip_ci=_pair(flip),
        tokens=int(rows.tokens.sum()),
        histogram=record.histogram,
        histogram_edges=_EDGES,
        reference_matches=record.reference_matches,
        unbiased=record.unbiased,
        lower_bound=not record.unbiased,
    )
