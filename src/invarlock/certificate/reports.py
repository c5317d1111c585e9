"""Certificates from run reports: the form that `make_certificate(report, baseline)` of the API guide takes."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from invarlock import __version__
from invarlock.certificate.derive import CURRENT, derive
from invarlock.certificate.guards import pair_guards
from invarlock.certificate.schema import (
    SCHEMA_VERSION,
    BaselineRecord,
    DivergenceRecord,
    ExpertsRecord,
    LooksRecord,
    Meta,
    MetricChoice,
    NoiseRecord,
    Overhead,
    PeaksRecord,
    PluginGuardSection,
    Provenance,
    Recorded,
    StructureSection,
    WeightsRecord,
)
from invarlock.core.api import RunReport
from invarlock.core.exceptions import CertificateError, PairingError
from invarlock.eval.metrics import metric_of
from invarlock.evidence.model import Evidence
from invarlock.evidence.plain import canonical
from invarlock.evidence.rows import WindowRows, pair_rows
from invarlock.guards.boundary import BUILT_IN_GUARDS
from invarlock.guards.diagnosis import mark_shifts
from invarlock.guards.pairing import renamed, renumbered
from invarlock.guards.sketch import compare_all
from invarlock.policy.resolve import Policy, resolve_recorded

__all__ = ["Report", "certificate_json", "check_baseline", "evidence_of", "make_certificate", "policy_of", "record"]

Report = RunReport | Mapping[str, Any]
_EVALUATED_NOTHING = {"evaluated": False, "ratio": None, "windows": 0, "skipped": None}


def make_certificate(report: Report, baseline: Report) -> dict[str, Any]:
    """Compare the subject's report with the baseline's and return the certificate as plain JSON data.

    A report with `meta.refused` (a text) is of a subject that its files alone showed to be damaged: its certificate fails,
    and nothing of it was evaluated. Raises CertificateError where a report cannot carry a certificate (synthetic metric,
    failed run, edited baseline) and PairingError where the two were not measured on the same windows.
    """
    return certificate_json(record(report, baseline))


def certificate_json(recorded: Recorded) -> dict[str, Any]:
    """Derive the certificate and return it as plain JSON data, numbers in their one spelling."""
    data: dict[str, Any] = canonical(derive(recorded).model_dump(mode="json"))
    return data


def record(report: Report, baseline: Report) -> Recorded:
    """Put two reports side by side: the part of their certificate that was measured or configured."""
    new, old = _plain(report), _plain(baseline)
    check_baseline(old)
    subject, reference = evidence_of(new, "subject"), evidence_of(old, "baseline")
    meta, policy = new.get("meta") or {}, policy_of(new)
    refused = meta.get("refused")
    if not refused:
        _check_pairing(reference, subject)
    measured, rebuilt = subject, meta.get("intent") == "restructure" and not refused
    layers = renumbered(reference.sketches, subject.sketches) if rebuilt else {}
    subject = _under_old_numbers(subject, layers) if layers else subject
    spectra = reference.guards.get("spectral", {}).get("modules", ())
    families = {row["name"]: row["family"] for row in spectra if "family" in row}
    skipped = {**_EVALUATED_NOTHING, "skipped": "nothing was evaluated"} if refused else _EVALUATED_NOTHING
    recorded = Recorded(
        schema_version=SCHEMA_VERSION,
        derivation=CURRENT,
        meta=_meta(meta, policy, reference, subject),
        primary_metric=MetricChoice(kind=reference.metric_kind, reason=refused or ""),
        plugins=dict(meta.get("plugins") or {}),
        auto={key: value for key, value in (meta.get("auto") or {}).items() if key in ("enabled", "tier")},
        edit={key: value for key, value in (new.get("edit") or {}).items() if key != "modules"},  # that can be long
        baseline_ref=_baseline(old.get("meta") or {}, subject),
        structure=_structure(reference, subject),
        **({} if refused else pair_guards(reference, subject, policy.limits.order)),
        plugin_guards=_plugin_guards(new.get("guards") or {}),
        divergence=_divergence(reference, subject),
        guard_overhead=Overhead.model_validate(meta.get("guard_overhead") or skipped),
        system_overhead=dict(meta.get("system_overhead") or {}),
        telemetry={"timings": dict(meta.get("timings") or {})},
        resolved_policy=policy.values,
        policy_provenance=policy.provenance(),
        provenance=_provenance(meta, reference, measured),
        data=subject.data,
        weights=WeightsRecord(
            changes=[] if refused else _changes(reference, subject, families, meta.get("operations") or {})
        ),
        notes=[str(note) for note in meta.get("warnings") or ()] or None,
        activation_peaks=_peaks(reference, subject),
        experts=_experts(reference, subject),
        layers_paired=layers or None,
        evaluation_windows={
            split: pair_rows(
                _reached(subject if refused else reference, subject, split), getattr(subject, split), split
            )
            for split in ("preview", "final")
        },
        looks=_looks(subject),
        noise_floor=None if refused else [NoiseRecord(**row) for row in meta.get("noise_floor") or ()] or None,
    )
    # what follows is derived from what a reader will find
    return Recorded.model_validate(canonical(recorded.model_dump(mode="json")))


def _under_old_numbers(subject: Evidence, layers: Mapping[str, str]) -> Evidence:
    """Return the measurements of a pruned subject under the names that its layers have in the baseline."""
    fields = {name: renamed(getattr(subject, name), layers) for name in ("guards", "sketches", "peaks", "experts")}
    return subject.model_copy(update=fields)


def _baseline(meta: Mapping[str, Any], subject: Evidence) -> BaselineRecord:
    return BaselineRecord(run_id=meta.get("run_id"), reused=subject.data.reused, pack=meta.get("pack"))


def _reached(side: Evidence, subject: Evidence, split: str) -> WindowRows:
    """Return a side's rows, as far as the looks at the subject reached."""
    rows: WindowRows = getattr(side, split)
    return rows if subject.plan is None else rows.head(len(getattr(subject, split).window_ids))


