"""Two pieces of evidence in, one certificate out. Pure: no files, no clock, no torch.

    Evidence, Evidence, policy ──record──▶ Recorded ──derive──▶ Certificate
                                              ▲                     │
                                              └──────recall─────────┘

`derive` computes everything that follows from what was recorded. `recall` reads the recorded part back out of a
certificate, so that `verify` can derive it again and compare.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from invarlock.certificate import derive as stats
from invarlock.certificate.gates import Measured, all_gates, validation_of, verdict_of
from invarlock.certificate.schema import (
    SCHEMA_VERSION,
    BaselineRef,
    Certificate,
    Confidence,
    Dataset,
    Divergence,
    GuardSection,
    Meta,
    Overhead,
    PairedRows,
    PluginGuardSection,
    PrimaryMetric,
    Provenance,
    StructureSection,
    Tail,
    Weights,
    Windows,
)
from invarlock.core.exceptions import PairingError
from invarlock.evidence.model import DataFacts, Evidence, WindowRows, canonical_digest
from invarlock.guards import sketch
from invarlock.guards.base import StatsGuard
from invarlock.guards.invariants import InvariantsGuard
from invarlock.policy.resolve import ResolvedPolicy
from invarlock.stats.intervals import Interval
from invarlock.stats.paired import confidence_label, is_accuracy

__all__ = [
    "BUILT_IN_GUARDS",
    "Recorded",
    "RunFacts",
    "derive",
    "guard_facts",
    "pair_rows",
    "recall",
    "record",
    "refuse",
]


BUILT_IN_GUARDS = ("invariants", "spectral", "rmt", "variance")
_MEASURED = BUILT_IN_GUARDS[1:]


def _guard(name: str) -> StatsGuard:
    from invarlock import guards

    classes = {"spectral": "SpectralGuard", "rmt": "RMTGuard", "variance": "VarianceGuard"}
    made: StatsGuard = getattr(guards, classes[name])()
    return made


@dataclass(frozen=True)
class RunFacts:
    """What the run around the two measurements knew: names, times, the edit, plugin guards' own results."""

    meta: Meta
    edit: dict[str, Any]
    auto: dict[str, Any]
    baseline_run_id: str | None
    baseline_reused: bool
    env_flags: dict[str, str]
    overhead: Overhead
    plugin_guards: dict[str, PluginGuardSection] = field(default_factory=dict)
    plugins: dict[str, Any] = field(default_factory=dict)
    system_overhead: dict[str, Any] = field(default_factory=dict)
    telemetry: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recorded:
    """The part of a certificate that was measured or configured; everything else follows from it."""

    facts: RunFacts
    metric_kind: str
    data: DataFacts
    rows: dict[str, PairedRows]
    structure: StructureSection
    guard_facts: dict[str, dict[str, Any] | None]
    histogram: list[int] | None
    reference_matches: bool
    changes: list[dict[str, Any]]
    policy: dict[str, Any]
    policy_provenance: dict[str, Any]
    provenance: Provenance
    refused: str | None = None


def pair_rows(baseline: WindowRows, subject: WindowRows, split: str) -> PairedRows:
    """Put the rows of one split side by side. Raises PairingError where windows, their order or tokens differ."""
    if baseline.window_ids != subject.window_ids:
        ours, theirs = set(subject.window_ids), set(baseline.window_ids)
        raise PairingError(
            f"{split}: {len(ours & theirs)} of {len(theirs)} windows are paired; expected the same windows in the same "
            "order: measure the subject with the baseline's report",
            code="E006",
        )
    if baseline.tokens != subject.tokens:
        raise PairingError(f"{split}: the two sides scored other tokens; expected the same masks", code="E003")
    return PairedRows(
        window_ids=baseline.window_ids,
        document_ids=baseline.document_ids,
        tokens=baseline.tokens,
        baseline_loss=baseline.loss,
        subject_loss=subject.loss,
        kl_sum=subject.kl_sum,
        kl_max=subject.kl_max,
        kl_exact_sum=subject.kl_exact_sum,
        flips=subject.flips,
        baseline_correct=baseline.correct,
        subject_correct=subject.correct,
    )


