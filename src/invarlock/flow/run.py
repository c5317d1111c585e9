"""`invarlock run`: one configuration in, one run's folder out.

1. files: read the checkpoint's files; take a stored baseline's windows, or cut them
2. model: load it
3. attempts: `CoreRunner.execute`, under `until_pass` with an edit that weakens until it passes
4. keep: the report, the baseline's evidence and, where asked for, the edited model; the folder appears whole or not at all
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from invarlock.checkpoints.side import Loading, Side
from invarlock.core import registry, settings
from invarlock.core.api import AdapterLike, ModelLike, RunConfig, RunReport
from invarlock.core.exceptions import ConfigError, PairingError, RunInterruptedError
from invarlock.core.leftovers import sweep
from invarlock.evidence.windows import Windows
from invarlock.flow import steps
from invarlock.flow.execute import CoreRunner, StoredBaseline
from invarlock.flow.job import Job, Tick, open_job, resolved_metric
from invarlock.flow.run_folder import REPORT, require_free, staged_folder
from invarlock.flow.sampling import check_same_data, cut_windows, dataset_options, reuse_windows
from invarlock.policy.config import RunSettings
from invarlock.policy.resolve import resolve_policy

__all__ = ["WEAKER", "Opened", "RunOutcome", "RunRequest", "open_model", "run", "weaker_plan"]

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
class _Work:
    """One `run` at work. `baseline`: stored, or measured by the first attempt."""

    request: RunRequest
    job: Job
    side: Side
    started: float
    baseline: StoredBaseline | None = None

    @property
    def edit(self) -> str:
        return self.request.settings.edit.name or _NOOP

    def out_of_time(self) -> bool:
        limit = self.request.timeout
        return limit is not None and time.monotonic() - self.started > limit

    def progress(self, what: str, done: int, total: int) -> None:
        """Show how far the measurement is; it is also where a run that takes too long ends."""
        if self.out_of_time():
            raise RunInterruptedError(f"stopped after {self.request.timeout:g} s, as --timeout asks")
        self.job.tick("measuring", done, total)


def weaker_plan(edit: str, plan: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the next weaker plan of an edit, or None where it cannot be weakened further.

    Raises ConfigError for an edit that `WEAKER` does not know.
    """
    if edit not in WEAKER:
        known = f"expected one of: {', '.join(WEAKER)}"
        raise ConfigError(f"--until-pass cannot weaken the edit {edit!r}; {known}: run it without --until-pass")
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
    started, chosen = time.monotonic(), request.settings
    sweep(request.out)
    job = _open(chosen, request.profile, tick)
    if request.until_pass:
        weaker_plan(chosen.edit.name or _NOOP, _whole_plan(chosen))
    final = request.out / request.name / job.stamp
    export = _export_target(chosen, final)
    with job.timed("files"):
        work = _Work(request, job, _read(job, chosen), started)
        if request.baseline is None:
            job.windows = cut_windows(job, work.side, dataset_options(chosen.dataset))
        else:
            work.baseline = _stored_baseline(job, request.baseline, work.side, dataset_options(chosen.dataset))
    with staged_folder(final, keep=not request.cleanup) as folder:
        with job.timed("load"):
            model = steps.load(job, work.side, "the model")
        report, saved = _attempts(work, model, folder), None
        if export is not None and report.status == "success":
            with job.timed("export"):
                saved = _export(job.adapter, model, work.side, export, final, folder)
        report.meta["warnings"] = [*job.notes, *report.meta["warnings"]]
        report.meta["timings"] = {**job.timings, **report.meta["timings"]}
        data = report.to_dict()
        if chosen.output.save_report:
            _write(work, data, folder)
    written = final / REPORT if chosen.output.save_report else None
    return RunOutcome(data, final, written, saved, job.notes, dict(data["meta"]["timings"]))


@dataclass(frozen=True)
class Opened:
    """A configuration's model, loaded, and the windows that it would be measured on."""

    model: ModelLike
    adapter: AdapterLike
    side: Side
    windows: Windows
    notes: list[str] = field(default_factory=list)


