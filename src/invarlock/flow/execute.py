"""`CoreRunner`: prepare → guard prepare → edit → guard validate → eval → finalize or roll back, one method a phase.

The edited model is scored once, when the guards are asked about it, and every figure of the run comes from that pass. A
guard's remedy that changes the model (spectral correction, variance equalisation) calls for a second one.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from invarlock.certificate.reports import check_baseline, evidence_of
from invarlock.checkpoints.side import Side
from invarlock.core import settings
from invarlock.core.api import AdapterLike, Context, EditLike, Guard, GuardWithPrepare, ModelLike, RunConfig, RunReport
from invarlock.core.device import library_versions, make_deterministic, resolve_device, thread_count
from invarlock.core.events import EventLog
from invarlock.core.exceptions import ConfigError, GuardError, PairingError
from invarlock.core.files import plain, write_json
from invarlock.eval.sources.base import score_all
from invarlock.eval.sources.torch_model import TorchSource
from invarlock.evidence.model import finite_or_none
from invarlock.evidence.windows import WindowBatches, windows_from_calibration
from invarlock.flow import steps
from invarlock.flow.job import Job, no_tick, resolved_metric
from invarlock.flow.measure import Measurement, measure
from invarlock.flow.snapshot import Snapshot, plan_snapshot, take_snapshot
from invarlock.flow.synthetic_metric import synthetic_metric
from invarlock.guards.base import GuardWithRemedy, StatsGuard, configure_guards
from invarlock.guards.boundary import consequence, oneline, worst
from invarlock.policy.resolve import ResolvedPolicy, merge, resolve_policy

__all__ = ["CoreRunner", "StoredBaseline"]

logger = logging.getLogger("invarlock.runner")
_AUTO_KEYS = ("enabled", "tier", "probes", "target_pm_ratio")
_DEFAULT_PROBES = 2
_NO_DATA = "No calibration data provided: the primary metric is measured on random tokens and certifies nothing"
_NOT_SHOWN = "it saw this model in prepare, not the stored baseline: use `invarlock certify`, which loads that one"
#: keys of the context that are objects for the runner alone: no report shows them
_OBJECTS = ("baseline", "side", "progress")


@dataclass(frozen=True)
class StoredBaseline:
    """A baseline that was measured earlier, in the place of the unedited model: its report and its measurement."""

    report: Mapping[str, Any]
    measured: Measurement


@dataclass
class _Run:
    """The state of one `execute`."""

    job: Job
    model: ModelLike
    edit: EditLike
    config: RunConfig
    edit_config: dict[str, Any]
    auto: dict[str, Any]
    log: EventLog
    report: RunReport
    seed: int
    stored: StoredBaseline | None = None  # given
    own: StoredBaseline | None = None  # measured here
    side: Side | None = None
    snapshot: Snapshot | None = None
    baseline: Measurement | None = None
    subject: Measurement | None = None
    evaluation_error: Exception | None = None
    results: dict[int, dict[str, Any]] = field(default_factory=dict)  # by place: a guard may stand twice
    failed: dict[int, str] = field(default_factory=dict)
    rollback_reason: str | None = None
    stop: bool = False
    phases: int = 0


class CoreRunner:
    """Runs one edit under guards. The only supported entry point for programmatic runs is `execute`.

    `baseline` is what the last run was held to: given in its context, or measured by it.
    """

    baseline: StoredBaseline | None = None

    def execute(
        self,
        model: ModelLike,
        adapter: AdapterLike,
        edit: EditLike,
        guards: Sequence[Guard],
        config: RunConfig,
        *,
        calibration_data: object = None,
        auto_config: dict[str, Any] | None = None,
        edit_config: dict[str, Any] | None = None,
        preview_n: int | None = None,
        final_n: int | None = None,
    ) -> RunReport:
        """Edit `model` in place, check it, and keep or roll back the edit.

        Returns a `RunReport` with status `success`, `rollback` (with `meta.rollback_reason`) or `failed` (with `error`);
        in the last two the model is back in its first state, bit for bit. Raises ConfigError and DataError for arguments
        that cannot be used, before anything is touched.
        """
        run = _open(model, adapter, edit, guards, config, auto_config or {}, edit_config or {})
        if calibration_data is not None:
            run.job.windows = windows_from_calibration(calibration_data, preview_n, final_n)
        phases: tuple[tuple[str, Callable[[_Run], None]], ...] = (
            ("prepare", self._prepare),
            ("guard_prepare", self._prepare_guards),
            ("edit", self._apply_edit),
            ("guard_validate", self._validate_guards),
            ("eval", self._evaluate),
        )
        handler = _verbose_handler() if config.verbose else None
        try:
            for name, phase in phases:
                if not run.stop:
                    with self._phase(run, name):
                        phase(run)
            with self._phase(run, "finalize"):
                self._finalize(run)
        except Exception as error:  # noqa: BLE001 - whatever ended the run, the report says so and the model is as it was
            self._fail(run, error)
        except BaseException:  # Ctrl-C, or an edit that calls sys.exit
            self._restore(run, "interrupted")
            raise
        finally:
            if run.snapshot is not None:
                run.snapshot.release()
            run.log.close()
            self.baseline = run.stored or run.own
            if handler is not None:
                logging.getLogger("invarlock").removeHandler(handler)
        return run.report

    @contextlib.contextmanager
    def _phase(self, run: _Run, name: str) -> Iterator[None]:
        run.log.log(name, "start")
        logger.info("%s: %s", run.report.meta["run_id"], name)
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        run.report.meta["timings"][name] = round(seconds, 4)
        run.log.log(name, "end", seconds=round(seconds, 4))
        run.phases += 1
        every = run.config.checkpoint_interval
        if every and run.phases % every == 0 and run.config.event_path:
            folder = Path(run.config.event_path).parent
            write_json(folder / f"checkpoint-{run.phases:02d}-{name}.json", run.report.to_dict())

    def _prepare(self, run: _Run) -> None:
        job, report = run.job, run.report
        report.status = "running"
        job.device = resolve_device(run.config.device)
        make_deterministic(run.seed)
        if hasattr(run.model, "to"):
            run.model.to(job.device)
        report.meta.update(
            device=job.device,
            seeds={"python": run.seed, "numpy": run.seed, "torch": run.seed},
            versions=library_versions(),
            threads=thread_count(),
            model=job.adapter.describe(run.model),
        )
        if run.config.checkpoint_interval and not run.config.event_path:
            self._warn(run, "checkpoint_interval is set without event_path: no checkpoints are written")
        if job.windows is None:
            self._warn(run, _NO_DATA)
        else:
            stored = settings.flag("INVARLOCK_STORE_EVAL_WINDOWS")
            report.evaluation_windows = job.windows.to_dict() if stored else {}
            report.dataset = steps.dataset_facts(job)
        run.side = steps.side_in_memory(job, run.model, run.config.context)
        run.snapshot = take_snapshot(run.model, job.adapter, plan_snapshot(run.config.context))
        report.meta["snapshot"] = {"mode": run.snapshot.mode, "bytes": run.snapshot.size_bytes}
        run.log.log("prepare", "snapshot", mode=run.snapshot.mode, bytes=run.snapshot.size_bytes)

    def _prepare_guards(self, run: _Run) -> None:
        """Measure the unedited model on every window, then show it to every guard that wants to see it."""
        job = run.job
        assert run.side is not None
        if run.stored is not None:
            run.baseline = run.stored.measured
            _require_windows(job, run.baseline)
        elif job.windows is not None:
            run.baseline = measure(job, run.model, run.side, "the unedited model")
            report = steps.baseline_report(job, run.baseline, f"{_id(run)}-baseline")
            run.own = StoredBaseline(report.to_dict(), run.baseline)
        windows = job.windows.all if job.windows is not None else ()
        calib = WindowBatches(windows, run.baseline.guard_stats if run.baseline else None)
        run.failed = steps.prepare_guards(job, job.guards, run.model, calib, run.report)
        if run.stored is not None and not _same_weights(run.stored.measured, run.side):
            shown = [i for i, g in enumerate(job.guards) if g in job.plugins and isinstance(g, GuardWithPrepare)]
            run.failed |= dict.fromkeys(shown, _NOT_SHOWN)
            job.notes += [f"guard {job.guards[i].name!r} is not evaluated: {_NOT_SHOWN}" for i in shown]
        self._take_notes(run)
        for place, guard in enumerate(job.guards):
            if place in run.failed:
                run.log.log("guard_prepare", "not_evaluated", guard=guard.name)
            elif isinstance(guard, GuardWithPrepare):
                run.log.log("guard_prepare", "prepared", guard=guard.name)

    def _apply_edit(self, run: _Run) -> None:
        assert run.side is not None
        dry = run.config.dry_run
        run.report.edit, run.side = steps.apply_edit(
            run.job, run.model, run.side, run.edit, run.edit_config, dry_run=dry
        )
        name = run.report.edit["name"]
        run.report.meta["plugins"]["edit"] = name
        if dry:
            run.log.log("edit", "skipped", name=name)
            return
        run.log.log("edit", "applied", name=name, deltas=run.report.edit.get("deltas"))
        self._probe(run)

    def _probe(self, run: _Run) -> None:
        """Measure a few preview windows right away, so that a wrecked model stops here."""
        windows = run.job.windows
        count = min(run.auto["probes"], len(windows.preview)) if windows is not None else 0
        if not count or windows is None or run.baseline is None:
            return
        source = TorchSource(run.model, run.job.metric.task, device=run.job.device)
        probe = score_all(source.score(windows.preview[:count]), count)
        ratio = _ratio(run.baseline.evidence.preview.loss[:count], probe.loss, probe.tokens)
        run.report.metrics["probe"] = {"windows": count, "ratio": finite_or_none(ratio)}
        run.log.log("edit", "probe", windows=count, ratio=finite_or_none(ratio))
        self._check_spike(run, ratio, f"the first {count} window(s)")

    def _check_spike(self, run: _Run, ratio: float, where: str) -> None:
        if not ratio < run.config.spike_threshold:
            shown = f"{ratio:.4g}" if math.isfinite(ratio) else "not finite"
            run.rollback_reason = run.rollback_reason or (
                f"primary_metric_spike: the ratio on {where} is {shown}, at or above spike_threshold "
                f"{run.config.spike_threshold:g}"
            )
            run.stop = True

    def _validate_guards(self, run: _Run) -> None:
        """Score the edited model, ask every guard about it, and let those that may do something about what they found."""
        self._measure_subject(run)
        self._ask(run, range(len(run.job.guards)))
        if self._remedied(run):
            found = {place: outcome["metrics"] for place, outcome in run.results.items()}
            self._measure_subject(run)
            self._ask(run, [i for i, guard in enumerate(run.job.guards) if isinstance(guard, StatsGuard)])
            for place, outcome in run.results.items():
                done = {key: found[place].get(key) for key in ("corrections", "interval", "enabled")}
                outcome["metrics"] |= {key: value for key, value in done.items() if value}
        for place, outcome in sorted(run.results.items()):
            if place not in run.failed:
                name, follows = run.job.guards[place].name, consequence(outcome)
                run.log.log("guard_validate", "validated", guard=name, passed=outcome["passed"], action=follows)
                self._apply_consequence(run, name, outcome, follows)

    def _ask(self, run: _Run, places: Sequence[int]) -> None:
        """Take the guards' results at these places, in order, up to the first that aborts."""
        job = run.job
        context: Context = {
            "report": run.report,
            "run_context": run.config.context,
            "device": job.device,
            "measurements": run.subject.guard_stats if run.subject is not None else {},
        }
        failed = {number: run.failed[place] for number, place in enumerate(places) if place in run.failed}
        outcomes = steps.validate_guards(job, [job.guards[i] for i in places], run.model, context, failed)
        for place, (_, outcome) in zip(places, outcomes, strict=False):
            run.results[place] = outcome
            run.report.guards = _by_name(run)
            if place not in run.failed and consequence(outcome) == "abort":
                return

    def _remedied(self, run: _Run) -> bool:
        """Let guards repair what they found; say whether the model is another one now."""
        windows, changed = run.job.windows, False
        if windows is None or run.subject is None or run.config.dry_run:
            return False
        source = TorchSource(run.model, run.job.metric.task, device=run.job.device)
        for place, outcome in run.results.items():
            guard = run.job.guards[place]
            if isinstance(guard, GuardWithRemedy):
                run.results[place], did = guard.remedy(run.model, run.job.adapter, outcome, windows.all, source)
                changed = changed or did
        return changed

    def _measure_subject(self, run: _Run) -> None:
        """Score the model as it is now; an error waits for the phase of evaluation, since guards look at weights too."""
        assert run.side is not None
        run.subject = None
        if run.baseline is None:
            return
        try:
            run.subject = measure(run.job, run.model, run.side, "the edited model", reference=run.baseline.reference)
        except Exception as error:  # noqa: BLE001 - the model under test may raise anything; `_evaluate` reports it
            run.evaluation_error = error

    def _apply_consequence(self, run: _Run, name: str, outcome: dict[str, Any], follows: str) -> None:
        message = f"guard {name!r}: {outcome['message'] or 'failed without a message'}"
        if follows == "abort":
            raise GuardError(f"{message} (action: abort)")
        if follows == "rollback" and run.rollback_reason is None:
            run.rollback_reason = f"guard_failed: {message}"
        if follows == "warn":
            self._warn(run, message)

    def _evaluate(self, run: _Run) -> None:
        if run.job.windows is None:
            metric = synthetic_metric(run.model, run.job.adapter, run.job.device, run.seed)
            run.report.metrics["primary_metric"] = metric
            if metric["final"] is None:
                self._warn(run, f"no synthetic metric: {metric['reason']}")
            return
        if run.subject is None:
            assert run.evaluation_error is not None
            if settings.flag("INVARLOCK_EVAL_STRICT"):
                raise run.evaluation_error
            self._warn(run, f"evaluation failed and no metric was measured: {oneline(run.evaluation_error)}")
            return
        run.report.evidence = run.subject.evidence.model_dump(mode="json")
        run.report.meta["guard_overhead"] = steps.measure_overhead(run.job, run.model, run.subject)
        certificate = self._compare(run)
        metric = {**certificate["primary_metric"], "source": "calibration_data", "mock": False}
        run.report.metrics |= {"primary_metric": metric, "verdict": certificate["verdict"]}
        run.log.log("eval", "primary_metric", ratio=metric["ratio_vs_baseline"], final=metric["final"])
        self._decide(run, _damage_ratio(metric), certificate["gates"])

    def _compare(self, run: _Run) -> dict[str, Any]:
        held_to = run.stored or run.own
        assert held_to is not None
        return steps.compare(run.report, held_to.report)

    def _decide(self, run: _Run, ratio: float, gates: Sequence[Mapping[str, Any]]) -> None:
        """Roll back on a spike, a ratio above the run's own limit or, where they are asked for, a failed gate.

        Guards have had their say; a failed gate of theirs repeats it.
        """
        self._check_spike(run, ratio, "all windows")
        if run.rollback_reason is None and not ratio <= run.config.max_pm_ratio:
            run.rollback_reason = f"primary_metric_ratio: {ratio:.4f} is above max_pm_ratio {run.config.max_pm_ratio:g}"
        held = run.config.context.get("gates")
        if not isinstance(held, Mapping):
            return
        for gate in gates:
            judged = gate["decision"] == "fail" and gate["basis"] not in ("guard", "plugin guard")
            if judged and gate["name"] in held.get("off", ()):
                self._warn(run, f"gate {gate['name']} failed and is switched off: {gate['reason']}")
            elif judged and run.rollback_reason is None:
                run.rollback_reason = f"gate_failed: {gate['name']}: {gate['reason']}"

    def _finalize(self, run: _Run) -> None:
        run.report.guards = _by_name(run)
        if run.rollback_reason is not None:
            self._restore(run, run.rollback_reason)
            run.report.status = "rollback"
            run.report.meta["rollback_reason"] = run.rollback_reason
            return
        run.report.status = "success"
        run.log.log("finalize", "kept")

    def _restore(self, run: _Run, reason: str) -> None:
        if run.snapshot is not None:
            run.snapshot.restore(run.model)
        run.log.log("finalize", "rollback", reason=reason)

    def _fail(self, run: _Run, error: Exception) -> None:
        text = oneline(error)
        try:
            self._restore(run, text)
        except Exception as second:  # noqa: BLE001 - an adapter of a plugin; the report says what is left behind
            text += f"; the model could not be restored, load it again: {oneline(second)}"
        run.report.status = "failed"
        run.report.error = text
        run.report.meta["rollback_reason"] = f"exception: {run.report.error}"
        run.log.log("finalize", "failed", error=run.report.error)
        logger.debug("run failed", exc_info=error)

    def _warn(self, run: _Run, message: str) -> None:
        logger.warning("%s", message)
        run.report.meta["warnings"].append(message)
        run.log.log("run", "warning", message=message)

    def _take_notes(self, run: _Run) -> None:
        for note in run.job.notes:
            self._warn(run, note)
        run.job.notes.clear()


