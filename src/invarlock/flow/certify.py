"""Two checkpoints in, one certificate out: the form of the main job that never holds both models at once.

1. files: read both checkpoints' tensors as files; refuse a damaged baseline, and certify a damaged subject as FAIL
2. data: cut the windows with the baseline's tokenizer, or take those of a stored baseline report
3. baseline: load, measure, show it to plugin guards, write its evidence, free it
4. subject: load, measure on the same windows, let plugin guards validate it, free it
5. compare: one certificate
"""

from __future__ import annotations

import datetime
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from invarlock import __version__
from invarlock.checkpoints.side import Loading, Side, read_side
from invarlock.core import registry, settings
from invarlock.core.api import Guard, GuardWithPrepare, RunReport
from invarlock.core.events import EventLog
from invarlock.core.exceptions import (
    CheckpointDamagedError,
    ConfigError,
    PairingError,
)
from invarlock.flow.run_folder import EVIDENCE, find_report, read_report, time_stamp, write_report
from invarlock.flow.sampling import cut_sample, metric_kind_of, reuse_sample
from invarlock.guards.boundary import not_evaluated, prepare_guard, validate_guard
from invarlock.policy.resolve import ResolvedPolicy, profile_values, resolve_policy

__all__ = ["CertifyOutcome", "CertifyRequest", "certify", "find_report"]

Tick = Callable[[str, int, int], None]


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
class _Job:
    request: CertifyRequest
    policy: ResolvedPolicy
    adapter: Any
    device: str
    guards: list[Guard]
    tick: Tick
    created: str
    stamp: str
    notes: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    windows: Any = None
    data: Any = None
    baseline_report: dict[str, Any] | None = None
    baseline_report_path: Path | None = None

    @property
    def metric_kind(self) -> str:
        return metric_kind_of(self.request.metric_kind, self.adapter)


def certify(request: CertifyRequest, tick: Tick | None = None) -> CertifyOutcome:
    """Certify a subject against its baseline.

    Returns the outcome for PASS, FAIL and INCONCLUSIVE alike. Raises ModelLoadError for checkpoints that cannot be read
    and for a damaged baseline, DataError for text that cannot serve, PairingError (E001 … E006) where the sides cannot
    be compared, ConfigError for a request that makes no sense.
    """
    job = _open(request, tick or (lambda what, done, total: None))
    baseline = _timed(job, "baseline files", _read_baseline, job)
    subject = _timed(job, "subject files", _read_side, job, request.subject)
    refused = _refuse_subject(job, baseline, subject)
    if refused is not None:
        return CertifyOutcome(refused, job.baseline_report_path, None, job.notes, job.timings)
    _timed(job, "data", _prepare_windows, job, baseline)
    source = _timed(job, "baseline", _measure_baseline, job, baseline)
    edited = _timed(job, "subject", _measure_subject, job, subject, source)
    outcome: CertifyOutcome = _timed(job, "compare", _compare, job, source, edited)
    return outcome


def _timed(job: _Job, name: str, step: Callable[..., Any], *arguments: Any) -> Any:
    started = time.perf_counter()
    try:
        return step(*arguments)
    finally:
        job.timings[name] = round(time.perf_counter() - started, 3)


def _open(request: CertifyRequest, tick: Tick) -> _Job:
    from invarlock.core.device import make_deterministic, resolve_device
    from invarlock.guards.base import configure_guards

    policy = resolve_policy(request.tier, request.profile, overrides=request.overrides)
    device = request.device
    if device == "auto":
        device = str(profile_values(request.profile).get("device", "auto"))
    device = resolve_device(device)
    make_deterministic(int(policy.values["bootstrap"]["seed"]))
    guards = [
        registry.guards.create(name, **dict(request.guard_arguments.get(name, {})))
        for name in dict.fromkeys(policy.values["guards"]["order"])
    ]
    configure_guards(guards, policy.values["guards"])
    now = datetime.datetime.now(datetime.UTC)
    return _Job(
        request=request,
        policy=policy,
        adapter=registry.adapters.create(request.adapter),
        device=device,
        guards=guards,
        tick=tick,
        created=now.isoformat(timespec="seconds"),
        stamp=time_stamp(now),
    )


def _read_side(job: _Job, model_id: str) -> Side:
    job.tick("reading files", 0, 1)
    return read_side(job.adapter, model_id, job.request.loading)