def _check_pairing(baseline: Evidence, subject: Evidence) -> None:
    if not baseline.data.digest or not subject.data.digest:
        raise PairingError("a provider digest is missing; expected one on both sides: measure again", code="E004")
    if baseline.data.digest != subject.data.digest:
        raise PairingError("the two sides saw other text under the same window ids; measure again", code="E006")
    if baseline.metric_kind != subject.metric_kind:
        raise PairingError(
            f"the subject was measured by {subject.metric_kind}, the baseline by {baseline.metric_kind}", code="E001"
        )


def _structure(baseline: Evidence, subject: Evidence) -> StructureSection:
    old, new = baseline.model, subject.model
    return StructureSection(
        baseline=baseline.structure,
        subject=subject.structure,
        baseline_behaviour=old.behaviour,
        subject_behaviour=new.behaviour,
        baseline_tokenizer=(old.tokenizer_digest, old.tokenizer_size),
        subject_tokenizer=(new.tokenizer_digest, new.tokenizer_size),
    )


def guard_facts(baseline: Evidence, subject: Evidence, order: list[str]) -> dict[str, dict[str, Any] | None]:
    """Pair the stored measurements of each built-in guard in `order`; None where a side has none."""
    paired: dict[str, dict[str, Any] | None] = {}
    for name in _MEASURED:
        if name in order:
            old, new = baseline.guards.get(name), subject.guards.get(name)
            paired[name] = _guard(name).pair(old, new) if old is not None and new is not None else None
    return paired


def record(baseline: Evidence, subject: Evidence, policy: ResolvedPolicy, facts: RunFacts) -> Recorded:
    """Put two pieces of evidence side by side. Raises PairingError where they are not about the same windows."""
    _check_pairing(baseline, subject)
    reference = baseline.reference_digest
    compared = not is_accuracy(baseline.metric_kind) and subject.kl_histogram is not None
    families = {
        row["name"]: row["family"] for row in baseline.guards.get("spectral", {}).get("modules", ()) if "family" in row
    }
    return Recorded(
        facts=facts,
        metric_kind=baseline.metric_kind,
        data=subject.data,
        rows={
            "preview": pair_rows(baseline.preview, subject.preview, "preview"),
            "final": pair_rows(baseline.final, subject.final, "final"),
        },
        structure=_structure(baseline, subject),
        guard_facts=guard_facts(baseline, subject, policy.values["guards"]["order"]),
        histogram=subject.kl_histogram if compared else None,
        reference_matches=compared and reference is not None and reference == subject.reference_digest,
        changes=sketch.compare_all(baseline.sketches, subject.sketches, families),
        policy=policy.values,
        policy_provenance=policy.provenance(),
        provenance=Provenance(
            provider_digest=baseline.data.digest,
            env_flags=facts.env_flags,
            versions=subject.runtime.versions,
            runtime={"baseline": baseline.runtime, "subject": subject.runtime},
            contracts={"baseline": baseline.contracts, "subject": subject.contracts},
            evidence_digests={"baseline": baseline.digest(), "subject": subject.digest()},
        ),
    )


_NO_ROWS = PairedRows(window_ids=[], document_ids=[], tokens=[], baseline_loss=[], subject_loss=[])


def refuse(
    structure: StructureSection,
    data: DataFacts,
    kind: str,
    policy: ResolvedPolicy,
    facts: RunFacts,
    versions: dict[str, str],
) -> Recorded:
    """Record a subject that was refused before any evaluation, because of what its files hold."""
    return Recorded(
        facts=facts,
        metric_kind=kind,
        data=data,
        rows={"preview": _NO_ROWS, "final": _NO_ROWS},
        structure=structure,
        guard_facts={},
        histogram=None,
        reference_matches=False,
        changes=[],
        policy=policy.values,
        policy_provenance=policy.provenance(),
        provenance=Provenance(
            provider_digest=data.digest,
            env_flags=facts.env_flags,
            versions=versions,
            runtime={},
            contracts={"baseline": {}, "subject": {}},
            evidence_digests={},
        ),
        refused="the subject was refused before evaluation because of what its files hold",
    )


