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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from invarlock.certificate.gates import base_name
from invarlock.certificate.reports import check_baseline, evidence_of, make_certificate
from invarlock.checkpoints.side import Side
from invarlock.core import settings
from invarlock.core.api import AdapterLike, Context, EditLike, Guard, GuardWithPrepare, ModelLike, RunConfig, RunReport
from invarlock.core.device import library_versions, make_deterministic, resolve_device, thread_count
from invarlock.core.events import EventLog
from invarlock.core.exceptions import ConfigError, GuardError, PairingError
from invarlock.core.files import plain, write_json
from invarlock.eval.sources.base import Scores
from invarlock.evidence.model import finite_or_none
from invarlock.evidence.windows import WindowBatches, Windows, windows_from_calibration
from invarlock.flow import steps
from invarlock.flow.job import Job, no_tick, resolved_metric
from invarlock.flow.measure import Measurement, measure
from invarlock.flow.snapshot import Snapshot, plan_snapshot, take_snapshot
from invarlock.flow.synthetic_metric import synthetic_metric
from invarlock.guards.base import GuardWithRemedy, StatsGuard, configure_guards
from invarlock.guards.boundary import consequence, oneline, worst
from invarlock.policy.resolve import ResolvedPolicy, merge, resolve_policy

__all__ = ["CoreRunner", "StoredBaseline"]

_logger = logging.getLogger("invarlock.runner")
_AUTO: dict[str, Any] = {"enabled": True, "tier": "balanced", "probes": 2, "target_pm_ratio": 2.0}
_NO_DATA = "No calibration data provided: the primary metric is measured on random tokens and certifies nothing"
_NOT_SHOWN = "it saw this model in prepare, not the stored baseline: use `invarlock certify`, which loads that one"
#: keys of the context that are objects for the runner alone: no report shows them
_OBJECTS = ("baseline", "side", "progress")


@dataclass(frozen=True)
class StoredBaseline:
    """A baseline that was measured earlier, in the place of the unedited model: its report and its measurement."""

    report: Mapping[str, Any]
    measured: Measurement


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
        auto = _checked_auto(auto_config or {})
        if not hasattr(edit, "apply"):
            raise ConfigError(f"edit is {type(edit).__name__}; expected an object with name and apply(model, adapter)")
        job = _job(adapter, guards, config, str(auto["tier"]))
        if calibration_data is not None:
            job.windows = windows_from_calibration(calibration_data, preview_n, final_n).used_by(job.metric.task)
        run = _Run(job, model, edit, edit_config or {}, config, auto)
        handler = _verbose_handler() if config.verbose else logging.NullHandler()
        try:
            for phase in (run.prepare, run.guard_prepare, run.edit, run.guard_validate, run.eval, run.finalize):
                if not run.stop or phase == run.finalize:
                    with run.timed(phase.__name__):
                        phase()
        except Exception as error:  # noqa: BLE001 - whatever ended the run, the report says so and the model is as it was
            run.fail(error)
        except BaseException:  # Ctrl-C, or an edit that calls sys.exit
            run.restore("interrupted")
            raise
        finally:
            if run.snapshot is not None:
                run.snapshot.release()
            run.log.close()
            self.baseline = run.held_to
            logging.getLogger("invarlock").removeHandler(handler)
        return run.report