def _looks(subject: Evidence) -> LooksRecord | None:
    return None if subject.plan is None else LooksRecord(**{_PLANNED.get(k, k): v for k, v in subject.plan})


_PLANNED = {name: f"planned_{name}" for name in ("documents", "windows", "tokens")}


def _changes(
    baseline: Evidence, subject: Evidence, families: Mapping[str, str], operations: Mapping[str, str]
) -> list[dict[str, Any]]:
    rows = compare_all(baseline.sketches, subject.sketches, families)
    lengths = {t.name: t.shape[0] for t in baseline.structure.tensors if len(t.shape) == 1}
    mark_shifts(rows, baseline.sketches, subject.sketches, lengths)
    return [{**row, "operation": operations[row["name"]]} if row["name"] in operations else row for row in rows]


def _plain(report: Report) -> dict[str, Any]:
    if isinstance(report, RunReport):
        return report.to_dict()
    if isinstance(report, Mapping):
        return dict(report)
    raise CertificateError(f"a report is {type(report).__name__}; expected a RunReport or a loaded report.json")


def _check_sections(data: Mapping[str, Any], what: str) -> None:
    """Raise CertificateError where a section of a report is no mapping."""
    metric = data["metrics"].get("primary_metric") if isinstance(data.get("metrics"), Mapping) else None
    sections = {name: data.get(name) for name in ("meta", "edit", "guards", "metrics", "evidence")}
    for name, section in {**sections, "metrics.primary_metric": metric}.items():
        if section is not None and not isinstance(section, Mapping):
            raise CertificateError(f"the {what} report's {name} is {type(section).__name__}; expected a mapping")