def window_stats(r: Recorded) -> dict[str, Any]:
    """Return the pairing facts of SPEC §3, from the rows alone."""
    preview, final = r.rows["preview"], r.rows["final"]
    asked = dict(zip(("preview", "final"), r.data.requested, strict=True))
    first, second = set(preview.window_ids), set(final.window_ids)
    total = len(preview.window_ids) + len(final.window_ids)
    paired = sum(
        len(x.subject_loss) == len(x.baseline_loss) == len(x.window_ids) and len(set(x.window_ids)) or 0
        for x in (preview, final)
    )
    documents = {*preview.document_ids, *final.document_ids}
    return {
        "requested_preview": asked["preview"],
        "requested_final": asked["final"],
        "actual_preview": len(preview.window_ids),
        "actual_final": len(final.window_ids),
        "paired_windows": paired,
        "window_match_fraction": paired / total if total else 0.0,
        "window_overlap_fraction": len(first & second) / len(second) if second else 0.0,
        "coverage": total / sum(r.data.requested) if sum(r.data.requested) else 0.0,
        "tokens": sum(preview.tokens) + sum(final.tokens),
        "documents": len(documents),
    }


def _judge_guards(r: Recorded) -> dict[str, GuardSection]:
    order = r.policy["guards"]["order"]
    sections: dict[str, GuardSection] = {}
    if "invariants" in order or r.refused is not None:
        sections["invariants"] = _judge_invariants(r)
    for name in _MEASURED:
        if name not in order or r.refused is not None:
            continue
        policy = dict(r.policy["guards"].get(name, {}))
        facts = r.guard_facts.get(name)
        if facts is None:
            sections[name] = _not_measured(name, policy)
        else:
            sections[name] = _section(_guard(name).judge(facts, policy), facts, policy)
    return {name: sections[name] for name in BUILT_IN_GUARDS if name in sections}


def _judge_invariants(r: Recorded) -> GuardSection:
    guard = InvariantsGuard()
    policy = {**r.policy["guards"].get("invariants", {}), "intent": r.facts.meta.intent}
    s = r.structure
    old = guard.stats_from(s.baseline, s.baseline_behaviour, *s.baseline_tokenizer)
    new = guard.stats_from(s.subject, s.subject_behaviour, *s.subject_tokenizer)
    return _section(guard.judge(guard.pair(old, new), policy), None, policy)


def _not_measured(name: str, policy: dict[str, Any]) -> GuardSection:
    return GuardSection(
        evaluated=False,
        passed=False,
        action="none",
        message=f"{name} was not measured on both sides",
        facts=None,
        policy=policy,
        metrics={},
        warnings=[],
        errors=[],
    )


def _section(outcome: dict[str, Any], facts: dict[str, Any] | None, policy: dict[str, Any]) -> GuardSection:
    return GuardSection(
        evaluated=outcome["evaluated"],
        passed=outcome["passed"],
        action=outcome["action"],
        message=outcome["message"],
        facts=facts,
        policy=policy,
        metrics=outcome["metrics"],
        warnings=outcome["warnings"],
        errors=outcome["errors"],
    )


@dataclass(frozen=True)
class _Figures:
    metric: PrimaryMetric
    drift: Interval | None
    tail: Tail | None
    divergence: Divergence | None


def _same_weights(r: Recorded) -> bool:
    old, new = r.structure.baseline, r.structure.subject
    return bool(old.tensors) and old.weights_digest() == new.weights_digest()