class _Run:
    """One `execute` at work: its state, and a method for each phase under the phase's name."""

    side: Side  # from `prepare` on
    snapshot: Snapshot | None = None
    subject: Measurement | None = None
    evaluation_error: Exception | None = None
    rollback_reason: str | None = None
    stop = False
    phases = 0

    def __init__(
        self, job: Job, model: ModelLike, edit: EditLike, edit_config: dict[str, Any], config: RunConfig, auto: Context
    ) -> None:
        context = config.context
        self.job, self.model, self.config, self.auto = job, model, config, auto
        self.its_edit, self.edit_config = edit, edit_config
        self.seed = int(context.get("seed", 42))
        self.held_to = _stored(context.get("baseline"))
        self.failed: dict[int, str] = {}
        self.results: dict[int, dict[str, Any]] = {}  # by place: a guard may stand twice
        run_id = str(context.get("run_id") or uuid.uuid4().hex[:12])
        shown = plain({key: value for key, value in context.items() if key not in _OBJECTS})
        events = config.event_path and Path(config.event_path).name
        asked = plain({**vars(config), "context": shown, "event_path": events})
        meta = {"run_id": run_id, "config": asked, "auto": auto, "warnings": [], "timings": {}}
        meta |= job.facts(str(getattr(edit, "name", type(edit).__name__)))
        self.report = RunReport(context=shown, meta=meta)
        self.log = EventLog(config.event_path, run_id=run_id)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Log a phase and how long it took; write the checkpoint that is due after it."""
        self.log.log(name, "start")
        _logger.info("%s: %s", self.log.run_id, name)
        started = time.perf_counter()
        yield
        self.report.meta["timings"][name] = seconds = round(time.perf_counter() - started, 4)
        self.log.log(name, "end", seconds=seconds)
        self.phases += 1
        every, path = self.config.checkpoint_interval, self.config.event_path
        if every and self.phases % every == 0 and path:
            write_json(Path(path).parent / f"checkpoint-{self.phases:02d}-{name}.json", self.report.to_dict())

    def prepare(self) -> None:
        job, report, config = self.job, self.report, self.config
        report.status = "running"
        job.device = resolve_device(config.device)
        make_deterministic(self.seed)
        if hasattr(self.model, "to"):
            self.model.to(job.device)
        model, seeds = job.adapter.describe(self.model), dict.fromkeys(("python", "numpy", "torch"), self.seed)
        report.meta |= {"device": job.device, "seeds": seeds, "versions": library_versions()}
        report.meta |= {"threads": thread_count(), "model": model}
        if config.checkpoint_interval and not config.event_path:
            self.warn("checkpoint_interval is set without event_path: no checkpoints are written")
        if job.windows is None:
            self.warn(_NO_DATA)
        vars(report).update(steps.text_facts(job))
        self.side = steps.side_in_memory(job, self.model, config.context)
        self.snapshot = take_snapshot(self.model, job.adapter, plan_snapshot(config.context))
        report.meta["snapshot"] = kept = {"mode": self.snapshot.mode, "bytes": self.snapshot.size_bytes}
        self.log.log("prepare", "snapshot", **kept)

    def guard_prepare(self) -> None:
        """Measure the unedited model on every window, then show it to every guard that wants to see it."""
        job, given = self.job, self.held_to
        if job.windows is not None and given is not None:
            _require_windows(job.windows, given.measured)
        elif job.windows is not None:
            measured = measure(job, self.model, self.side, "the unedited model")
            steps.remark_on_baseline(job, measured.evidence)
            report = steps.report(job, measured, steps.NOOP, f"{self.log.run_id}-baseline")
            self.held_to = StoredBaseline(report.to_dict(), measured)
        stats = self.held_to.measured.guard_stats if self.held_to is not None else None
        calib = WindowBatches(job.windows.all if job.windows is not None else (), stats)
        self.failed = steps.prepare_guards(job, job.guards, self.model, calib, self.report)
        if given is not None and not _same_weights(given.measured, self.side):
            shown = [i for i, g in enumerate(job.guards) if g in job.plugins and isinstance(g, GuardWithPrepare)]
            self.failed |= dict.fromkeys(shown, _NOT_SHOWN)
            job.notes += [f"guard {job.guards[i].name!r} is not evaluated: {_NOT_SHOWN}" for i in shown]
        while job.notes:
            self.warn(job.notes.pop(0))
        for place, guard in enumerate(job.guards):
            if place in self.failed or isinstance(guard, GuardWithPrepare):
                event = "not_evaluated" if place in self.failed else "prepared"
                self.log.log("guard_prepare", event, guard=guard.name)

    def edit(self) -> None:
        """Edit the model, and measure a few preview windows right away, so that a wrecked model stops here."""
        job, dry, windows = self.job, self.config.dry_run, self.job.windows
        facts, self.side = steps.apply_edit(job, self.model, self.side, self.its_edit, self.edit_config, dry_run=dry)
        self.report.edit = facts
        self.report.meta["plugins"]["edit"] = name = facts["name"]
        if dry:
            self.log.log("edit", "skipped", name=name)
            return
        self.log.log("edit", "applied", name=name, deltas=facts.get("deltas"))
        if windows is not None and self.held_to is not None and self.auto["probes"]:
            probe = job.score(self.model, windows.preview[: self.auto["probes"]])
            ratio = _ratio(self.held_to.measured.evidence.preview.loss, probe)
            self.report.metrics["probe"] = found = {"windows": len(probe.loss), "ratio": finite_or_none(ratio)}
            self.log.log("edit", "probe", **found)
            self._check_spike(ratio, f"the first {len(probe.loss)} window(s)")

    def guard_validate(self) -> None:
        """Score the edited model, ask every guard about it, and let those that may do something about what they found."""
        guards = self.job.guards
        self._measure_subject()
        self._ask(range(len(guards)))
        if self._remedied():
            found = {place: outcome["metrics"] for place, outcome in self.results.items()}
            self._measure_subject()
            self._ask([i for i, guard in enumerate(guards) if isinstance(guard, StatsGuard)])
            for place, outcome in self.results.items():
                done = {key: found[place].get(key) for key in ("corrections", "interval", "enabled")}
                outcome["metrics"] |= {key: value for key, value in done.items() if value}
        for place, outcome in sorted(self.results.items()):
            if place not in self.failed:
                self._follow(guards[place].name, outcome)

    def _measure_subject(self) -> None:
        """Score the model as it is now; an error waits for the phase of evaluation, since guards look at weights too."""
        self.subject = None
        if self.job.windows is not None and self.held_to is not None:
            try:
                held = self.held_to.measured
                self.subject = measure(self.job, self.model, self.side, "the edited model", baseline=held)
            except Exception as error:  # noqa: BLE001 - the model under test may raise anything; `eval` reports it
                self.evaluation_error = error

    def _ask(self, places: Sequence[int]) -> None:
        """Take the guards' results at these places, in order, up to the first that aborts."""
        context: Context = {"report": self.report, "run_context": self.config.context, "device": self.job.device}
        context["measurements"] = self.subject.guard_stats if self.subject is not None else {}
        for place in places:
            guard, failed = self.job.guards[place], self.failed.get(place)
            self.results[place] = outcome = steps.validate(self.job, guard, self.model, context, failed)
            self._show_results()
            if failed is None and consequence(outcome) == "abort":
                return

    def _show_results(self) -> None:
        """Put each guard's worst result into the report, in the guards' order."""
        named: dict[str, list[dict[str, Any]]] = {}
        for place, outcome in sorted(self.results.items()):
            named.setdefault(self.job.guards[place].name, []).append(outcome)
        self.report.guards = {name: worst(outcomes) for name, outcomes in named.items()}

    def _remedied(self) -> bool:
        """Let guards repair what they found; say whether the model is another one now."""
        job, changed = self.job, False
        if job.windows is not None and self.subject is not None and not self.config.dry_run:
            source = job.source(self.model)
            for place, outcome in self.results.items():
                guard = job.guards[place]
                if isinstance(guard, GuardWithRemedy):
                    repaired, did = guard.remedy(self.model, job.adapter, outcome, job.windows.all, source)
                    self.results[place], changed = repaired, changed or did
        return changed

    def _follow(self, name: str, outcome: Mapping[str, Any]) -> None:
        follows = consequence(outcome)
        self.log.log("guard_validate", "validated", guard=name, passed=outcome["passed"], action=follows)
        message = f"guard {name!r}: {outcome['message'] or 'failed without a message'}"
        if follows == "abort":
            raise GuardError(f"{message} (action: abort)")
        if follows == "rollback":
            self._roll_back(f"guard_failed: {message}")
        if follows == "warn":
            self.warn(message)

    def eval(self) -> None:
        report, job = self.report, self.job
        if job.windows is None:
            report.metrics["primary_metric"] = metric = synthetic_metric(self.model, job.adapter, job.device, self.seed)
            if metric["final"] is None:
                self.warn(f"no synthetic metric: {metric['reason']}")
            return
        if self.subject is None or self.held_to is None:
            assert self.evaluation_error is not None
            if settings.flag("INVARLOCK_EVAL_STRICT"):
                raise self.evaluation_error
            self.warn(f"evaluation failed and no metric was measured: {oneline(self.evaluation_error)}")
            return
        report.evidence = self.subject.evidence.model_dump(mode="json")
        report.meta["guard_overhead"] = steps.measure_overhead(job, self.model, self.subject)
        certificate = make_certificate(report, self.held_to.report)
        metric = {**certificate["primary_metric"], "source": "calibration_data", "mock": False}
        report.metrics |= {"primary_metric": metric, "verdict": certificate["verdict"]}
        self.log.log("eval", "primary_metric", ratio=metric["ratio_vs_baseline"], final=metric["final"])
        self._decide(_damage_ratio(metric), certificate["gates"])

    def _decide(self, ratio: float, gates: Sequence[Mapping[str, Any]]) -> None:
        """Roll back on a spike, a ratio above the run's own limit or, where they are asked for, a failed gate.

        Guards have had their say; a failed gate of theirs repeats it.
        """
        self._check_spike(ratio, "all windows")
        if not ratio <= self.config.max_pm_ratio:
            self._roll_back(f"primary_metric_ratio: {ratio:.4f} is above max_pm_ratio {self.config.max_pm_ratio:g}")
        held = self.config.context.get("gates")
        if not isinstance(held, Mapping):
            return
        for gate in gates:
            if gate["decision"] != "fail" or gate["basis"] in ("guard", "plugin guard"):
                continue
            if base_name(gate["name"]) in held.get("off", ()):
                self.warn(f"gate {gate['name']} failed and is switched off: {gate['reason']}")
            else:
                self._roll_back(f"gate_failed: {gate['name']}: {gate['reason']}")

    def _check_spike(self, ratio: float, where: str) -> None:
        limit = self.config.spike_threshold
        if not ratio < limit:
            shown = f"{ratio:.4g}" if math.isfinite(ratio) else "not finite"
            where = f"the ratio on {where} is {shown}"
            self._roll_back(f"primary_metric_spike: {where}, at or above spike_threshold {limit:g}")
            self.stop = True

    def _roll_back(self, reason: str) -> None:
        self.rollback_reason = self.rollback_reason or reason  # the first is the one to name

    def finalize(self) -> None:
        self._show_results()
        if self.rollback_reason is None:
            self.report.status = "success"
            self.log.log("finalize", "kept")
        else:
            self.restore(self.rollback_reason)
            self.report.status = "rollback"
            self.report.meta["rollback_reason"] = self.rollback_reason

    def restore(self, reason: str) -> None:
        if self.snapshot is not None:
            self.snapshot.restore(self.model)
        self.log.log("finalize", "rollback", reason=reason)

    def fail(self, error: Exception) -> None:
        text = oneline(error)
        try:
            self.restore(text)
        except Exception as second:  # noqa: BLE001 - an adapter of a plugin; the report says what is left behind
            text += f"; the model could not be restored, load it again: {oneline(second)}"
        self.report.status, self.report.error = "failed", text
        self.report.meta["rollback_reason"] = f"exception: {text}"
        self.log.log("finalize", "failed", error=text)
        _logger.debug("run failed", exc_info=error)

    def warn(self, message: str) -> None:
        _logger.warning("%s", message)
        self.report.meta["warnings"].append(message)
        self.log.log("run", "warning", message=message)


