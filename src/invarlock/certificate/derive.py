"""From what was recorded to the certificate that follows from it, by the rules of its derivation. Pure: no files, no clock.

    reports ──record──▶ Recorded ──derive──▶ Certificate ⊃ Recorded

`verify` reads the recorded part back out of a certificate, derives again and compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from invarlock.certificate.figures import FIRST_ESTIMATORS, Comparison, Estimators, Figures, figures, not_evaluated
from invarlock.certificate.gates import GATES, GateKind, Measured, all_gates, validation_of, verdict_of
from invarlock.certificate.guards import GUARDS, judge_guards, not_measured
from invarlock.certificate.looks import status_of, through_looks
from invarlock.certificate.notes import with_notes
from invarlock.certificate.schema import (
    BaselineRef,
    Certificate,
    Confidence,
    Coverage,
    Dataset,
    Gate,
    GateDecision,
    GuardSection,
    NoiseDistance,
    NoiseRecord,
    PairedRows,
    Recorded,
    Split,
    Weights,
    Windows,
)
from invarlock.certificate.second import SECOND_ESTIMATORS, SECOND_GATES, confidence_of
from invarlock.certificate.slices import Slices, measured_slices, slice_gates, slice_sections
from invarlock.certificate.third import THIRD_ESTIMATORS, THIRD_GATES, THIRD_JUDGES, coverage_of
from invarlock.core.exceptions import CertificateError
from invarlock.eval.metrics import metric_of
from invarlock.evidence.plain import canonical_digest, finite_or_none
from invarlock.evidence.rows import Rows
from invarlock.guards.base import StatsGuard
from invarlock.guards.boundary import BUILT_IN_GUARDS
from invarlock.guards.diagnosis import diagnose, diagnose_by_role
from invarlock.guards.peaks import shipped_type
from invarlock.guards.sketch import Culprits, culprits
from invarlock.policy.limits import Limits
from invarlock.policy.resolve import Policy
from invarlock.stats.betting import GLANCE_ERROR
from invarlock.stats.intervals import Interval
from invarlock.stats.paired import confidence_label

__all__ = ["CURRENT", "DERIVATIONS", "Rules", "derive", "rules_of"]

_NAN = float("nan")


@dataclass(frozen=True)
class Rules:
    """What the certificates of one derivation follow by. Whoever changes what follows adds a derivation: those issued
    keep theirs. `tiers_digest`: what the provenance says of the tiers. `one_spelling`: numbers have one spelling.
    `by_split`: coverage is told for preview and final, as readers of schema v1 have it. `modest`: no verdict that is open
    is told with high confidence."""

    estimators: Estimators
    gates: tuple[GateKind, ...]
    judges: Mapping[str, StatsGuard]
    confidence: Callable[[Measured, Interval], Confidence]
    diagnose: Callable[[list[dict[str, Any]]], Culprits]
    notes: Callable[[Mapping[str, GuardSection], Recorded, Figures], dict[str, GuardSection]]
    run_id: Callable[[Recorded], str]
    tiers_digest: Callable[[Policy], str | None]
    one_spelling: bool
    by_split: bool = False
    modest: bool = False
    coverage: Callable[[Measured], Coverage | None] = lambda m: None


def _first_run_id(r: Recorded) -> str:
    """An id that follows from everything recorded, in the order of the first release."""
    parts: list[Any] = [r.meta, r.guard_overhead, r.data, r.structure, r.provenance]
    parts += [*r.evaluation_windows.values(), *r.plugin_guards.values()]
    parts = [part.model_dump(mode="json") for part in parts]
    parts += [r.edit, r.auto, r.baseline_ref.run_id, r.baseline_ref.reused, r.plugins, r.system_overhead, r.telemetry]
    d = r.divergence
    parts += [r.primary_metric.kind, r.guard_facts, d and d.histogram, bool(d and d.reference_matches)]
    parts += [r.weights.changes, r.resolved_policy, r.policy_provenance, r.refused]
    return canonical_digest(parts)[:16]


def _run_id(r: Recorded) -> str:
    """An id that follows from everything recorded, times included: no two runs share one."""
    data = r.model_dump(mode="json", exclude={"primary_metric": {"reason"}})
    return canonical_digest([data, r.refused])[:16]


def _first_confidence(m: Measured, interval: Interval) -> Confidence:
    metric, drift = m.figures.metric, m.figures.drift
    stable = drift is None or abs(drift.estimate) <= 0.05
    room = {} if metric.direction == "lower" else {"scale": abs(metric.limit or 1.0)}
    basis = "width of the interval and drift between preview and final"
    return Confidence(label=confidence_label(interval, stable, **room), basis=basis)


#: version of the tiers -> the first 16 hex digits of SHA-256 over the text of its file, as the first release issued it
_TIERS_TEXT = {3: "6e383ec49b026dc1"}

_THIRD = Rules(
    THIRD_ESTIMATORS,
    THIRD_GATES,
    THIRD_JUDGES,
    confidence_of,
    diagnose_by_role,
    notes=with_notes,
    run_id=_run_id,
    tiers_digest=lambda policy: policy.tiers_digest,
    one_spelling=True,
    by_split=True,
    modest=True,
    coverage=coverage_of,
)

DERIVATIONS: Mapping[int, Rules] = {
    1: Rules(
        FIRST_ESTIMATORS,
        GATES,
        GUARDS,
        _first_confidence,
        culprits,
        notes=lambda sections, r, found: dict(sections),
        run_id=_first_run_id,
        tiers_digest=lambda policy: _TIERS_TEXT.get(policy.tiers_version),
        one_spelling=False,
    ),
    2: Rules(
        SECOND_ESTIMATORS,
        SECOND_GATES,
        GUARDS,
        confidence_of,
        diagnose,
        notes=with_notes,
        run_id=_run_id,
        tiers_digest=lambda policy: policy.tiers_digest,
        one_spelling=True,
    ),
    3: _THIRD,
    4: _THIRD,  # other sentences
    5: _THIRD,  # a glance before the looks
}
#: the derivation of new certificates
CURRENT = max(DERIVATIONS)


def rules_of(derivation: int | None) -> Rules:
    """Return the rules of a derivation (None: the first). Raises CertificateError for one of a later release."""
    number = 1 if derivation is None else derivation
    if number not in DERIVATIONS:
        known = ", ".join(map(str, DERIVATIONS))
        raise CertificateError(f"the certificate has derivation {number}; this release knows {known}: use a newer one")
    return DERIVATIONS[number]


def derive(r: Recorded) -> Certificate:
    """Compute the certificate that follows from what was recorded."""
    rules, limits = rules_of(r.derivation), Limits.model_validate(r.resolved_policy)
    judges = judge_guards(r, rules.judges)
    changed = rules.diagnose(r.weights.changes) if r.weights.changes else None

    def judge(
        windows: Mapping[Split, PairedRows], limits: Limits, fortunes: Mapping[str, float]
    ) -> tuple[_Seen, GateDecision]:
        measured, compared = _measured(r, windows, limits, rules, judges, changed)
        measured = replace(measured, fortunes=fortunes)
        slices = {} if compared is None else measured_slices(measured, compared, r.data, r.divergence)
        gates = [*all_gates(measured, rules.gates), *slice_gates(slices, rules.gates)]
        return _Seen(measured, slices, gates), status_of(gates, rules.gates)

    looks = None
    if r.looks is not None and r.refused is None:
        (measured, slices, gates), looks = through_looks(r.looks, limits, r.evaluation_windows, judge)
    else:
        (measured, slices, gates), _ = judge(r.evaluation_windows, limits, {})
    found, sections, counts = measured.figures, measured.guards, measured.counts
    provenance = r.policy_provenance
    kept = {name: getattr(r, name) for name in Recorded.model_fields if name not in _DERIVED}
    return Certificate(
        **kept,
        **{name: sections.get(name) for name in BUILT_IN_GUARDS[1:]},
        invariants=sections.get("invariants", not_measured("invariants", {})),
        run_id=rules.run_id(r),
        dataset=_dataset(r, counts, by_split=rules.by_split),
        primary_metric=found.metric,
        artifacts={"report": "report.json", "events": "events.jsonl"},
        validation=validation_of(gates, measured, rules.gates),
        gates=gates,
        baseline_ref=_baseline_ref(r),
        divergence=found.divergence,
        primary_metric_tail=found.tail,
        looks=looks,
        coverage=rules.coverage(measured),
        policy_digest=canonical_digest({"resolved_policy": r.resolved_policy, "overrides": provenance["overrides"]})[
            :16
        ],
        weights=_weights(r, changed),
        verdict=(verdict := verdict_of(gates, measured, rules.gates)),
        confidence=_modest(rules.confidence(measured, _interval(found)), verdict.status, rules, measured),
        slices=slice_sections(slices, r.data, gates),
        noise_distance=_noise_distance(r.noise_floor or (), found),
    )


class _Seen(NamedTuple):
    """What a look showed."""

    measured: Measured
    slices: Slices
    gates: list[Gate]


#: recorded in part: what follows stands in the same section
_DERIVED = {"primary_metric", "baseline_ref", "divergence", "weights", "looks", *BUILT_IN_GUARDS}


def _measured(
    r: Recorded,
    windows: Mapping[Split, PairedRows],
    limits: Limits,
    rules: Rules,
    judged: Mapping[str, GuardSection],
    changed: Culprits | None,
) -> tuple[Measured, Comparison | None]:
    """Return what the gates look at, of these windows, and the comparison that it comes from."""
    metric, same = metric_of(r.primary_metric.kind), _same_weights(r)
    rows = Rows.of(windows["preview"], windows["final"]) if r.refused is None else None
    compared = None if rows is None else Comparison(metric, rows, limits, rules.estimators, same)
    found = (
        figures(compared, r.divergence)
        if compared is not None
        else Figures(not_evaluated(metric, limits, r.primary_metric.reason))
    )
    measured = Measured(
        limits=limits,
        intent=r.meta.intent,
        figures=found,
        rows=rows,
        guards=rules.notes(judged, r, found),
        plugin_guards=r.plugin_guards,
        overhead=r.guard_overhead,
        counts=_window_counts(r, windows),
        contracts=r.provenance.contracts,
        culprits=changed,
        same_weights=same,
        peaks=r.activation_peaks,
        experts=r.experts,
        types=(shipped_type(r.structure.baseline), shipped_type(r.structure.subject)),
        planned=r.looks,
    )
    return measured, compared


def _noise_distance(floors: Sequence[NoiseRecord], found: Figures) -> NoiseDistance | None:
    """Return how far the ratio lies beyond what arithmetic alone does; None where either was not measured."""
    x, error = found.metric.log_ratio, found.metric.std_error
    known = [floor for floor in floors if floor.log_ratio is not None and floor.std_error is not None]
    if x is None or error is None or not known:
        return None
    widest = max(known, key=lambda floor: abs(floor.log_ratio or 0.0))
    size, spread = abs(widest.log_ratio or 0.0), widest.std_error or 0.0
    both = math.hypot(error, spread)
    distance = (abs(x) - size) / both if both > 0.0 else math.copysign(math.inf, abs(x) - size)
    beyond = finite_or_none(distance if abs(x) != size else 0.0)
    return None if beyond is None else NoiseDistance(name=widest.name, floor=size, floor_error=spread, distance=beyond)


def _same_weights(r: Recorded) -> bool:
    old, new = r.structure.baseline, r.structure.subject
    return bool(old.tensors) and old.weights_digest() == new.weights_digest()


def _window_counts(r: Recorded, splits: Mapping[Split, PairedRows]) -> dict[str, float | int]:
    """Return the pairing facts of SPEC §3, from the rows alone."""
    ids = {name: rows.window_ids for name, rows in splits.items()}
    preview, final = set(ids["preview"]), set(ids["final"])
    total, asked = sum(map(len, ids.values())), sum(r.data.requested)
    paired = sum(
        len(set(rows.window_ids))
        for rows in splits.values()
        if len(rows.subject_loss) == len(rows.baseline_loss) == len(rows.window_ids)
    )
    requested_preview, requested_final = r.data.requested
    return {
        "requested_preview": requested_preview,
        "requested_final": requested_final,
        "actual_preview": len(ids["preview"]),
        "actual_final": len(ids["final"]),
        "paired_windows": paired,
        "window_match_fraction": paired / total if total else 0.0,
        "window_overlap_fraction": len(preview & final) / len(final) if final else 0.0,
        "coverage": total / asked if asked else 0.0,
        "tokens": sum(sum(rows.tokens) for rows in splits.values()),
        "documents": len({document for rows in splits.values() for document in rows.document_ids}),
    }


def _modest(confidence: Confidence, status: str, rules: Rules, m: Measured) -> Confidence:
    if m.fortunes:
        chance = f"a chance below 1 in {1.0 / GLANCE_ERROR:,.0f}"
        return Confidence(label="Medium", basis=f"a glance: figures are rough, and within the limit they had {chance}")
    if rules.modest and status == "INCONCLUSIVE" and confidence.label == "High":
        return Confidence(label="Medium", basis=f"{confidence.basis}; not High, as the verdict is open")
    return confidence


def _dataset(r: Recorded, counts: Mapping[str, float | int], *, by_split: bool) -> Dataset:
    named = {name: getattr(r.data, name) for name in ("provider", "options", "seq_len", "stride", "split")}
    sizes = {name: int(counts[f"actual_{name}"]) for name in ("preview", "final")}
    stats: dict[str, Any] = dict(counts)
    if by_split:
        stats["coverage"] = {split: {"used": used} for split, used in sizes.items()}
    return Dataset(**named, windows=Windows(**sizes, seed=r.data.seed, stats=stats))


def _baseline_ref(r: Recorded) -> BaselineRef:
    digest = r.provenance.evidence_digests.get("baseline")
    return BaselineRef(**dict(r.baseline_ref), model_id=r.meta.baseline_model.id, evidence_digest=digest)


def _weights(r: Recorded, changed: Culprits | None) -> Weights:
    old, new = (side.weights_digest() for side in (r.structure.baseline, r.structure.subject))
    return Weights(
        baseline_digest=old,
        subject_digest=new,
        identical=old == new,
        changes=r.weights.changes,
        culprits=[str(row["name"]) for row in changed.named] if changed else [],
        uniform=bool(changed and changed.uniform),
    )


def _interval(found: Figures) -> Interval:
    metric = found.metric
    lo, hi = (_NAN if end is None else end for end in metric.ci)
    return Interval(_NAN, lo, hi, metric.ci_level, "none", metric.replicates, metric.seed, 0, False, _NAN)