def _figures(r: Recorded) -> _Figures:
    if r.refused is not None:
        return _Figures(stats.not_evaluated_metric(r.metric_kind, r.policy, r.refused), None, None, None)
    rows = stats.Rows.of(r.rows["preview"], r.rows["final"])
    language = not is_accuracy(r.metric_kind)
    return _Figures(
        metric=stats.primary_metric(r.metric_kind, rows, r.policy, same_weights=_same_weights(r)),
        drift=stats.drift_interval(rows, r.policy) if language else None,
        tail=stats.tail_section(rows, r.policy) if language else None,
        divergence=stats.divergence_section(rows, r.histogram, r.reference_matches, r.policy) if language else None,
    )


def _confidence(figures: _Figures) -> Confidence:
    metric = figures.metric
    lo, hi = metric.ci
    stable = figures.drift is None or abs(figures.drift.estimate) <= 0.05
    nan = float("nan")
    interval = Interval(
        estimate=nan
        if metric.log_ratio is None and metric.delta_pp is None
        else metric.log_ratio or metric.delta_pp or 0.0,
        lo=nan if lo is None else lo,
        hi=nan if hi is None else hi,
        level=metric.ci_level,
        method=metric.method,  # type: ignore[arg-type]  # read back from a validated certificate
        replicates=metric.replicates,
        seed=metric.seed,
        clusters=metric.clusters,
        degenerate=metric.degenerate,
        std_error=nan if metric.std_error is None else metric.std_error,
    )
    basis = "width of the interval and drift between preview and final"
    if metric.unit == "accuracy":
        return Confidence(label=confidence_label(interval, stable, scale=abs(metric.limit or 1.0)), basis=basis)
    return Confidence(label=confidence_label(interval, stable), basis=basis)


def _weights(r: Recorded) -> tuple[Weights, str | None]:
    old, new = r.structure.baseline.weights_digest(), r.structure.subject.weights_digest()
    found = sketch.culprits(r.changes) if r.changes else None
    named = [str(row["name"]) for row in found.named] if found else []
    section = Weights(
        baseline_digest=old,
        subject_digest=new,
        identical=old == new,
        changes=r.changes,
        culprits=named,
        uniform=bool(found and found.uniform),
    )
    return section, found.text if found and (found.named or found.uniform) else None


def _mark_moe(r: Recorded, validation: Any) -> Any:
    routed = any(
        row.get("family") == "router" for facts in r.guard_facts.values() if facts for row in facts.get("modules", ())
    )
    return validation.model_copy(update={"moe_observed": True}) if routed else validation


def derive(r: Recorded) -> Certificate:
    """Compute the certificate that follows from what was recorded."""
    figures = _figures(r)
    sections = _judge_guards(r)
    weights, culprits = _weights(r)
    facts = r.facts
    counts = window_stats(r)
    measured = Measured(
        policy=r.policy,
        intent=facts.meta.intent,
        primary_metric=figures.metric,
        drift=figures.drift,
        tail=figures.tail,
        divergence=figures.divergence,
        guards=sections,
        plugin_guards=facts.plugin_guards,
        overhead=facts.overhead,
        window_stats=counts,
        contracts=r.provenance.contracts,
        refused=r.refused,
        culprits=culprits,
        culprit=next(iter(weights.culprits), None),
        uniform=weights.uniform,
    )
    gates = all_gates(measured)
    policy_digest = canonical_digest({"resolved_policy": r.policy, "overrides": r.policy_provenance["overrides"]})[:16]
    return Certificate(
        schema_version=SCHEMA_VERSION,
        run_id=_run_id(r),
        meta=facts.meta,
        dataset=_dataset(r, counts),
        primary_metric=figures.metric,
        artifacts={"report": "report.json", "events": "events.jsonl"},
        plugins=facts.plugins,
        validation=_mark_moe(r, validation_of(gates, measured)),
        gates=gates,
        auto=facts.auto,
        edit=facts.edit,
        baseline_ref=BaselineRef(
            run_id=facts.baseline_run_id,
            model_id=facts.meta.baseline_model.id,
            evidence_digest=r.provenance.evidence_digests.get("baseline"),
            reused=facts.baseline_reused,
        ),
        structure=r.structure,
        invariants=sections.get("invariants", _not_measured("invariants", {})),
        spectral=sections.get("spectral"),
        rmt=sections.get("rmt"),
        variance=sections.get("variance"),
        plugin_guards=facts.plugin_guards,
        divergence=figures.divergence,
        primary_metric_tail=figures.tail,
        guard_overhead=facts.overhead,
        system_overhead=facts.system_overhead,
        telemetry=facts.telemetry,
        resolved_policy=r.policy,
        policy_provenance=r.policy_provenance,
        policy_digest=policy_digest,
        provenance=r.provenance,
        data=r.data,
        weights=weights,
        evaluation_windows={"preview": r.rows["preview"], "final": r.rows["final"]},
        verdict=verdict_of(gates, measured),
        confidence=_confidence(figures),
    )