def _read_baseline(job: _Job) -> Side:
    """Read the baseline's files, or take the facts of a stored baseline report."""
    from invarlock.certificate.reports import evidence_of
    from invarlock.guards.invariants import baseline_damage

    if job.request.baseline_report is not None:
        job.baseline_report, job.baseline_report_path = read_report(job.request.baseline_report)
        evidence = evidence_of(job.baseline_report, "baseline")
        facts = evidence.model
        return Side(
            facts.id,
            None,
            evidence.structure,
            facts.behaviour,
            None,
            (facts.tokenizer_digest, facts.tokenizer_size),
        )
    side: Side = _read_side(job, str(job.request.baseline))
    damage = baseline_damage(side.structure)
    if damage:
        more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        raise CheckpointDamagedError(
            f"the baseline {side.id} is damaged: {damage[0]['message']}{more}; give an intact baseline", damage
        )
    return side


def _refuse_subject(job: _Job, baseline: Side, subject: Side) -> dict[str, Any] | None:
    """Return a FAIL certificate where the subject's files alone show that it is damaged, else None.

    A foreign tokenizer is a pairing error (E002) in the ci and release profiles, a FAIL elsewhere.
    """
    from invarlock.guards.invariants import InvariantsGuard

    if subject.structure.source != "file" or baseline.structure.source != "file" or job.request.edit is not None:
        return None
    guard = InvariantsGuard()
    old = guard.stats_from(baseline.structure, baseline.behaviour, *baseline.tokenizer_facts)
    new = guard.stats_from(subject.structure, subject.behaviour, *subject.tokenizer_facts)
    findings = guard.pair(old, new)["findings"]
    foreign = [f for f in findings if f["code"] == "E002"]
    if foreign and job.policy.values["sample"]["shortfall"] == "stop":
        raise PairingError(foreign[0]["message"] + "; put the baseline's tokenizer beside the subject", code="E002")
    fatal = [f for f in findings if f["group"] == "structure" or f["code"] in ("E002", "vocabulary_size")]
    return _refused_certificate(job, baseline, subject) if fatal else None


def _refused_certificate(job: _Job, baseline: Side, subject: Side) -> dict[str, Any]:
    from invarlock.certificate.make import RunFacts, refuse
    from invarlock.certificate.reports import certificate_json
    from invarlock.certificate.schema import Meta, Overhead, StructureSection
    from invarlock.core.device import library_versions
    from invarlock.evidence.model import DataFacts, ModelFacts

    def model(side: Side) -> ModelFacts:
        return ModelFacts(
            id=side.id,
            adapter=job.adapter.name,
            parameters=sum(_product(t.shape) for t in side.structure.tensors),
            behaviour=side.behaviour,
            tokenizer_digest=side.tokenizer_facts[0],
            tokenizer_size=side.tokenizer_facts[1],
        )

    sample = job.policy.values["sample"]
    data = DataFacts(provider="none", seq_len=0, requested=[sample["preview"], sample["final"]], digest="")
    meta = Meta(
        created=job.created,
        tool="invarlock",
        tool_version=__version__,
        profile=job.request.profile,
        tier=job.request.tier,
        intent=job.request.intent,
        device=job.device,
        adapter=job.adapter.name,
        baseline_model=model(baseline),
        subject_model=model(subject),
    )
    facts = RunFacts(
        meta=meta,
        edit=_edit_facts(job),
        auto={"tier": job.request.tier, "enabled": True},
        baseline_run_id=None,
        baseline_reused=job.request.baseline_report is not None,
        env_flags=settings.environment_flags(),
        overhead=Overhead(evaluated=False, ratio=None, windows=0, skipped="nothing was evaluated"),
        plugins=_plugin_facts(job),
        telemetry={"timings": dict(job.timings)},
    )
    structure = StructureSection(
        baseline=baseline.structure,
        subject=subject.structure,
        baseline_behaviour=baseline.behaviour,
        subject_behaviour=subject.behaviour,
        baseline_tokenizer=baseline.tokenizer_facts,
        subject_tokenizer=subject.tokenizer_facts,
    )
    return certificate_json(refuse(structure, data, job.metric_kind, job.policy, facts, library_versions()))


