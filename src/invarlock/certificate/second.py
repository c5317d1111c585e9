"""What derivation 2 estimates and decides otherwise than the first: documents are the unit everywhere.

- Upper ends are the larger of cluster-t's and the studentised bootstrap's over documents; accuracy has Tango's interval.
- Ratio, KL and flips are decided by the same three-way rule on their intervals; drift warns, since it is 1 by design.
- A sample also needs `min_documents` effective documents (Kish); what would decide is said in documents.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from invarlock.certificate.figures import FIRST_ESTIMATORS
from invarlock.certificate.gates import GATES, GateKind, Measured, Outcome
from invarlock.certificate.schema import Confidence, GateDecision
from invarlock.core.exceptions import DataError
from invarlock.eval.metrics import metric_of
from invarlock.guards.peaks import LARGEST
from invarlock.stats.intervals import Interval, cluster_codes, cluster_sums, effective_clusters
from invarlock.stats.judgement import Judgement, judge, mirrored
from invarlock.stats.paired import AccuracyComparison, Decision, confidence_label, safe_exp
from invarlock.stats.proportions import accuracy_score_paired
from invarlock.stats.studentised import studentised_interval

__all__ = ["SECOND_ESTIMATORS", "SECOND_GATES", "UNITS", "confidence_of", "effective_documents", "sample_outcome"]

_Labels = Sequence[Hashable]


def _ratio(baseline: ArrayLike, subject: ArrayLike, tokens: ArrayLike, documents: _Labels, **settings: Any) -> Interval:
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is judged by the caller
        delta = np.asarray(subject, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    return _mean(delta, tokens, documents, **settings)


def _mean(values: ArrayLike, tokens: ArrayLike, documents: _Labels, *, bca: bool = True, **settings: Any) -> Interval:
    return studentised_interval(values, tokens, documents, **settings)


def _share(counts: ArrayLike, tokens: ArrayLike, documents: _Labels, **settings: Any) -> Interval:
    flipped, sizes = np.asarray(counts, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    if (flipped < 0).any() or (flipped > sizes).any():
        raise DataError("got a flip count below zero or above the tokens of its window; recount the flips")
    found = _mean(flipped / sizes, tokens, documents, **settings)
    return found if found.method == "none" else replace(found, lo=max(found.lo, 0.0), hi=min(found.hi, 1.0))


def _score(
    before: ArrayLike, after: ArrayLike, documents: _Labels, *, level: float, **settings: Any
) -> AccuracyComparison:
    return accuracy_score_paired(before, after, documents, level=level)


def _decision(found: Judgement, text: str, detectable: float | None, hysteresis_applied: bool = False) -> Decision:
    needed = found.needed
    if needed is not None:
        text += f"; {needed.reason}" if needed.documents else f"; not decidable with this text: {needed.reason}"
    return Decision(found.status, text, hysteresis_applied, detectable, None, needed.documents if needed else None)


def _decide_ratio(interval: Interval, limit: float, hysteresis: float, *, n_windows: int) -> Decision:
    found = judge(interval, math.log(limit), math.log(limit + hysteresis))
    detectable = None if found.detectable is None else safe_exp(found.detectable)
    if not math.isfinite(interval.estimate):
        return _decision(found, f"the ratio is not finite, limit {limit:g}", None)
    shown = f"ratio {safe_exp(interval.estimate):.6g}, {_interval(safe_exp(interval.lo), safe_exp(interval.hi))}"
    withheld = found.status == "inconclusive" and interval.lo > math.log(limit)
    return _decision(found, f"{shown}, limit {limit:g}, hysteresis {hysteresis:g}", detectable, withheld)


def _decide_points(interval: Interval, floor_pp: float, *, n_windows: int, min_examples: int) -> Decision:
    found = judge(mirrored(interval), -floor_pp, -floor_pp + 0.2)
    text = f"change {interval.estimate:.4g} pp, {_interval(interval.lo, interval.hi)}, floor {floor_pp:g}"
    if found.status == "pass" and not n_windows >= min_examples:
        return Decision(
            "inconclusive", f"{text}; {n_windows} examples, {min_examples} needed", False, found.detectable, None
        )
    return _decision(found, text, found.detectable)


def _interval(lo: float, hi: float) -> str:
    return f"interval [{lo:.6g}, {hi:.6g}]" if math.isfinite(lo + hi) else "no interval: too few documents"


SECOND_ESTIMATORS = replace(
    FIRST_ESTIMATORS,
    ratio=_ratio,
    ratio_decision=_decide_ratio,
    accuracy=_score,
    accuracy_decision=_decide_points,
    kl=_mean,
    flips=_share,
)


def effective_documents(m: Measured) -> float:
    """Return how many documents of equal weight the sample is worth (Kish); 0 where nothing was measured."""
    if m.rows is None or not m.rows.documents:
        return 0.0
    accuracy = metric_of(m.figures.metric.kind).is_accuracy
    weights: NDArray[np.float64] = np.ones(len(m.rows.documents)) if accuracy else m.rows.tokens
    sizes = cluster_sums(cluster_codes(m.rows.documents), weights)
    return effective_clusters(sizes / sizes.sum())


def _sample(m: Measured) -> Outcome:
    counts = m.counts
    return sample_outcome(m, (counts["actual_preview"], counts["actual_final"]), counts["tokens"])


def sample_outcome(m: Measured, windows: tuple[float, float], tokens: float, planned: str = "") -> Outcome:
    """Hold windows of preview and final and scored tokens, `planned ` or measured, and the documents that were used, to
    the floors."""
    floor, documents = m.limits.sample, effective_documents(m)
    needs = (
        (windows[0], floor.preview, f"{planned}preview windows"),
        (windows[1], floor.final, f"{planned}final windows"),
        (tokens, floor.min_tokens, f"{planned}scored tokens"),
        (round(documents, 6), floor.min_documents, "documents of equal weight"),
    )
    short = [f"{have:.6g} {what}, {needed} needed" for have, needed, what in needs if not have >= needed]
    decision: GateDecision = "pass" if not short else "warn" if floor.shortfall == "warn" else "inconclusive"
    reason = "; ".join(short) or f"enough windows, tokens and documents ({documents:.0f} of equal weight)"
    return Outcome(float(tokens), float(floor.min_tokens), "counts", decision, reason)


def _drift(m: Measured) -> Outcome | None:
    found = _first("preview_final_drift").check(m)
    softened = found is not None and found.decision == "fail" and found.measured is not None
    return found._replace(decision="warn") if found is not None and softened else found


def _three_way(name: str, ends: str) -> GateKind:
    """A gate on a figure of the divergence, decided by its interval; the first derivation's by its estimate."""
    kind = _first(name)

    def check(m: Measured) -> Outcome | None:
        found, d = kind.check(m), m.figures.divergence
        if found is None or d is None or found.measured is None or found.decision == "off":
            return found
        lo, hi = getattr(d, ends)
        limit, value = float(found.limit or 0.0), float(found.measured)
        nothing = value == 0.0 and d.kl_max == 0.0 and d.flip_rate == 0.0  # bit for bit the same
        decision: GateDecision = "pass" if nothing or (hi is not None and hi <= limit) else "inconclusive"
        decision = "fail" if lo is not None and lo > limit else decision
        if decision != "pass" and (m.intent == "finetune" or m.limits.divergence.mode == "warn"):
            decision = "warn"
        shown = "no interval: too few documents" if lo is None or hi is None else f"interval [{lo:.4g}, {hi:.4g}]"
        reason = f"{value:.4g} {UNITS[name]}, {shown}, limit {limit:g}"
        reason = m.named(reason) if decision == "fail" else reason
        reason += " (only warns under intent finetune)" * (m.intent == "finetune")
        return Outcome(found.measured, found.limit, "interval over documents", decision, reason)

    return replace(kind, check=check)