def open_model(chosen: RunSettings, profile: str, tick: Tick) -> Opened:
    """Load a configuration's model and cut its windows, without running anything."""
    job = _open(chosen, profile, tick)
    side = _read(job, chosen)
    windows = cut_windows(job, side, dataset_options(chosen.dataset))
    return Opened(steps.load(job, side, "the model"), job.adapter, side, windows, job.notes)


def _open(chosen: RunSettings, profile: str, tick: Tick | None) -> Job:
    policy = resolve_policy(chosen.auto.tier, profile, overrides=chosen.policy_overrides())
    model, notes = chosen.model, list(chosen.notes)
    if chosen.edit.name is None:
        notes.append("no edit is named: the model is measured as it is (noop)")
    return open_job(policy, model.adapter, model.device, (), tick, loading=Loading.of(model), notes=notes)


def _read(job: Job, chosen: RunSettings) -> Side:
    side = steps.read(job, str(chosen.model.id))
    job.metric = resolved_metric(chosen.eval.metric_kind, job.adapter)
    return side


def _whole_plan(chosen: RunSettings) -> dict[str, Any]:
    """Return the edit's plan with the edit's own defaults filled in, where it tells them."""
    edit = registry.edits.create(chosen.edit.name or _NOOP, **chosen.edit.plan)
    return {**getattr(edit, "settings", {}), **chosen.edit.plan}


def _stored_baseline(job: Job, path: Path, side: Side, dataset: Mapping[str, Any]) -> StoredBaseline:
    """Take windows and measurements from a stored report. Raises ConfigError where `dataset` asks for other data than it
    was measured on, and PairingError where this model cannot be held to it."""
    report, evidence, place = steps.stored_baseline(path)
    check_same_data(evidence.data, dataset)
    ours, theirs, data = side.tokenizer_facts[0], evidence.model.tokenizer_digest, evidence.data
    length = data.seq_len + len(data.prefix or ()) + len(data.suffix or ())
    if evidence.model.usage is None:  # measured by the first release, which digested tokenizers in another way
        ours = ((side.usage or {}).get("tokenizer") or {}).get("first_digest", ours)
    if evidence.metric_kind != job.metric.kind:
        kinds = f"this run measures {job.metric.kind}, the baseline {evidence.metric_kind}"
        raise PairingError(f"{kinds}; use one metric", code="E001")
    if ours != theirs:
        digests = f"the tokenizer of {side.id} (digest {str(ours)[:8]}) is not the baseline's ({str(theirs)[:8]})"
        raise PairingError(f"{digests}; expected the same: measure a baseline with this tokenizer", code="E002")
    if evidence.plan is not None and evidence.plan.reached[-1] != evidence.plan.windows:
        part = f"the baseline was measured on {sum(evidence.plan.reached[-1])} of {sum(evidence.plan.windows)} windows"
        raise PairingError(f"{part}, since certify decided early; measure it again with --no-early-stop", code="E001")
    if side.max_length and length > side.max_length:
        lengths = f"the baseline's windows have {length} tokens, {side.id} takes at most {side.max_length}"
        raise PairingError(f"{lengths}; measure the baseline with a shorter seq_len", code="E001")
    job.windows = reuse_windows(report)
    return StoredBaseline(report, steps.stored_measurement(evidence, place))


def _attempts(work: _Work, model: ModelLike, folder: Path) -> RunReport:
    """Execute once, or until a weaker edit passes; every attempt starts from the model's first state."""
    chosen, until_pass = work.request.settings, work.request.until_pass
    plan: dict[str, Any] | None = _whole_plan(chosen) if until_pass else dict(chosen.edit.plan)
    rows: list[dict[str, Any]] = []
    while plan is not None:
        started = time.perf_counter()
        report = _execute(work, model, plan, folder)
        metric = report.metrics.get("primary_metric") or report.metrics.get("probe") or {}
        ratio, reason = metric.get("ratio_vs_baseline", metric.get("ratio")), report.meta.get("rollback_reason")
        row = {"plan": plan, "ratio": ratio, "status": report.status, "reason": reason}
        rows.append({**row, "seconds": round(time.perf_counter() - started, 3)})
        plan = _next_plan(work, plan, report, len(rows))
    if until_pass:
        report.meta["attempts"] = rows
    return report


