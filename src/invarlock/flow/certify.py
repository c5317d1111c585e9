"""Two checkpoints in, one certificate out: the order of the steps that never holds both models at once.

1. files: read both checkpoints' tensors as files; refuse a damaged baseline, and certify a damaged subject as FAIL
2. data: cut the windows with the baseline's tokenizer, or take those of a stored baseline report
3. baseline: load, measure, show it to plugin guards, write its evidence, free it
4. subject: load, measure on the same windows, let plugin guards validate it, free it
5. compare: one certificate
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from invarlock.certificate.reports import evidence_of, make_certificate
from invarlock.checkpoints.side import Loading, Side
from invarlock.core import registry
from invarlock.core.api import GuardWithPrepare, RunReport
from invarlock.core.events import EventLog
from invarlock.core.exceptions import CheckpointDamagedError, ConfigError, PairingError
from invarlock.evidence.reference import read_reference, write_reference
from invarlock.evidence.windows import WindowBatches
from invarlock.flow import steps
from invarlock.flow.job import Job, Tick, no_tick, open_job, resolved_metric
from invarlock.flow.measure import Measurement, files_only, measure
from invarlock.flow.run_folder import EVIDENCE, find_report, read_report, write_report
from invarlock.flow.sampling import cut_windows, reuse_windows
from invarlock.guards.boundary import BUILT_IN_GUARDS
from invarlock.guards.invariants import InvariantsGuard, baseline_damage
from invarlock.policy.resolve import resolve_policy

__all__ = ["CertifyOutcome", "CertifyRequest", "certify", "find_report"]

_REFUSED = "the subject was refused before evaluation because of what its files hold"


@dataclass(frozen=True)
class CertifyRequest:
    """What to certify, against what, and how. Paths are checkpoint folders or hub ids.

    `dataset` holds `provider`, `seq_len`, `stride`, `split`, `seed` and the provider's options; `overrides` follows the
    shape of a policy; `guard_arguments` are constructor arguments of plugin guards. `edit` {name, plan} is applied to the
    subject after loading.
    """

    subject: str
    baseline: str | None = None
    baseline_report: Path | None = None
    adapter: str = "auto"
    device: str = "auto"
    loading: Loading = Loading()
    profile: str = "ci"
    tier: str = "balanced"
    intent: str = "preserve"
    metric_kind: str = "auto"
    dataset: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    guard_arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    edit: Mapping[str, Any] | None = None
    edit_label: str | None = None
    out: Path = Path("runs")

    def __post_init__(self) -> None:
        if self.intent not in ("preserve", "finetune"):
            raise ConfigError(f"intent is {self.intent!r}; expected preserve or finetune")
        if (self.baseline is None) == (self.baseline_report is None):
            got = "neither" if self.baseline is None else "both"
            raise ConfigError(f"got {got} of --baseline and --baseline-report; expected exactly one of the two")

    @property
    def edit_facts(self) -> dict[str, Any]:
        """What a report says of the edit before it was made; a checkpoint that was edited elsewhere is called by its name."""
        given = self.edit or {}
        facts = {"name": str(given.get("name", "checkpoint")), "plan": dict(given.get("plan") or {})}
        label = self.edit_label or (None if self.edit else Path(self.subject).name)
        return facts if label is None else {**facts, "label": label}


@dataclass(frozen=True)
class CertifyOutcome:
    """The certificate, as plain JSON data, and where the reports of the two sides are."""

    certificate: dict[str, Any]
    source_report: Path | None
    edited_report: Path | None
    notes: list[str]
    timings: dict[str, float]

    @property
    def status(self) -> str:
        return str(self.certificate["verdict"]["status"])


@dataclass
class _Source:
    """The baseline's side. `report` is as it was read or written; `failed`: plugin guards whose prepare failed, by place."""

    side: Side
    report: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    measured: Measurement | None = None
    failed: dict[int, str] = field(default_factory=dict)


def certify(request: CertifyRequest, tick: Tick | None = None) -> CertifyOutcome:
    """Certify a subject against its baseline.

    Returns the outcome for PASS, FAIL and INCONCLUSIVE alike. Raises ModelLoadError for checkpoints that cannot be read
    and for a damaged baseline, DataError for text that cannot serve, PairingError (E001 … E006) where the sides cannot
    be compared, ConfigError for a request that makes no sense.
    """
    policy = resolve_policy(request.tier, request.profile, overrides=request.overrides)
    guards = steps.create_guards(tuple(dict.fromkeys(policy.values["guards"]["order"])), request.guard_arguments)
    job = open_job(
        policy,
        registry.adapters.create(request.adapter),
        guards,
        device=request.device,
        intent=request.intent,
        loading=request.loading,
        tick=tick or no_tick,
    )
    with job.timed("baseline files"):
        source = _read_baseline(job, request)
    with job.timed("subject files"):
        subject = steps.read(job, request.subject)
    job.metric = resolved_metric(request.metric_kind, job.adapter)
    refused = _refuse(job, request, source, subject)
    if refused is not None:
        return CertifyOutcome(refused, source.path, None, job.notes, job.timings)
    with job.timed("data"):
        stored = source.measured is not None
        job.windows = reuse_windows(source.report) if stored else cut_windows(job, source.side, request.dataset)
    with job.timed("baseline"):
        _measure_baseline(job, request, source)
    with job.timed("subject"):
        report = _measure_subject(job, request, source, subject)
    with job.timed("compare"):
        certificate = make_certificate(report, source.report)
    return CertifyOutcome(certificate, source.path, _finish(job, request, report, certificate), job.notes, job.timings)