def _job(adapter: AdapterLike, guards: Sequence[Guard], config: RunConfig, tier: str) -> Job:
    context = config.context
    policy = _resolve(tier, context, guards)
    configure_guards(guards, policy.values["guards"])
    metric = resolved_metric(str(context.get("metric_kind") or "auto"), adapter)
    intent, tick = str(context.get("intent", "preserve")), context.get("progress") or no_tick
    return Job(policy, adapter, list(guards), config.device, metric, intent, tick=tick)


def _stored(given: object) -> StoredBaseline | None:
    """Take a baseline from the context: a report, or one that was read already."""
    if given is None or isinstance(given, StoredBaseline):
        return given
    report = given.to_dict() if isinstance(given, RunReport) else given
    evidence = evidence_of(report, "baseline")  # type: ignore[arg-type]  # it says what is wrong with anything else
    check_baseline(report)  # type: ignore[arg-type]
    return StoredBaseline(report, Measurement(evidence))  # type: ignore[arg-type]


def _checked_auto(given: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(given.keys() - _AUTO.keys())
    if unknown:
        raise ConfigError(f"auto_config has {unknown[0]!r}; expected only: {', '.join(_AUTO)}")
    auto = {**_AUTO, **given}
    if not isinstance(auto["probes"], int) or not 0 <= auto["probes"] <= 10:
        raise ConfigError(f"auto_config probes is {auto['probes']!r}; expected a whole number from 0 to 10")
    return auto


def _resolve(tier: str, context: Context, guards: Sequence[Guard]) -> ResolvedPolicy:
    """Resolve the policy; what the guards were constructed with, and another order than the tier's, count as explicit."""
    profile, adjustments = str(context.get("profile", "dev")), context.get("edit_adjustments")
    explicit = {
        guard.name: own for guard in guards if (own := getattr(guard, "overrides", None)) and isinstance(own, dict)
    }
    order = [guard.name for guard in guards]
    for part in (explicit, {"order": order, **explicit}):
        overrides = merge({"guards": part} if part else {}, context.get("policy_overrides") or {})
        policy = resolve_policy(tier, profile, overrides=overrides, edit_adjustments=adjustments)
        if policy.values["guards"]["order"] == order:
            break
    return policy


def _require_windows(windows: Windows, stored: Measurement) -> None:
    """Refuse windows that a stored baseline was not measured on, before anything is scored."""
    for split in ("preview", "final"):
        ours = {window.id for window in getattr(windows, split)}
        theirs = set(getattr(stored.evidence, split).window_ids)
        if ours != theirs:
            paired = f"{len(ours & theirs)} of {len(theirs)} windows are paired"
            message = f"{split}: {paired}; expected the baseline's: give the data that it was measured on"
            raise PairingError(message, code="E006")


def _same_weights(stored: Measurement, side: Side) -> bool:
    """Whether the model that guards saw in prepare is the stored baseline, by the digest of its weights."""
    ours, theirs = side.structure, stored.evidence.structure
    return bool(ours.tensors) and ours.weights_digest() == theirs.weights_digest()


def _ratio(baseline: Sequence[float | None], probe: Scores) -> float:
    """Return the ratio of perplexities on the first windows; NaN where one was not measured."""
    rows = zip(probe.tokens, probe.loss, baseline, strict=False)
    difference = sum(t * (math.nan if b is None else s - b) for t, s, b in rows) / sum(probe.tokens)
    return math.exp(min(difference, 700.0))


def _damage_ratio(metric: Mapping[str, Any]) -> float:
    """Return how many times worse the edited model is; NaN where that was not measured. More accuracy is better."""
    ratio = math.nan if metric["ratio_vs_baseline"] is None else float(metric["ratio_vs_baseline"])
    if metric["direction"] == "higher":
        return 1.0 / ratio if ratio else math.inf
    return ratio


def _verbose_handler() -> logging.Handler:
    handler, package = logging.StreamHandler(), logging.getLogger("invarlock")
    handler.setLevel(logging.INFO)
    package.addHandler(handler)
    package.setLevel(min(package.level or logging.INFO, logging.INFO))
    return handler