def _product(shape: Sequence[int]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def _edit_facts(job: _Job) -> dict[str, Any]:
    given = job.request.edit or {}
    return {
        "name": given.get("name", "checkpoint"),
        "plan": dict(given.get("plan") or {}),
        "label": job.request.edit_label or given.get("name") or Path(job.request.subject).name,
    }


def _plugin_facts(job: _Job) -> dict[str, Any]:
    entries = registry.guards.entries()
    return {
        "adapter": job.adapter.name,
        "edit": _edit_facts(job)["name"],
        "guards": [
            {"name": g.name, "origin": entries[g.name].origin, "version": entries[g.name].version}
            for g in job.guards
            if g.name in entries
        ],
    }


def _prepare_windows(job: _Job, baseline: Side) -> None:
    """Take the windows of the stored baseline, or cut them; stop where there is less text than the profile needs."""
    if job.baseline_report is not None:
        sample = reuse_sample(job.baseline_report)
    else:
        dataset, tick = job.request.dataset, job.tick
        sample = cut_sample(baseline, job.adapter, job.metric_kind, dataset, job.policy, tick)
    job.windows, job.data = sample.windows, sample.data
    job.notes.extend(sample.notes)


def _load(job: _Job, side: Side, label: str) -> Any:
    job.tick(f"loading {label}", 0, 1)
    return job.request.loading.load(job.adapter, side, job.device)


def _facts(job: _Job, model: Any, side: Side) -> Any:
    from invarlock.flow.measure import model_facts

    facts = model_facts(model, job.adapter, side.id, side.tokenizer_facts)
    return facts.model_copy(update={"behaviour": side.behaviour}) if side.behaviour else facts


def _structure(model: Any, side: Side) -> Any:
    from invarlock.checkpoints.files import live_structure

    return side.structure if side.structure.source == "file" else live_structure(model)


def _plugin_guards(job: _Job) -> list[Guard]:
    from invarlock.guards.base import StatsGuard

    return [guard for guard in job.guards if not isinstance(guard, StatsGuard)]


def _measure(job: _Job, model: Any, side: Side, label: str, **options: Any) -> Any:
    from invarlock.flow.measure import measure_model

    return measure_model(
        model,
        job.adapter,
        job.windows,
        facts=_facts(job, model, side),
        data=job.data,
        structure=_structure(model, side),
        metric_kind=job.metric_kind,
        guards=job.guards,
        device=job.device,
        progress=lambda done, total: job.tick(f"measuring {label}", done, total),
        **options,
    )


@dataclass
class _Measured:
    report: dict[str, Any]
    evidence: Any
    reference: Any
    path: Path | None
    prepared: dict[str, str]  # plugin guards whose prepare failed, and why


def _measure_baseline(job: _Job, side: Side) -> _Measured:
    from invarlock.flow.measure import read_reference, write_reference

    plugins = _plugin_guards(job)
    if job.baseline_report is not None:
        from invarlock.certificate.reports import evidence_of

        evidence = evidence_of(job.baseline_report, "baseline")
        assert job.baseline_report_path is not None
        reference = None
        if evidence.token_file is not None:
            path = job.baseline_report_path.parent / evidence.token_file.name
            reference = read_reference(path, evidence.token_file)
        prepared = {}
        if any(isinstance(guard, GuardWithPrepare) for guard in plugins):
            model = _load(job, side, "the baseline for plugin guards")
            prepared = _prepare_plugins(job, plugins, model)
            _free(model)
        return _Measured(job.baseline_report, evidence, reference, job.baseline_report_path, prepared)
    model = _load(job, side, "the baseline")
    wanted = job.policy.values["metrics"]["divergence"]["mode"] != "off"
    measured = _measure(job, model, side, "the baseline", keep_reference=wanted)
    prepared = _prepare_plugins(job, plugins, model)
    _free(model)
    del model
    folder = job.request.out / "source" / job.stamp
    evidence = measured.evidence
    if measured.reference is not None:
        token_file = write_reference(measured.reference, folder / EVIDENCE)
        evidence = evidence.model_copy(update={"token_file": token_file})
    report = _report(job, evidence, {"name": "noop", "deltas": {"params_changed": 0}}, f"source-{job.stamp}")
    path = _write_report(job, report, folder)
    return _Measured(report, evidence, measured.reference, path, prepared)


def _free(model: Any) -> None:
    del model
    gc.collect()


def _prepare_plugins(job: _Job, guards: Sequence[Guard], model: Any) -> dict[str, str]:
    """Show plugin guards the baseline; return the failures that INVARLOCK_GUARD_PREPARE_STRICT=0 tolerates."""
    from invarlock.flow.execute import CalibrationBatches

    failed: dict[str, str] = {}
    calib = CalibrationBatches(job.windows.all)
    for guard in guards:
        report = RunReport(context={"profile": job.request.profile, "tier": job.request.tier})
        policy = job.policy.values["guards"].get(guard.name, {})
        failure = prepare_guard(guard, model, job.adapter, calib, policy, report)
        if failure is not None:
            job.notes.append(f"guard {guard.name!r} failed in prepare and is not evaluated: {failure}")
            failed[guard.name] = failure
    return failed


def _validate_plugins(job: _Job, model: Any, failed: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    return {
        guard.name: not_evaluated(guard.name, failed[guard.name])
        if guard.name in failed
        else validate_guard(guard, model, job.adapter, {"device": job.device})
        for guard in _plugin_guards(job)
    }


def _measure_subject(job: _Job, side: Side, source: _Measured) -> _Measured:
    from invarlock.flow.overhead import guard_overhead

    model = _load(job, side, "the subject")
    if job.request.edit is not None:
        side = _apply_edit(job, model, side)
    measured = _measure(job, model, side, "the subject", reference=source.reference)
    results = _validate_plugins(job, model, source.prepared)
    limits = job.policy.values["metrics"]["guard_overhead"]
    overhead = guard_overhead(model, job.windows, measured.evidence, job.device, limits)
    _free(model)
    del model
    report = _report(job, measured.evidence, _edit_facts(job), f"edited-{job.stamp}")
    report["guards"] = results
    report["meta"]["guard_overhead"] = overhead
    return _Measured(report, measured.evidence, None, None, {})


def _apply_edit(job: _Job, model: Any, side: Side) -> Side:
    """Apply the edit of --edit-config; what is then in memory is the subject."""
    from invarlock.checkpoints.files import live_structure

    given = job.request.edit or {}
    edit = registry.edits.create(str(given["name"]), **dict(given.get("plan") or {}))
    edit.apply(model, job.adapter)
    return replace(side, structure=live_structure(model))


def _report(job: _Job, evidence: Any, edit: Mapping[str, Any], run_id: str) -> dict[str, Any]:
    stored = settings.flag("INVARLOCK_STORE_EVAL_WINDOWS")
    report = RunReport(
        meta={
            "run_id": run_id,
            "created": job.created,
            "auto": {"enabled": True, "tier": job.request.tier, "profile": job.request.profile},
            "policy": {**job.policy.provenance(), "values": job.policy.values, "digest": job.policy.digest},
            "intent": job.request.intent,
            "device": job.device,
            "env_flags": settings.environment_flags(),
            "plugins": _plugin_facts(job),
            "warnings": list(job.notes),
            "timings": dict(job.timings),
        },
        edit=dict(edit),
        evaluation_windows=job.windows.to_dict() if stored else {},
        status="success",
        dataset=job.data.model_dump(mode="json"),
        evidence=evidence.model_dump(mode="json"),
    )
    return report.to_dict()


def _write_report(job: _Job, report: dict[str, Any], folder: Path) -> Path:
    log = EventLog(folder / "events.jsonl", run_id=report["meta"]["run_id"])
    for name, seconds in job.timings.items():
        log.log(name, "end", seconds=seconds)
    log.log("report", "written", status=report["status"])
    log.close()
    return write_report(report, folder)


def _compare(job: _Job, source: _Measured, edited: _Measured) -> CertifyOutcome:
    from invarlock.certificate.reports import make_certificate

    certificate = make_certificate(edited.report, source.report)
    report = edited.report
    report["metrics"] = {"primary_metric": certificate["primary_metric"]}
    for name in ("invariants", "spectral", "rmt", "variance"):
        if certificate.get(name):
            report["guards"][name] = {k: v for k, v in certificate[name].items() if k not in ("facts", "policy")}
    report["dataset"]["windows"] = certificate["dataset"]["windows"]
    report["meta"]["timings"] = dict(job.timings)
    path = _write_report(job, report, job.request.out / "edited" / job.stamp)
    return CertifyOutcome(certificate, source.path, path, job.notes, job.timings)