def _dataset(r: Recorded, counts: dict[str, Any]) -> Dataset:
    return Dataset(
        provider=r.data.provider,
        options=r.data.options,
        seq_len=r.data.seq_len,
        stride=r.data.stride,
        split=r.data.split,
        windows=Windows(preview=counts["actual_preview"], final=counts["actual_final"], seed=r.data.seed, stats=counts),
    )


def _run_id(r: Recorded) -> str:
    """Return an id that follows from everything recorded, times included: no two runs share one."""
    f = r.facts
    parts: list[Any] = [x.model_dump(mode="json") for x in (f.meta, f.overhead, r.data, r.structure, r.provenance)]
    parts += [x.model_dump(mode="json") for x in (*r.rows.values(), *f.plugin_guards.values())]
    parts += [f.edit, f.auto, f.baseline_run_id, f.baseline_reused, f.plugins, f.system_overhead, f.telemetry]
    parts += [r.metric_kind, r.guard_facts, r.histogram, r.reference_matches, r.changes, r.policy, r.policy_provenance]
    return canonical_digest([*parts, r.refused])[:16]


def recall(certificate: Certificate) -> Recorded:
    """Read back what was recorded. Inverse of `derive`."""
    c = certificate
    guards = {"spectral": c.spectral, "rmt": c.rmt, "variance": c.variance}
    refused = c.primary_metric.reason if c.primary_metric.decision == "not_evaluated" and not c.data_rows() else None
    return Recorded(
        facts=RunFacts(
            meta=c.meta,
            edit=c.edit,
            auto=c.auto,
            baseline_run_id=c.baseline_ref.run_id,
            baseline_reused=c.baseline_ref.reused,
            env_flags=c.provenance.env_flags,
            overhead=c.guard_overhead,
            plugin_guards=c.plugin_guards,
            plugins=c.plugins,
            system_overhead=c.system_overhead,
            telemetry=c.telemetry,
        ),
        metric_kind=c.primary_metric.kind,
        data=c.data,
        rows={"preview": c.evaluation_windows["preview"], "final": c.evaluation_windows["final"]},
        structure=c.structure,
        guard_facts={name: section.facts for name, section in guards.items() if section is not None},
        histogram=c.divergence.histogram if c.divergence else None,
        reference_matches=bool(c.divergence and c.divergence.reference_matches),
        changes=c.weights.changes,
        policy=c.resolved_policy,
        policy_provenance=c.policy_provenance,
        provenance=c.provenance,
        refused=refused,
    )


def plugin_section(outcome: Mapping[str, Any]) -> PluginGuardSection:
    """Record a plugin guard's result as it came."""
    return PluginGuardSection(
        passed=bool(outcome.get("passed", False)),
        evaluated=bool(outcome.get("evaluated", True)),
        action=str(outcome.get("action", "none")),
        message=str(outcome.get("message", "")),
        metrics=dict(outcome.get("metrics") or {}),
        warnings=list(outcome.get("warnings") or []),
        errors=list(outcome.get("errors") or []),
    )