def _next_plan(work: _Work, plan: dict[str, Any], report: RunReport, done: int) -> dict[str, Any] | None:
    """Return the plan of the next attempt, or None where there is none to be made."""
    request, following = work.request, None
    if not request.until_pass or report.status != "rollback":
        return None
    if done >= request.max_attempts:
        why = "; allow more with --max-attempts"
    elif work.out_of_time():
        why = f" within the {request.timeout:g} s of --timeout"
    else:
        following, why = weaker_plan(work.edit, plan), f", and {work.edit} cannot be weakened further"
    if following is None:
        work.job.notes.append(f"no attempt of {done} passed{why}")
    return following


def _execute(work: _Work, model: ModelLike, plan: dict[str, Any], folder: Path) -> RunReport:
    job, request, chosen = work.job, work.request, work.request.settings
    limits, limit = job.policy.limits, chosen.eval.max_pm_ratio
    if request.until_pass:
        limit = min(limit, chosen.auto.target_pm_ratio, limits.ratio.limit)
    context = {
        **(chosen.context.model_extra or {}),
        "snapshot": chosen.context.snapshot.model_dump(exclude_unset=True),
        "profile": request.profile,
        "policy_overrides": chosen.policy_overrides(),
        "metric_kind": chosen.eval.metric_kind,
        "run_id": f"{request.name}-{job.stamp}",
        "model_id": work.side.id,
        "side": work.side,
        "seed": limits.bootstrap.seed,
        "gates": {"off": list(chosen.eval.gates_off)},
        "progress": work.progress,
        "baseline": work.baseline,
    }
    edit = registry.edits.create(work.edit, **plan)
    guards = steps.create_guards(limits.order, {name: chosen.plugin_arguments(name) for name in limits.order})
    config = RunConfig(job.device, limit, chosen.eval.spike_threshold, folder / "events.jsonl", context=context)
    runner, auto = CoreRunner(), chosen.auto.model_dump()
    report = runner.execute(model, job.adapter, edit, guards, config, calibration_data=job.windows, auto_config=auto)
    work.baseline = work.baseline or runner.baseline
    if work.out_of_time() and report.status == "success" and not report.evidence:
        report.status, report.error = "failed", "stopped by --timeout before the edited model was measured"
    return report


def _export_target(chosen: RunSettings, final: Path) -> Path | None:
    """Return where the edited model goes, None where it is not kept. Checked before anything long is started."""
    output = chosen.output
    if not (output.save_model or settings.flag("INVARLOCK_EXPORT_MODEL")):
        return None
    named = settings.get("INVARLOCK_EXPORT_DIR") or output.model_dir
    target = Path(str(named)) if named else final / output.model_subdir
    if not named and final.resolve() not in target.resolve().parents:
        expected = "expected a folder within the run's, or set output.model_dir"
        raise ConfigError(f"output.model_subdir is {output.model_subdir!r}; {expected}")
    require_free(target)
    return target


def _export(adapter: AdapterLike, model: ModelLike, side: Side, target: Path, final: Path, folder: Path) -> Path:
    """Save the edited model with its tokenizer; whole or not at all."""
    inside = final in target.parents  # the run's own folder is staged already
    with staged_folder(folder / target.relative_to(final) if inside else target) as staging:
        adapter.save(model, staging)  # type: ignore[attr-defined]  # every adapter that a registry makes has it
        for file in [f for name in _TOKENIZER_FILES for f in sorted(side.folder.glob(name))] if side.folder else ():
            if file.is_file() and not (staging / file.name).exists():
                shutil.copyfile(file, staging / file.name)
    return target


def _write(work: _Work, report: dict[str, Any], folder: Path) -> None:
    """Write the report, and what later runs need of the baseline measured here: in this report where nothing was edited,
    in `baseline/` otherwise."""
    base, reference = work.baseline, None
    if base is not None and work.request.baseline is not None:
        about = {"run_id": (base.report.get("meta") or {}).get("run_id")}
        report["meta"]["baseline"] = {**about, "evidence_digest": base.measured.evidence.digest()}
    elif base is not None and work.edit != _NOOP:
        steps.write_measured(dict(base.report), base.measured.reference, folder / "baseline")
    elif base is not None and report["evidence"]:
        reference = base.measured.reference
    steps.write_measured(report, reference, folder)
