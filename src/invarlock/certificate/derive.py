"""The statistics of a pair, from its recorded rows: primary metric, tail, drift, divergence. Pure; verify runs it again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from invarlock.certificate.schema import Divergence, PairedRows, PrimaryMetric, Tail
from invarlock.eval import divergence as kl
from invarlock.evidence.model import finite_or_none
from invarlock.stats.intervals import Interval, weighted_mean_interval
from invarlock.stats.paired import (
    accuracy_paired,
    decide_lower_pp,
    decide_upper,
    drift,
    flip_rate_interval,
    is_accuracy,
    paired_log_ratio,
    perplexity,
    safe_exp,
)
from invarlock.stats.tail import tail_gate, tail_statistics

__all__ = [
    "Rows",
    "divergence_section",
    "drift_interval",
    "not_evaluated_metric",
    "primary_metric",
    "tail_section",
]

Policy = Mapping[str, Any]
Array = NDArray[np.float64]
_EDGES = "0, then 20 bins a decade from 1e-7 to 1e2 nats"


def _floats(values: list[float | None] | list[int] | list[float]) -> Array:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


@dataclass(frozen=True)
class Rows:
    """The recorded rows of both splits as arrays, preview first."""

    tokens: Array
    documents: list[str]
    baseline: Array
    subject: Array
    is_final: NDArray[np.bool_]
    kl_sum: Array | None
    kl_max: Array | None
    kl_exact: Array | None
    flips: Array | None
    baseline_correct: Array | None
    subject_correct: Array | None

    @classmethod
    def of(cls, preview: PairedRows, final: PairedRows) -> Rows:
        def column(name: str) -> Array | None:
            parts = [getattr(preview, name), getattr(final, name)]
            return None if any(p is None for p in parts) else np.concatenate([_floats(p) for p in parts])

        return cls(
            tokens=cast(Array, column("tokens")),
            documents=preview.document_ids + final.document_ids,
            baseline=cast(Array, column("baseline_loss")),
            subject=cast(Array, column("subject_loss")),
            is_final=np.array([False] * len(preview.tokens) + [True] * len(final.tokens)),
            kl_sum=column("kl_sum"),
            kl_max=column("kl_max"),
            kl_exact=column("kl_exact_sum"),
            flips=column("flips"),
            baseline_correct=column("baseline_correct"),
            subject_correct=column("subject_correct"),
        )


def _settings(policy: Policy) -> dict[str, Any]:
    bootstrap = policy["bootstrap"]
    return {
        "level": policy["metrics"]["pm_ratio"]["ci_level"],
        "replicates": bootstrap["replicates"],
        "seed": bootstrap["seed"],
        "bca": bootstrap.get("bca", True),
    }


def _pair(interval: Interval) -> tuple[float | None, float | None]:
    return finite_or_none(interval.lo), finite_or_none(interval.hi)


def _common(interval: Interval) -> dict[str, Any]:
    return {
        "ci_level": interval.level,
        "method": interval.method,
        "replicates": interval.replicates,
        "seed": interval.seed,
        "clusters": interval.clusters,
        "degenerate": interval.degenerate,
        "std_error": finite_or_none(interval.std_error),
    }


def primary_metric(kind: str, rows: Rows, policy: Policy, *, same_weights: bool = False) -> PrimaryMetric:
    """Compare the two sides over all windows, preview and final, and decide.

    A model against itself passes on any sample: with the same weights and the same value in every window there is
    nothing to estimate, so that too few documents for an interval, or too few examples, do not count.
    """
    accuracy = is_accuracy(kind)
    metric = _accuracy(kind, rows, policy) if accuracy else _perplexity(kind, rows, policy)
    before, after = (rows.baseline_correct, rows.subject_correct) if accuracy else (rows.baseline, rows.subject)
    same_values = before is not None and after is not None and np.array_equal(before, after)  # NaN equals nothing
    if metric.decision != "inconclusive" or not (same_weights and same_values):
        return metric
    return metric.model_copy(
        update={
            "ci": (0.0, 0.0),
            "display_ci": (0.0, 0.0) if accuracy else (1.0, 1.0),
            "method": "identity",
            "degenerate": True,
            "std_error": 0.0,
            "minimum_detectable_effect": None,
            "windows_needed": None,
            "decision": "pass",
            "reason": f"the weights are the baseline's and every one of {len(rows.tokens)} windows gave the same value",
        }
    )


def _perplexity(kind: str, rows: Rows, policy: Policy) -> PrimaryMetric:
    limits = policy["metrics"]["pm_ratio"]
    interval = paired_log_ratio(rows.baseline, rows.subject, rows.tokens, rows.documents, **_settings(policy))
    decision = decide_upper(interval, limits["limit"], limits["hysteresis"], n_windows=len(rows.tokens))
    ratio = safe_exp(interval.estimate)
    status, reason = decision.status, decision.reason
    if not math.isfinite(interval.estimate):
        reason = _not_finite(rows)
    if limits.get("min") is not None and status == "pass" and not ratio >= limits["min"]:
        status, reason = "fail", f"ratio {ratio:.4f} is below the lowest acceptable {limits['min']}"
    final = rows.is_final
    log_ci = _pair(interval)
    return PrimaryMetric(
        kind=kind,
        unit="perplexity",
        direction="lower",
        preview=finite_or_none(perplexity(rows.subject[~final], rows.tokens[~final])),
        final=finite_or_none(perplexity(rows.subject[final], rows.tokens[final])),
        baseline_preview=finite_or_none(perplexity(rows.baseline[~final], rows.tokens[~final])),
        baseline_final=finite_or_none(perplexity(rows.baseline[final], rows.tokens[final])),
        ratio_vs_baseline=finite_or_none(ratio),
        log_ratio=finite_or_none(interval.estimate),
        ci=log_ci,
        display_ci=tuple(None if x is None else finite_or_none(safe_exp(x)) for x in log_ci),
        gating_basis="upper end of the interval of the ratio over all windows",
        limit=limits["limit"],
        hysteresis=limits["hysteresis"],
        decision=status,
        reason=reason,
        hysteresis_applied=decision.hysteresis_applied,
        minimum_detectable_effect=decision.mde,
        windows_needed=decision.windows_needed,
        **_common(interval),
    )


def _not_finite(rows: Rows) -> str:
    """Say on which side and in how many windows the loss is no number."""
    lost = {
        side: int((~np.isfinite(values)).sum())
        for side, values in (("subject", rows.subject), ("baseline", rows.baseline))
    }
    found = " and ".join(f"{n} of {len(rows.tokens)} windows of the {side}" for side, n in lost.items() if n)
    return f"the ratio is not finite: the loss is NaN or infinite in {found or 'no window, their sum overflows'}"


def _accuracy(kind: str, rows: Rows, policy: Policy) -> PrimaryMetric:
    limits = policy["metrics"]["accuracy"]
    before, after = rows.baseline_correct, rows.subject_correct
    if before is None or after is None:
        return not_evaluated_metric(kind, policy, "no correctness was recorded")
    outcome = accuracy_paired(before, after, rows.documents, **_settings(policy))
    interval = outcome.interval
    decision = decide_lower_pp(interval, limits["floor_pp"], n_windows=len(before), min_examples=limits["min_examples"])
    final = rows.is_final
    means = {
        "preview": after[~final].mean(),
        "final": after[final].mean(),
        "baseline_preview": before[~final].mean(),
        "baseline_final": before[final].mean(),
    }
    whole_before = float(before.mean())
    return PrimaryMetric(
        kind=kind,
        unit="accuracy",
        direction="higher",
        **{name: finite_or_none(value) for name, value in means.items()},
        ratio_vs_baseline=finite_or_none(float(after.mean()) / whole_before) if whole_before else None,
        log_ratio=None,
        delta_pp=finite_or_none(outcome.delta_pp),
        ci=_pair(interval),
        display_ci=_pair(interval),
        gating_basis="lower end of the interval of the difference in percentage points",
        limit=limits["floor_pp"],
        hysteresis=None,
        decision=decision.status,
        reason=decision.reason,
        hysteresis_applied=decision.hysteresis_applied,
        minimum_detectable_effect=decision.mde,
        windows_needed=decision.windows_needed,
        mcnemar_p=finite_or_none(outcome.mcnemar_p),
        right_to_wrong=outcome.right_to_wrong,
        wrong_to_right=outcome.wrong_to_right,
        **_common(interval),
    )


def not_evaluated_metric(kind: str, policy: Policy, reason: str) -> PrimaryMetric:
    """Return a primary metric whose numbers are absent, because nothing was evaluated."""
    chosen = _settings(policy)
    accuracy = is_accuracy(kind)
    return PrimaryMetric(
        kind=kind,
        unit="accuracy" if accuracy else "perplexity",
        direction="higher" if accuracy else "lower",
        preview=None,
        final=None,
        baseline_preview=None,
        baseline_final=None,
        ratio_vs_baseline=None,
        log_ratio=None,
        ci=(None, None),
        display_ci=(None, None),
        ci_level=chosen["level"],
        method="none",
        replicates=chosen["replicates"],
        seed=chosen["seed"],
        clusters=0,
        degenerate=False,
        std_error=None,
        gating_basis="not evaluated",
        limit=policy["metrics"]["accuracy"]["floor_pp"] if accuracy else policy["metrics"]["pm_ratio"]["limit"],
        hysteresis=None if accuracy else policy["metrics"]["pm_ratio"]["hysteresis"],
        decision="not_evaluated",
        reason=reason,
        hysteresis_applied=False,
    )


def drift_interval(rows: Rows, policy: Policy) -> Interval:
    """Return the log drift with its interval."""
    level = policy["metrics"]["pm_ratio"]["ci_level"]
    return drift(rows.baseline, rows.subject, rows.tokens, rows.documents, rows.is_final, level=level)


def tail_section(rows: Rows, policy: Policy) -> Tail:
    """Return the tail of the per-window log-loss differences and its gate."""
    limits = policy["metrics"]["pm_tail"]
    chosen = _settings(policy)
    with np.errstate(invalid="ignore"):
        delta = rows.subject - rows.baseline
    stats = tail_statistics(
        delta,
        epsilon=limits["epsilon"],
        documents=rows.documents,
        quantile=limits["quantile"],
        level=chosen["level"],
        replicates=chosen["replicates"],
        seed=chosen["seed"],
    )
    gate = tail_gate(stats, limits)
    numbers = {name: finite_or_none(getattr(stats, name)) for name in ("q50", "q90", "q95", "q99", "max", "tail_mass")}
    return Tail(
        windows=stats.windows,
        **numbers,
        epsilon=stats.epsilon,
        quantile=stats.quantile,
        value=finite_or_none(stats.value),
        ci=(finite_or_none(stats.lo), finite_or_none(stats.hi)),
        status=gate.status,
        reason=gate.reason,
    )


def _exact_divergence(rows: Rows) -> tuple[float | None, float | None, int]:
    """Return (exact mean, coarsened mean on the same windows, windows): both in nats per token, None if not measured."""
    if rows.kl_exact is None or rows.kl_sum is None or not np.isfinite(rows.kl_sum).all():
        return None, None, 0
    there = np.isfinite(rows.kl_exact)
    tokens = rows.tokens[there].sum()
    if not tokens:
        return None, None, 0
    exact, coarsened = (finite_or_none(float(sums[there].sum() / tokens)) for sums in (rows.kl_exact, rows.kl_sum))
    return exact, coarsened, int(there.sum())


def divergence_section(rows: Rows, histogram: list[int] | None, matches: bool, policy: Policy) -> Divergence | None:
    """Return the divergence of the two sides, or None where it was not measured."""
    if rows.kl_sum is None or rows.kl_max is None or rows.flips is None or histogram is None:
        return None
    chosen = _settings(policy)
    with np.errstate(invalid="ignore"):
        per_token = rows.kl_sum / rows.tokens
    kl_interval = weighted_mean_interval(per_token, rows.tokens, rows.documents, **chosen)
    flip = flip_rate_interval(rows.flips, rows.tokens, rows.documents, **chosen)
    exact = _exact_divergence(rows)
    return Divergence(
        kl_mean=finite_or_none(kl_interval.estimate),
        kl_ci=_pair(kl_interval),
        kl_q50=kl.histogram_quantile(histogram, 0.50),
        kl_q99=kl.histogram_quantile(histogram, 0.99),
        kl_max=finite_or_none(float(rows.kl_max.max())),
        kl_exact_mean=exact[0],
        kl_coarsened_there=exact[1],
        kl_exact_windows=exact[2],
        flip_rate=finite_or_none(flip.estimate),
        flip_ci=_pair(flip),
        tokens=int(rows.tokens.sum()),
        histogram=histogram,
        histogram_edges=_EDGES,
        reference_matches=matches,
    )