def _open(
    model: ModelLike,
    adapter: AdapterLike,
    edit: EditLike,
    guards: Sequence[Guard],
    config: RunConfig,
    auto_config: Mapping[str, Any],
    edit_config: Mapping[str, Any],
) -> _Run:
    """Check every argument before the run begins."""
    auto = _checked_auto(auto_config)
    if not hasattr(edit, "apply"):
        raise ConfigError(f"edit is {type(edit).__name__}; expected an object with name and apply(model, adapter)")
    context = config.context
    policy = _resolve(auto, context, guards)
    configure_guards(guards, policy.values["guards"])
    job = Job(
        policy=policy,
        adapter=adapter,
        guards=list(guards),
        metric=resolved_metric(str(context.get("metric_kind") or "auto"), adapter),
        device=config.device,
        intent=str(context.get("intent", "preserve")),
        tick=context.get("progress") or no_tick,
    )
    run_id = str(context.get("run_id") or uuid.uuid4().hex[:12])
    shown = plain({key: value for key, value in context.items() if key not in _OBJECTS})
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    event_path = None if config.event_path is None else Path(config.event_path).name
    meta = {
        "run_id": run_id,
        "config": plain({**values, "context": shown, "event_path": event_path}),
        "auto": auto,
        "warnings": [],
        "timings": {},
        **job.facts(str(getattr(edit, "name", type(edit).__name__))),
    }
    return _Run(
        job=job,
        model=model,
        edit=edit,
        config=config,
        edit_config=dict(edit_config),
        auto=auto,
        log=EventLog(config.event_path, run_id=run_id),
        report=RunReport(status="pending", context=shown, meta=meta),
        seed=int(context.get("seed", 42)),
        stored=_stored(context.get("baseline")),
    )