def _read_baseline(job: Job, request: CertifyRequest) -> _Source:
    """Read the baseline's files, or take a stored baseline report."""
    if request.baseline_report is None:
        side = steps.read(job, str(request.baseline))
        damage = baseline_damage(side.structure)
        if damage:
            more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
            raise CheckpointDamagedError(
                f"the baseline {side.id} is damaged: {damage[0]['message']}{more}; give an intact baseline", damage
            )
        return _Source(side)
    report, path = read_report(request.baseline_report)
    evidence = evidence_of(report, "baseline")
    model, file = evidence.model, evidence.token_file
    facts = (model.tokenizer_digest, model.tokenizer_size)
    side = Side(model.id, None, evidence.structure, model.behaviour, None, facts)
    reference = None if file is None else read_reference(path.parent / file.name, file)
    return _Source(side, report, path, Measurement(evidence, reference))


def _refuse(job: Job, request: CertifyRequest, source: _Source, subject: Side) -> dict[str, Any] | None:
    """Return a FAIL certificate where the subject's files alone show that it is damaged, else None.

    A foreign tokenizer is a pairing error (E002) in the ci and release profiles, a FAIL elsewhere.
    """
    sides = (source.side, subject)
    if any(side.structure.source != "file" for side in sides) or request.edit is not None:
        return None
    guard = InvariantsGuard()
    old, new = (guard.stats_from(side.structure, side.behaviour, *side.tokenizer_facts) for side in sides)
    findings = guard.pair(old, new)["findings"]
    foreign = [f for f in findings if f["code"] == "E002"]
    if foreign and job.policy.values["sample"]["shortfall"] == "stop":
        raise PairingError(foreign[0]["message"] + "; put the baseline's tokenizer beside the subject", code="E002")
    if not any(f["group"] == "structure" or f["code"] in ("E002", "vocabulary_size") for f in findings):
        return None
    reports = [
        steps.report(job, Measurement(files_only(job, side)), request.edit_facts, run_id, refused=_REFUSED)
        for side, run_id in ((source.side, ""), (subject, f"edited-{job.stamp}"))
    ]
    reports[0].edit, reports[0].meta["run_id"] = dict(steps.NOOP), None
    return make_certificate(reports[1], reports[0])


def _measure_baseline(job: Job, request: CertifyRequest, source: _Source) -> None:
    prepares = any(isinstance(guard, GuardWithPrepare) for guard in job.plugins)
    if source.measured is not None and not prepares:
        return
    stored = source.measured is not None
    model = steps.load(job, source.side, "the baseline for plugin guards" if stored else "the baseline")
    if not stored:
        source.measured = measure(job, model, source.side, "the baseline")
    assert job.windows is not None and source.measured is not None
    about = RunReport(context={"profile": request.profile, "tier": request.tier})
    source.failed = steps.prepare_guards(job, job.plugins, model, WindowBatches(job.windows.all), about)
    del model
    gc.collect()
    if not stored:
        folder = request.out / "source" / job.stamp
        if source.measured.reference is not None:
            file = write_reference(source.measured.reference, folder / EVIDENCE)
            evidence = source.measured.evidence.model_copy(update={"token_file": file})
            source.measured = Measurement(evidence, source.measured.reference)
        report = steps.baseline_report(job, source.measured, f"source-{job.stamp}")
        source.report = report.to_dict()
        source.path = _write(job, source.report, folder)


def _measure_subject(job: Job, request: CertifyRequest, source: _Source, side: Side) -> RunReport:
    assert source.measured is not None
    model = steps.load(job, side, "the subject")
    edit = request.edit_facts
    if request.edit is not None:
        made = registry.edits.create(edit["name"], **edit["plan"])
        facts, side = steps.apply_edit(job, model, side, made, {})
        edit = {**edit, **facts}
    measured = measure(job, model, side, "the subject", reference=source.measured.reference)
    context = {"device": job.device}
    results = dict(
        (guard.name, outcome)
        for guard, outcome in steps.validate_guards(job, job.plugins, model, context, source.failed)
    )
    overhead = steps.measure_overhead(job, model, measured)
    del model
    gc.collect()
    report = steps.report(job, measured, edit, f"edited-{job.stamp}", guard_overhead=overhead)
    report.guards = results
    return report


def _finish(job: Job, request: CertifyRequest, report: RunReport, certificate: Mapping[str, Any]) -> Path:
    """Write the subject's report with what the comparison found."""
    report.metrics = {"primary_metric": certificate["primary_metric"], "verdict": certificate["verdict"]}
    for name in BUILT_IN_GUARDS:
        if certificate.get(name):
            report.guards[name] = {k: v for k, v in certificate[name].items() if k not in ("facts", "policy")}
    report.meta["timings"] = dict(job.timings)
    return _write(job, report.to_dict(), request.out / "edited" / job.stamp)


def _write(job: Job, report: dict[str, Any], folder: Path) -> Path:
    log = EventLog(folder / "events.jsonl", run_id=report["meta"]["run_id"])
    for name, seconds in job.timings.items():
        log.log(name, "end", seconds=seconds)
    log.log("report", "written", status=report["status"])
    log.close()
    return write_report(report, folder)