UNITS = {"divergence_kl": "nats per token", "token_flips": "of the tokens flip"}


def _first(name: str) -> GateKind:
    return next(kind for kind in GATES if kind.name == name)


def _range(m: Measured) -> Outcome | None:
    """Hold the largest output of every block to the type that the subject ships in."""
    old, new = m.types
    if m.peaks is None or new is None:
        return None
    limit = LARGEST[new]

    def beyond(peaks: Mapping[str, float | None], largest: float) -> list[str]:
        return [block for block, peak in peaks.items() if peak is None or not peak <= largest]

    blocks = beyond(m.peaks.subject, limit)
    alike = old == new and set(blocks) <= set(beyond(m.peaks.baseline, limit))
    top = max((peak or 0.0 for peak in m.peaks.subject.values()), default=0.0)
    reason = f"the largest output of a block is {top:.4g}; {_TYPES[new]} holds up to {limit:.5g}"
    if blocks:
        reached = m.peaks.subject[blocks[0]] or math.inf
        reason = f"{blocks[0]} reaches {reached:.4g}, beyond {limit:.5g}, the largest value of {_TYPES[new]}"
        reason += ", which the subject ships in: it would compute NaN there"
    decision: GateDecision = "pass" if not blocks else "warn" if alike else "fail"
    return Outcome(top, limit, "largest value of the type", decision, reason)


def _change(m: Measured) -> Outcome | None:
    """Remark on a subject that was meant to differ and does not."""
    if m.intent != "finetune" or not m.same_weights:
        return None
    reason = "the subject's tensors are the baseline's, bit for bit: the merge or training did nothing"
    return Outcome("identical", "changed", "digests of the weights", "warn", reason)


_TYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_OTHERS = {
    "sample_size": replace(_first("sample_size"), check=_sample),
    "preview_final_drift": replace(_first("preview_final_drift"), check=_drift),
    "divergence_kl": _three_way("divergence_kl", "kl_ci"),
    "token_flips": _three_way("token_flips", "flip_ci"),
}
SECOND_GATES: tuple[GateKind, ...] = (
    *(_OTHERS.get(kind.name, kind) for kind in GATES),
    GateKind("activation_range", _range),
    GateKind("intended_change", _change),
)


def confidence_of(m: Measured, interval: Interval) -> Confidence:
    """How firmly the interval pins the metric down, relative to the room that the tier's limit leaves.

    High needs a decided metric on enough documents; an undecided one is Low.
    """
    metric, drift = m.figures.metric, m.figures.drift
    stable = drift is None or abs(drift.estimate) <= 0.05
    room = math.log(metric.limit or 1.1) if metric.direction == "lower" else abs(metric.limit or 1.0)
    label = confidence_label(interval, stable, scale=room)
    if metric.decision not in ("pass", "fail"):
        label = "Low"
    elif label == "High" and effective_documents(m) < m.limits.sample.min_documents:
        label = "Medium"
    return Confidence(label=label, basis="width of the interval against the limit, documents, and drift")
