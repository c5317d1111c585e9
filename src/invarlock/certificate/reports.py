"""Certificates from run reports: the form that `make_certificate(report, baseline)` of the API guide takes."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from invarlock import __version__
from invarlock.certificate.make import BUILT_IN_GUARDS, RunFacts, derive, plugin_section, record
from invarlock.certificate.schema import Meta, Overhead
from invarlock.core.api import RunReport
from invarlock.core.exceptions import CertificateError
from invarlock.evidence.model import Evidence
from invarlock.policy.resolve import ResolvedPolicy

__all__ = ["certificate_json", "check_baseline", "evidence_of", "make_certificate", "policy_of"]

Report = RunReport | Mapping[str, Any]


def _plain(report: Report) -> dict[str, Any]:
    if isinstance(report, RunReport):
        return report.to_dict()
    if isinstance(report, Mapping):
        return dict(report)
    raise CertificateError(f"a report is {type(report).__name__}; expected a RunReport or a loaded report.json")


def evidence_of(report: Report, what: str) -> Evidence:
    """Return the evidence in a report; CertificateError says why there is none."""
    data = _plain(report)
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


def policy_of(report: Mapping[str, Any]) -> ResolvedPolicy:
    """Return the policy that a run resolved, from its report."""
    stored = (report.get("meta") or {}).get("policy")
    if not stored:
        raise CertificateError(
            "the report has no resolved policy in meta.policy; expected a report made by this version"
        )
    return ResolvedPolicy(
        tier=stored["tier"],
        profile=stored["profile"],
        values=stored["values"],
        overrides=stored["overrides"],
        edit_adjustments=stored["edit_adjustments"],
        tiers_version=stored["tiers_version"],
        tiers_digest=stored["tiers_digest"],
        relaxed=stored["tiny_relax"],
    )


def check_baseline(baseline: Mapping[str, Any]) -> None:
    """Raise CertificateError where a report is of an edited model, which is no baseline."""
    edit = baseline.get("edit") or {}
    changed = (edit.get("deltas") or {}).get("params_changed", 0)
    if edit.get("name") not in (None, "noop", "checkpoint") and changed:
        raise CertificateError(
            f"the baseline report is of a model edited by {edit['name']!r}; expected an unedited one: run it with NoopEdit"
        )


def make_certificate(report: Report, baseline: Report) -> dict[str, Any]:
    """Compare the subject's report with the baseline's and return the certificate as plain JSON data.

    Raises CertificateError where a report cannot carry a certificate (synthetic metric, failed run, edited baseline) and
    PairingError where the two were not measured on the same windows.
    """
    subject_data, baseline_data = _plain(report), _plain(baseline)
    check_baseline(baseline_data)
    old, new = evidence_of(baseline_data, "baseline"), evidence_of(subject_data, "subject")
    return certificate_json(record(old, new, policy_of(subject_data), run_facts(subject_data, baseline_data, old, new)))


def certificate_json(recorded: Any) -> dict[str, Any]:
    """Derive the certificate and return it as plain JSON data; booleans that were not evaluated are left out."""
    data: dict[str, Any] = derive(recorded).model_dump(mode="json")
    data["validation"] = {key: value for key, value in data["validation"].items() if value is not None}
    return data


def run_facts(subject: Mapping[str, Any], baseline: Mapping[str, Any], old: Evidence, new: Evidence) -> RunFacts:
    """Collect what the reports say beyond the evidence."""
    meta = subject.get("meta") or {}
    policy = meta["policy"]
    guards = subject.get("guards") or {}
    overhead = meta.get("guard_overhead") or {"evaluated": False, "ratio": None, "windows": 0, "skipped": None}
    created = meta.get("created") or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return RunFacts(
        meta=Meta(
            created=created,
            tool="invarlock",
            tool_version=__version__,
            profile=policy["profile"],
            tier=policy["tier"],
            intent=meta.get("intent", "preserve"),
            device=new.runtime.device,
            adapter=new.model.adapter,
            baseline_model=old.model,
            subject_model=new.model,
        ),
        edit=_edit_summary(subject.get("edit") or {}),
        auto=dict(meta.get("auto") or {}),
        baseline_run_id=(baseline.get("meta") or {}).get("run_id"),
        baseline_reused=bool(new.data.reused),
        env_flags=dict(meta.get("env_flags") or {}),
        overhead=Overhead.model_validate(overhead),
        plugin_guards={
            name: plugin_section(outcome) for name, outcome in guards.items() if name not in BUILT_IN_GUARDS
        },
        plugins=dict(meta.get("plugins") or {"adapter": new.model.adapter, "guards": sorted(guards)}),
        system_overhead=dict(meta.get("system_overhead") or {}),
        telemetry={"timings": dict(meta.get("timings") or {})},
    )


def _edit_summary(edit: Mapping[str, Any]) -> dict[str, Any]:
    """Return the edit without its table of modules, which can be long."""
    return {key: value for key, value in edit.items() if key != "modules"}