def _stored(given: object) -> StoredBaseline | None:
    """Take a baseline from the context: a report, or one that was read already."""
    if given is None or isinstance(given, StoredBaseline):
        return given
    report = given.to_dict() if isinstance(given, RunReport) else given
    evidence = evidence_of(report, "baseline")  # type: ignore[arg-type]  # it says what is wrong with anything else
    check_baseline(report)  # type: ignore[arg-type]
    return StoredBaseline(report, Measurement(evidence))  # type: ignore[arg-type]


def _by_name(run: _Run) -> dict[str, dict[str, Any]]:
    """Return each guard's worst result, in the guards' order."""
    named: dict[str, list[dict[str, Any]]] = {}
    for place, outcome in sorted(run.results.items()):
        named.setdefault(run.job.guards[place].name, []).append(outcome)
    return {name: worst(outcomes) for name, outcomes in named.items()}


def _id(run: _Run) -> str:
    return str(run.report.meta["run_id"])


def _checked_auto(given: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(given.keys() - set(_AUTO_KEYS))
    if unknown:
        raise ConfigError(f"auto_config has {unknown[0]!r}; expected only: {', '.join(_AUTO_KEYS)}")
    auto = {"enabled": True, "tier": "balanced", "probes": _DEFAULT_PROBES, "target_pm_ratio": 2.0, **given}
    if not isinstance(auto["probes"], int) or not 0 <= auto["probes"] <= 10:
        raise ConfigError(f"auto_config probes is {auto['probes']!r}; expected a whole number from 0 to 10")
    return auto


def _resolve(auto: Mapping[str, Any], context: Context, guards: Sequence[Guard]) -> ResolvedPolicy:
    """Resolve the policy; what the guards were constructed with, and another order than the tier's, count as explicit."""
    profile, adjustments = str(context.get("profile", "dev")), context.get("edit_adjustments")
    given = context.get("policy_overrides") or {}
    explicit: dict[str, Any] = {}
    for guard in guards:
        overrides = getattr(guard, "overrides", None)
        if isinstance(overrides, dict) and overrides:
            explicit[guard.name] = overrides
    order = [guard.name for guard in guards]

    def resolve(part: Mapping[str, Any]) -> ResolvedPolicy:
        overrides = merge({"guards": part} if part else {}, given)
        return resolve_policy(str(auto["tier"]), profile, overrides=overrides, edit_adjustments=adjustments)

    policy = resolve(explicit)
    return policy if policy.values["guards"]["order"] == order else resolve({"order": order, **explicit})


def _require_windows(job: Job, stored: Measurement) -> None:
    """Refuse windows that a stored baseline was not measured on, before anything is scored."""
    for split in ("preview", "final") if job.windows is not None else ():
        ours = {window.id for window in getattr(job.windows, split)}
        theirs = set(getattr(stored.evidence, split).window_ids)
        if ours != theirs:
            raise PairingError(
                f"{split}: {len(ours & theirs)} of {len(theirs)} windows are paired; expected the baseline's: give the data "
                "that it was measured on",
                code="E006",
            )


def _same_weights(stored: Measurement, side: Side) -> bool:
    """Whether the model that guards saw in prepare is the stored baseline, by the digest of its weights."""
    return (
        bool(side.structure.tensors) and stored.evidence.structure.weights_digest() == side.structure.weights_digest()
    )


def _ratio(baseline: Sequence[float | None], subject: Sequence[float], tokens: Sequence[int]) -> float:
    total = sum(tokens)
    if any(value is None for value in baseline):
        return math.nan
    difference = sum(t * (s - float(b or 0.0)) for b, s, t in zip(baseline, subject, tokens, strict=True)) / total
    return math.exp(min(difference, 700.0)) if not math.isnan(difference) else math.nan


def _damage_ratio(metric: Mapping[str, Any]) -> float:
    """Return how many times worse the edited model is; NaN where that was not measured. More accuracy is better."""
    ratio = metric["ratio_vs_baseline"]
    if ratio is None:
        return math.nan
    if metric["direction"] == "higher":
        return 1.0 / ratio if ratio else math.inf
    return float(ratio)


def _verbose_handler() -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setLevel(logging.INFO)
    logger = logging.getLogger("invarlock")
    logger.addHandler(handler)
    logger.setLevel(min(logger.level or logging.INFO, logging.INFO))
    return handler