def evidence_of(report: Report, what: str) -> Evidence:
    """Return the evidence in a report; CertificateError says why there is none."""
    data = _plain(report)
    _check_sections(data, what)
    metric = (data.get("metrics") or {}).get("primary_metric") or {}
    if metric.get("mock"):
        raise CertificateError(
            f"the {what} report was measured on synthetic tokens; expected calibration data: pass calibration_data"
        )
    if data.get("status") == "failed":
        raise CertificateError(f"the {what} run failed ({data.get('error')}); a certificate needs a run that ended")
    if not data.get("evidence"):
        raise CertificateError(
            f"the {what} report has no evidence; expected a run with calibration data that was evaluated"
        )
    try:
        return Evidence.model_validate(data["evidence"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CertificateError(f"the evidence in the {what} report is malformed at {where}: {first['msg']}") from None


def policy_of(report: Mapping[str, Any]) -> Policy:
    """Return the policy that a run resolved, from its report. Raises CertificateError where it does not follow again."""
    stored = (report.get("meta") or {}).get("policy")
    if not stored:
        raise CertificateError(
            "the report has no resolved policy in meta.policy; expected a report made by this version"
        )
    policy = resolve_recorded(stored)
    if policy.values != stored.get("values"):
        raise CertificateError(
            "the limits in meta.policy do not follow from its tier, profile and overrides; run again"
        )
    return policy


def check_baseline(baseline: Mapping[str, Any]) -> None:
    """Raise CertificateError where a report is of an edited model, which is no baseline."""
    _check_sections(baseline, "baseline")
    edit = baseline.get("edit") or {}
    judged = "verdict" in (baseline.get("metrics") or {})  # the edited side of a certificate
    changed = (edit.get("deltas") or {}).get("params_changed", edit.get("name") != "checkpoint" or judged)
    if edit.get("name") not in (None, "noop") and changed and not edit.get("dry_run"):
        raise CertificateError(
            f"the baseline report is of a model edited by {edit['name']!r}; expected an unedited one: that of the run "
            "under source/, or of a run with NoopEdit"
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


def _meta(meta: Mapping[str, Any], policy: Policy, baseline: Evidence, subject: Evidence) -> Meta:
    return Meta(
        created=meta.get("created") or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        tool="invarlock",
        tool_version=__version__,
        profile=policy.profile,
        tier=policy.tier,
        intent=meta.get("intent", "preserve"),
        device=subject.runtime.device,
        adapter=subject.model.adapter,
        baseline_model=baseline.model,
        subject_model=subject.model,
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
        baseline_usage=old.usage,
        subject_usage=new.usage,
    )


def _peaks(baseline: Evidence, subject: Evidence) -> PeaksRecord | None:
    if baseline.peaks is None or subject.peaks is None:
        return None
    return PeaksRecord(baseline=baseline.peaks, subject=subject.peaks)


def _experts(baseline: Evidence, subject: Evidence) -> ExpertsRecord | None:
    if baseline.experts is None or subject.experts is None:
        return None
    return ExpertsRecord(baseline=baseline.experts, subject=subject.experts)


def _divergence(baseline: Evidence, subject: Evidence) -> DivergenceRecord | None:
    if subject.kl_histogram is None or metric_of(baseline.metric_kind).is_accuracy:
        return None
    reference = baseline.reference_digest
    matches = reference is not None and reference == subject.reference_digest
    return DivergenceRecord(histogram=subject.kl_histogram, reference_matches=matches, unbiased=subject.kl_unbiased)


def _provenance(meta: Mapping[str, Any], baseline: Evidence, subject: Evidence) -> Provenance:
    sides = {"baseline": baseline, "subject": subject}
    return Provenance(
        provider_digest=subject.data.digest,
        env_flags=dict(meta.get("env_flags") or {}),
        versions=subject.runtime.versions,
        runtime={name: side.runtime for name, side in sides.items()},
        contracts={name: side.contracts for name, side in sides.items()},
        evidence_digests={name: side.digest() for name, side in sides.items()},
    )


_BLANK: dict[str, Any] = {
    "passed": False, "evaluated": True, "action": "none", "message": "", "metrics": {}, "warnings": [], "errors": [],
}  # fmt: skip


def _plugin_guards(results: Mapping[str, Mapping[str, Any]]) -> dict[str, PluginGuardSection]:
    """Record the results of plugin guards as they came."""
    plugins = {name: outcome for name, outcome in results.items() if name not in BUILT_IN_GUARDS}
    given = {n: {k: v for k, v in outcome.items() if k in _BLANK and v is not None} for n, outcome in plugins.items()}
    return {name: PluginGuardSection(**{**_BLANK, **outcome}) for name, outcome in given.items()}
