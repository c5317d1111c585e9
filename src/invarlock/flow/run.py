"""`invarlock run`: one configuration in, one run's folder out.

1. files: read the checkpoint's files; take a stored baseline's windows, or cut them
2. model: load it
3. attempts: `CoreRunner.execute`, under `until_pass` with an edit that weakens until it passes
4. keep: the report, the baseline's evidence and, where asked for, the edited model; the folder appears whole or not at all
"""

from __future__ import annotations

import contextlib
import datetime
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from invarlock.checkpoints.side import Loading, Side, read_side
from invarlock.core import registry, settings
from invarlock.core.api import Guard, RunConfig, RunReport
from invarlock.core.exceptions import ConfigError, PairingError, RunInterruptedError
from invarlock.flow.execute import CoreRunner
from invarlock.flow.run_folder import (
    EVIDENCE,
    read_report,
    require_free,
    staged_folder,
    time_stamp,
    write_report,
)
from invarlock.flow.sampling import Sample, cut_sample, dataset_options, metric_kind_of, reuse_sample
from invarlock.guards.boundary import checked_result, consequence, not_evaluated, worst
from invarlock.policy.config import RunSettings
from invarlock.policy.resolve import ResolvedPolicy, profile_values, resolve_policy

__all__ = ["WEAKER", "Opened", "RunOutcome", "RunRequest", "open_model", "run", "weaker_plan"]

Tick = Callable[[str, int, int], None]
_NOOP = "noop"
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
#: edit -> argument -> its values, each weaker than the one before; arguments are weakened in this order
WEAKER: dict[str, dict[str, tuple[Any, ...]]] = {
    "quant_rtn": {
        "bitwidth": (2, 3, 4, 5, 6, 7, 8),
        "group_size": (None, 128, 64, 32, 16),
        "scope": ("all", "ffn", "attn"),
    },
}


@dataclass(frozen=True)
class RunRequest:
    """What to run. The run's folder is `out/name/<time>`; `timeout` is in seconds; `baseline` names a stored report."""

    settings: RunSettings
    out: Path = Path("runs")
    name: str = "run"
    profile: str = "dev"
    baseline: Path | None = None
    until_pass: bool = False
    max_attempts: int = 3
    timeout: float | None = None
    cleanup: bool = True

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ConfigError(f"max_attempts is {self.max_attempts}; expected 1 or more")
        if self.timeout is not None and not self.timeout > 0:
            raise ConfigError(f"timeout is {self.timeout}; expected seconds above 0")


@dataclass(frozen=True)
class RunOutcome:
    """The report, as plain JSON data, and where things are. `report` path and `model` are None where none was asked for."""

    report: dict[str, Any]
    folder: Path
    report_path: Path | None
    model_folder: Path | None
    notes: list[str]
    timings: dict[str, float]

    @property
    def status(self) -> str:
        return str(self.report["status"])


@dataclass
class _Job:
    request: RunRequest
    policy: ResolvedPolicy
    adapter: Any
    device: str
    tick: Tick
    stamp: str
    created: str
    started: float
    notes: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    side: Side | None = None
    sample: Sample | None = None
    stored: dict[str, Any] | None = None  # the report of --baseline
    baseline: Any = None  # eval.measure.Measurement: stored, or measured by the first attempt

    @property
    def settings(self) -> RunSettings:
        return self.request.settings

    @property
    def edit_name(self) -> str:
        return self.settings.edit.name or _NOOP

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.timings[name] = round(time.perf_counter() - started, 3)

    def out_of_time(self) -> bool:
        limit = self.request.timeout
        return limit is not None and time.monotonic() - self.started > limit

    def progress(self, done: int, total: int) -> None:
        """Show how far the measurement is; it is also where a run that takes too long ends."""
        if self.out_of_time():
            raise RunInterruptedError(f"stopped after {self.request.timeout:g} s, as --timeout asks")
        self.tick("measuring", done, total)


class _Runner(CoreRunner):
    """Measures the unedited model once, however many attempts there are, or takes a stored baseline in its place."""

    def __init__(self, baseline: Any) -> None:
        self.baseline = baseline

    def _measure(
        self, run: Any, *, keep_reference: bool = False, reference: Any = None, ready: Mapping[str, Any] | None = None
    ) -> Any:
        if keep_reference and self.baseline is not None:
            return self.baseline
        measured = super()._measure(run, keep_reference=keep_reference, reference=reference, ready=ready)
        if keep_reference:
            self.baseline = measured
            return measured
        return _with_contracts(measured, run.guards)


def _with_contracts(measured: Any, guards: list[Guard]) -> Any:
    """State the contracts that the subject was measured under; a stored baseline may have had others."""
    from invarlock.evidence.model import canonical_digest
    from invarlock.guards.base import StatsGuard

    found = measured.evidence.contracts
    ours = {
        guard.name: canonical_digest(guard.contract())[:16]
        for guard in guards
        if isinstance(guard, StatsGuard) and guard.name in found
    }
    evidence = measured.evidence.model_copy(update={"contracts": {**found, **ours}})
    return type(measured)(evidence, measured.reference, measured.guard_stats)


def weaker_plan(edit: str, plan: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the next weaker plan of an edit, or None where it cannot be weakened further.

    Raises ConfigError for an edit that `WEAKER` does not know.
    """
    if edit not in WEAKER:
        raise ConfigError(
            f"--until-pass cannot weaken the edit {edit!r}; expected one of: {', '.join(WEAKER)}: run it without --until-pass"
        )
    for argument, ladder in WEAKER[edit].items():
        value = plan.get(argument)
        if value in ladder:
            rest = ladder[ladder.index(value) + 1 :]
        else:  # a group size between two rungs
            rest = tuple(step for step in ladder if isinstance(step, int) and step < int(value or 0))
        if rest:
            return {**plan, argument: rest[0]}
    return None


def run(request: RunRequest, tick: Tick | None = None) -> RunOutcome:
    """Run the pipeline of a configuration and write its folder.

    Returns the outcome of runs that ended in `success`, `rollback` and `failed` alike. Raises ConfigError, ModelLoadError,
    DataError and PairingError (E001 … E006) for what cannot be started; then nothing is written.
    """
    job = _open(request, tick or (lambda what, done, total: None))
    final = request.out / request.name / job.stamp
    export = _export_target(job.settings, final)
    with job.timed("files"):
        _read_files(job)
    with staged_folder(final, keep=not request.cleanup) as folder:
        assert job.side is not None
        with job.timed("load"):
            job.tick("loading the model", 0, 1)
            model = Loading.of(job.settings.model).load(job.adapter, job.side, job.device)
        report = _attempts(job, model, folder)
        _complete(job, report, model)
        saved = None
        if export is not None and report.status == "success":
            with job.timed("export"):
                saved = _export(job, model, export, final, folder)
        report.meta["timings"] = {**job.timings, **report.meta["timings"]}
        plain = report.to_dict()
        if job.settings.output.save_report:
            _write(job, plain, folder)
    written = final / "report.json" if job.settings.output.save_report else None
    return RunOutcome(plain, final, written, saved, job.notes, dict(plain["meta"]["timings"]))


@dataclass(frozen=True)
class Opened:
    """A configuration's model, loaded, and the windows that it would be measured on."""

    model: Any
    adapter: Any
    side: Side
    sample: Sample
    notes: list[str]


def open_model(chosen: RunSettings, profile: str, tick: Tick) -> Opened:
    """Load a configuration's model and cut its windows, without running anything."""
    job = _open(RunRequest(settings=chosen, profile=profile), tick)
    _read_files(job)
    assert job.side is not None and job.sample is not None
    tick("loading the model", 0, 1)
    model = Loading.of(chosen.model).load(job.adapter, job.side, job.device)
    return Opened(model, job.adapter, job.side, job.sample, [*chosen.notes, *job.sample.notes])


def _open(request: RunRequest, tick: Tick) -> _Job:
    from invarlock.core.device import make_deterministic, resolve_device

    chosen = request.settings
    policy = resolve_policy(chosen.auto.tier, request.profile, overrides=chosen.policy_overrides())
    device = chosen.model.device
    if device == "auto":
        device = str(profile_values(request.profile).get("device", "auto"))
    device = resolve_device(device)
    make_deterministic(int(policy.values["bootstrap"]["seed"]))
    now = datetime.datetime.now(datetime.UTC)
    job = _Job(
        request=request,
        policy=policy,
        adapter=registry.adapters.create(chosen.model.adapter),
        device=device,
        tick=tick,
        stamp=time_stamp(now),
        created=now.isoformat(timespec="seconds"),
        started=time.monotonic(),
        notes=list(chosen.notes),
    )
    if chosen.edit.name is None:
        job.notes.append("no edit is named: the model is measured as it is (noop)")
    if request.until_pass:
        weaker_plan(job.edit_name, _whole_plan(job))
    return job


def _whole_plan(job: _Job) -> dict[str, Any]:
    """Return the edit's plan with the edit's own defaults filled in, where it tells them."""
    edit = registry.edits.create(job.edit_name, **job.settings.edit.plan)
    return {**getattr(edit, "settings", {}), **job.settings.edit.plan}


def _read_files(job: _Job) -> None:
    job.tick("reading files", 0, 1)
    model = job.settings.model
    job.side = read_side(job.adapter, str(model.id), Loading.of(model))
    kind = metric_kind_of(job.settings.eval.metric_kind, job.adapter)
    if job.request.baseline is None:
        job.sample = cut_sample(
            job.side, job.adapter, kind, dataset_options(job.settings.dataset), job.policy, job.tick
        )
    else:
        job.sample = _stored_baseline(job, job.request.baseline, kind, job.side)
    job.notes.extend(job.sample.notes)


def _stored_baseline(job: _Job, path: Path, kind: str, side: Side) -> Sample:
    """Take windows and measurements from a stored report. Raises PairingError where this model cannot be held to it."""
    from invarlock.certificate.reports import check_baseline, evidence_of
    from invarlock.flow.measure import Measurement, read_reference

    report, found = read_report(path)
    check_baseline(report)
    evidence = evidence_of(report, "baseline")
    if evidence.metric_kind != kind:
        raise PairingError(
            f"this run measures {kind}, the baseline {evidence.metric_kind}; use one metric", code="E001"
        )
    ours, theirs = side.tokenizer_facts[0], evidence.model.tokenizer_digest
    if ours != theirs:
        raise PairingError(
            f"the tokenizer of {side.id} (digest {str(ours)[:8]}) is not the baseline's ({str(theirs)[:8]}); expected the "
            "same: measure a baseline with this tokenizer",
            code="E002",
        )
    sample = reuse_sample(report)
    if side.max_length and sample.windows.seq_len > side.max_length:
        raise PairingError(
            f"the baseline's windows have {sample.windows.seq_len} tokens, {side.id} takes at most {side.max_length}; "
            "measure the baseline with a shorter seq_len",
            code="E001",
        )
    token_file = evidence.token_file
    reference = None if token_file is None else read_reference(found.parent / token_file.name, token_file)
    job.stored, job.baseline = report, Measurement(evidence, reference, evidence.guards)
    return sample


def _attempts(job: _Job, model: Any, folder: Path) -> RunReport:
    """Execute once, or until a weaker edit passes; every attempt starts from the model's first state."""
    plan = _whole_plan(job) if job.request.until_pass else dict(job.settings.edit.plan)
    rows: list[dict[str, Any]] = []
    while True:
        started = time.perf_counter()
        report = _execute(job, model, plan, folder)
        metric = report.metrics.get("primary_metric") or report.metrics.get("probe") or {}
        rows.append(
            {
                "plan": plan,
                "ratio": metric.get("ratio_vs_baseline", metric.get("ratio")),
                "status": report.status,
                "reason": report.meta.get("rollback_reason"),
                "seconds": round(time.perf_counter() - started, 3),
            }
        )
        following = _next_plan(job, plan, report, len(rows))
        if following is None:
            break
        plan = following
    if job.request.until_pass:
        report.meta["attempts"] = rows
    return report


def _next_plan(job: _Job, plan: dict[str, Any], report: RunReport, done: int) -> dict[str, Any] | None:
    """Return the plan of the next attempt, or None where there is none to be made."""
    if not job.request.until_pass or report.status != "rollback":
        return None
    if done >= job.request.max_attempts:
        job.notes.append(f"no attempt of {done} passed; allow more with --max-attempts")
        return None
    if job.out_of_time():
        job.notes.append(f"no attempt of {done} passed within the {job.request.timeout:g} s of --timeout")
        return None
    following = weaker_plan(job.edit_name, plan)
    if following is None:
        job.notes.append(f"no attempt of {done} passed, and {job.edit_name} cannot be weakened further")
    return following


def _execute(job: _Job, model: Any, plan: dict[str, Any], folder: Path) -> RunReport:
    chosen, side = job.settings, job.side
    assert side is not None and job.sample is not None
    limit = chosen.eval.max_pm_ratio
    if job.request.until_pass:
        limit = min(limit, chosen.auto.target_pm_ratio, float(job.policy.values["metrics"]["pm_ratio"]["limit"]))
    data = job.sample.data.model_dump(exclude={"seq_len", "requested", "digest"})
    context = {
        **(chosen.context.model_extra or {}),
        "snapshot": chosen.context.snapshot.model_dump(exclude_unset=True),
        "profile": job.request.profile,
        "policy_overrides": chosen.policy_overrides(),
        "metric_kind": chosen.eval.metric_kind,
        "run_id": f"{job.request.name}-{job.stamp}",
        "model_id": side.id,
        "tokenizer_facts": side.tokenizer_facts,
        "data": data,
        "seed": int(job.policy.values["bootstrap"]["seed"]),
        "progress": job.progress,
    }
    runner = _Runner(job.baseline)
    report = runner.execute(
        model,
        job.adapter,
        registry.edits.create(job.edit_name, **plan),
        [
            registry.guards.create(name, **chosen.plugin_arguments(name))
            for name in job.policy.values["guards"]["order"]
        ],
        RunConfig(
            device=job.device,
            max_pm_ratio=limit,
            spike_threshold=chosen.eval.spike_threshold,
            event_path=folder / "events.jsonl",
            context=context,
        ),
        calibration_data=job.sample.windows,
        auto_config=chosen.auto.model_dump(),
    )
    job.baseline = runner.baseline
    if job.out_of_time() and report.status == "success" and not report.evidence:
        report.status, report.error = "failed", "stopped by --timeout before the edited model was measured"
    return report


def _complete(job: _Job, report: RunReport, model: Any) -> None:
    """Add to the report what the runner does not know: the files, the text, the plugins, a stored baseline's structure."""
    from invarlock.evidence.model import Evidence
    from invarlock.flow.overhead import guard_overhead

    assert job.sample is not None and job.side is not None
    context = {key: value for key, value in report.context.items() if key != "progress"}
    report.context = context
    report.meta["config"] = {**report.meta["config"], "event_path": "events.jsonl", "context": context}
    report.meta |= {"created": job.created, "plugins": _plugin_facts(job)}
    report.meta["warnings"] = [*job.notes, *report.meta["warnings"]]
    report.dataset = {**job.sample.data.model_dump(mode="json"), **report.dataset}
    if not report.evidence:
        return
    evidence = Evidence.model_validate(report.evidence)
    if job.edit_name == _NOOP:
        evidence = _as_files(evidence, job.side)
    if job.stored is not None:
        _disown_plugins(job, report)
        if "invariants" in report.guards:
            _hold_structure(report, job.baseline.evidence, evidence)
    if report.status == "success":
        limits = job.policy.values["metrics"]["guard_overhead"]
        report.meta["guard_overhead"] = guard_overhead(model, job.sample.windows, evidence, job.device, limits)
    report.evidence = evidence.model_dump(mode="json")


def _plugin_facts(job: _Job) -> dict[str, Any]:
    entries = registry.guards.entries()
    names = dict.fromkeys(job.policy.values["guards"]["order"])
    guards = [{"name": name, "origin": entries[name].origin, "version": entries[name].version} for name in names]
    return {"adapter": job.adapter.name, "edit": job.edit_name, "guards": guards}


def _as_files(evidence: Any, side: Side) -> Any:
    """State an unedited model's structure as its files have it: their types and bytes, not those it computes in."""
    if side.structure.source != "file":
        return evidence
    facts = evidence.model.model_copy(update={"behaviour": side.behaviour})
    return evidence.model_copy(update={"structure": side.structure, "model": facts})


def _hold_structure(report: RunReport, baseline: Any, subject: Any) -> None:
    """Compare structure with the stored baseline's: within the run the guard saw this model alone, before and after."""
    from invarlock.guards.invariants import InvariantsGuard

    guard = InvariantsGuard()
    sides = [
        guard.stats_from(side.structure, side.model.behaviour, side.model.tokenizer_digest, side.model.tokenizer_size)
        for side in (baseline, subject)
    ]
    policy = {**guard.defaults, **report.meta["policy"]["values"]["guards"].get("invariants", {})}
    outcome = checked_result("invariants", guard.judge(guard.pair(*sides), policy))
    seen = report.guards.get("invariants")
    report.guards["invariants"] = worst([*(seen.get("runs", [seen]) if seen else []), outcome])
    if report.status == "success" and consequence(outcome) in ("rollback", "abort"):
        report.status = "rollback"
        report.meta["rollback_reason"] = f"guard_failed: guard 'invariants': {outcome['message']}"


def _disown_plugins(job: _Job, report: RunReport) -> None:
    """Take back what plugin guards found where they were shown another model than the stored baseline in `prepare`."""
    from invarlock.certificate.make import BUILT_IN_GUARDS

    assert job.side is not None
    structures = (job.baseline.evidence.structure, job.side.structure)
    if all(s.source == "file" for s in structures) and len({s.weights_digest() for s in structures}) == 1:
        return
    for name in report.guards:
        if name not in BUILT_IN_GUARDS and hasattr(registry.guards.load(name), "prepare"):
            reason = (
                "it saw this model in prepare, not the stored baseline: use `invarlock certify`, which loads that one"
            )
            report.guards[name] = not_evaluated(name, reason)
            report.meta["warnings"].append(f"guard {name!r} is not evaluated: {reason}")


def _export_target(chosen: RunSettings, final: Path) -> Path | None:
    """Return where the edited model goes, None where it is not kept. Checked before anything long is started."""
    output = chosen.output
    if not (output.save_model or settings.flag("INVARLOCK_EXPORT_MODEL")):
        return None
    named = settings.get("INVARLOCK_EXPORT_DIR") or output.model_dir
    target = Path(str(named)) if named else final / output.model_subdir
    if not named and final.resolve() not in target.resolve().parents:
        raise ConfigError(
            f"output.model_subdir is {output.model_subdir!r}; expected a folder within the run's, or set output.model_dir"
        )
    require_free(target)
    return target


def _export(job: _Job, model: Any, target: Path, final: Path, folder: Path) -> Path:
    """Save the edited model with its tokenizer; whole or not at all."""
    inside = final in target.parents  # the run's own folder is staged already
    with staged_folder(folder / target.relative_to(final) if inside else target) as staging:
        job.adapter.save(model, staging)
        source = job.side.folder if job.side is not None else None
        for pattern in _TOKENIZER_FILES if source is not None else ():
            for file in sorted(source.glob(pattern)) if source is not None else ():
                if file.is_file() and not (staging / file.name).exists():
                    shutil.copyfile(file, staging / file.name)
    return target


def _write(job: _Job, report: dict[str, Any], folder: Path) -> None:
    """Write the report, and what later runs need of the baseline measured here: in this report where nothing was edited,
    in `baseline/` otherwise."""
    if job.stored is None and job.baseline is not None and job.side is not None:
        if job.edit_name == _NOOP:
            if report["evidence"]:
                report["evidence"]["token_file"] = _write_tokens(job.baseline, folder)
        else:
            evidence = _as_files(job.baseline.evidence, job.side).model_dump(mode="json")
            evidence["token_file"] = _write_tokens(job.baseline, folder / "baseline")
            meta = {**report["meta"], "run_id": f"{report['meta']['run_id']}-baseline"}
            kept = {key: report[key] for key in ("evaluation_windows", "dataset", "context")}
            edit = {"name": _NOOP, "deltas": {"params_changed": 0}}
            base = RunReport(meta=meta, edit=edit, status="success", evidence=evidence, **kept)
            write_report(base.to_dict(), folder / "baseline")
    elif job.stored is not None:
        report["meta"]["baseline"] = {
            "run_id": (job.stored.get("meta") or {}).get("run_id"),
            "evidence_digest": job.baseline.evidence.digest(),
        }
    write_report(report, folder)


def _write_tokens(baseline: Any, folder: Path) -> dict[str, Any] | None:
    from invarlock.flow.measure import write_reference

    if baseline.reference is None:
        return None
    return write_reference(baseline.reference, folder / EVIDENCE).model_dump(mode="json")
