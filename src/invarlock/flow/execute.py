"""`CoreRunner`: prepare → guard prepare → edit → guard validate → eval → finalize or roll back, one method a phase."""

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

from invarlock.core import settings
from invarlock.core.api import EditLike, Guard, GuardWithPrepare, RunConfig, RunReport
from invarlock.core.events import EventLog
from invarlock.core.exceptions import ConfigError, GuardError
from invarlock.core.files import plain, write_json
from invarlock.flow.snapshot import Snapshot, plan_snapshot, take_snapshot
from invarlock.guards.boundary import consequence, not_evaluated, oneline, prepare_guard, validate_guard, worst
from invarlock.policy.resolve import ResolvedPolicy, merge, resolve_policy

__all__ = ["CoreRunner"]

logger = logging.getLogger("invarlock.runner")
_AUTO_KEYS = ("enabled", "tier", "probes", "target_pm_ratio")
_DEFAULT_PROBES = 2
_NO_DATA = "No calibration data provided: the primary metric is measured on random tokens and certifies nothing"


class CalibrationBatches(Sequence[dict[str, Any]]):
    """The windows of a run as guards see them: batches of one. `measurements` holds what was measured already."""

    def __init__(self, windows: Sequence[Any], measurements: Mapping[str, Any] | None = None) -> None:
        self._windows = windows
        self.measurements = dict(measurements or {})

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        window = self._windows[index]
        batch: dict[str, Any] = {
            "input_ids": [list(window.input_ids)],
            "attention_mask": [list(window.mask or [1] * len(window.input_ids))],
        }
        if window.labels is not None:
            batch["labels"] = [list(window.labels)]
        return batch


@dataclass
class _Run:
    """The state of one `execute`."""

    model: Any
    adapter: Any
    edit: EditLike
    guards: list[Guard]
    config: RunConfig
    edit_config: dict[str, Any]
    auto: dict[str, Any]
    policy: ResolvedPolicy
    log: EventLog
    report: RunReport
    windows: Any  # eval.windows.WindowSet, or None without calibration data
    device: str = "cpu"
    seed: int = 42
    snapshot: Snapshot | None = None
    baseline: Any = None  # eval.measure.Measurement
    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    skipped: set[int] = field(default_factory=set)
    subject_stats: dict[str, dict[str, Any]] = field(default_factory=dict)
    rollback_reason: str | None = None
    stop: bool = False
    phases: int = 0

    @property
    def metric_kind(self) -> str:
        asked = self.config.context.get("metric_kind") or "auto"
        kind = getattr(self.adapter, "metric_kind", "ppl_causal") if asked == "auto" else asked
        return str(kind)


class CoreRunner:
    """Runs one edit under guards. The only supported entry point for programmatic runs is `execute`."""

    def execute(
        self,
        model: Any,
        adapter: Any,
        edit: EditLike,
        guards: Sequence[Guard],
        config: RunConfig,
        *,
        calibration_data: Any = None,
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
        run = self._open(
            model, adapter, edit, guards, config, calibration_data, auto_config, edit_config, preview_n, final_n
        )
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
            if handler is not None:
                logging.getLogger("invarlock").removeHandler(handler)
        return run.report

    def _open(
        self,
        model: Any,
        adapter: Any,
        edit: EditLike,
        guards: Sequence[Guard],
        config: RunConfig,
        calibration_data: Any,
        auto_config: dict[str, Any] | None,
        edit_config: dict[str, Any] | None,
        preview_n: int | None,
        final_n: int | None,
    ) -> _Run:
        """Check every argument before the run begins."""
        auto = _checked_auto(auto_config or {})
        if not hasattr(edit, "apply"):
            raise ConfigError(f"edit is {type(edit).__name__}; expected an object with name and apply(model, adapter)")
        windows = None
        from invarlock.guards.base import configure_guards

        if calibration_data is not None:
            from invarlock.evidence.windows import WindowSet, windows_from_calibration

            given = isinstance(calibration_data, WindowSet)
            windows = calibration_data if given else windows_from_calibration(calibration_data, preview_n, final_n)
        policy = _resolve(auto, config.context, guards)
        configure_guards(guards, policy.values["guards"])
        run_id = str(config.context.get("run_id") or uuid.uuid4().hex[:12])
        context = plain({key: value for key, value in config.context.items() if key != "baseline"})
        report = RunReport(status="pending", context=context)
        report.meta = {
            "run_id": run_id,
            "config": {**plain({f.name: getattr(config, f.name) for f in fields(config)}), "context": context},
            "auto": auto,
            "policy": {**policy.provenance(), "values": policy.values, "digest": policy.digest},
            "intent": config.context.get("intent", "preserve"),
            "env_flags": settings.environment_flags(),
            "warnings": [],
            "timings": {},
        }
        return _Run(
            model=model,
            adapter=adapter,
            edit=edit,
            guards=list(guards),
            config=config,
            edit_config=dict(edit_config or {}),
            auto=auto,
            policy=policy,
            log=EventLog(config.event_path, run_id=run_id),
            report=report,
            windows=windows,
            seed=int(config.context.get("seed", 42)),
        )

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
        from invarlock.core.device import library_versions, make_deterministic, resolve_device, thread_count

        run.report.status = "running"
        run.device = resolve_device(run.config.device)
        make_deterministic(run.seed)
        if hasattr(run.model, "to"):
            run.model.to(run.device)
        run.report.meta.update(
            device=run.device,
            seeds={"python": run.seed, "numpy": run.seed, "torch": run.seed},
            versions=library_versions(),
            threads=thread_count(),
            model=run.adapter.describe(run.model),
        )
        if run.config.checkpoint_interval and not run.config.event_path:
            self._warn(run, "checkpoint_interval is set without event_path: no checkpoints are written")
        if run.windows is None:
            self._warn(run, _NO_DATA)
        else:
            stored = settings.flag("INVARLOCK_STORE_EVAL_WINDOWS")
            run.report.evaluation_windows = run.windows.to_dict() if stored else {}
            run.report.dataset = {"windows": {"stats": _window_counts(run.windows)}, "digest": run.windows.digest()}
        run.snapshot = take_snapshot(run.model, run.adapter, plan_snapshot(run.config.context))
        run.report.meta["snapshot"] = {"mode": run.snapshot.mode, "bytes": run.snapshot.size_bytes}
        run.log.log("prepare", "snapshot", mode=run.snapshot.mode, bytes=run.snapshot.size_bytes)

    def _prepare_guards(self, run: _Run) -> None:
        """Measure the unedited model on every window, then show it to every guard that wants to see it."""
        if run.windows is not None:
            run.baseline = self._measure(run, keep_reference=True)
        windows = run.windows.all if run.windows is not None else ()
        calib = CalibrationBatches(windows, run.baseline.guard_stats if run.baseline else None)
        for index, guard in enumerate(run.guards):
            policy = {**run.policy.values["guards"].get(guard.name, {}), "intent": run.report.meta["intent"]}
            failure = prepare_guard(guard, run.model, run.adapter, calib, policy, run.report)
            if failure is not None:
                self._warn(run, f"guard {guard.name!r} failed in prepare and is not evaluated: {failure}")
                run.skipped.add(index)
                run.results.setdefault(guard.name, []).append(not_evaluated(guard.name, failure))
                run.log.log("guard_prepare", "not_evaluated", guard=guard.name)
                continue
            if isinstance(guard, GuardWithPrepare):
                run.log.log("guard_prepare", "prepared", guard=guard.name)

    def _apply_edit(self, run: _Run) -> None:
        name = getattr(run.edit, "name", type(run.edit).__name__)
        if run.config.dry_run:
            run.report.edit = {"name": name, "dry_run": True, "deltas": {"params_changed": 0, "layers_modified": 0}}
            run.log.log("edit", "skipped", name=name)
            return
        returned = run.edit.apply(run.model, run.adapter, **run.edit_config)
        run.report.edit = {"name": name, "dry_run": False, **(plain(returned) if isinstance(returned, Mapping) else {})}
        run.log.log("edit", "applied", name=name, deltas=run.report.edit.get("deltas"))
        self._probe(run)

    def _probe(self, run: _Run) -> None:
        """Measure a few preview windows right away, so that a wrecked model stops here."""
        count = min(run.auto["probes"], len(run.windows.preview)) if run.windows is not None else 0
        if not count:
            return
        from invarlock.eval.sources.torch_model import forward_windows
        from invarlock.flow.measure import task_of

        probe = forward_windows(
            run.model, run.windows.preview[:count], task=task_of(run.metric_kind), device=run.device
        )
        rows = run.baseline.evidence.preview
        ratio = _ratio(rows.loss[:count], probe.loss, probe.tokens)
        run.report.metrics["probe"] = {"windows": count, "ratio": _shown(ratio)}
        run.log.log("edit", "probe", windows=count, ratio=_shown(ratio))
        self._check_spike(run, ratio, f"the first {count} window(s)")

    def _check_spike(self, run: _Run, ratio: float, where: str) -> None:
        if not ratio < run.config.spike_threshold:
            shown = f"{ratio:.4g}" if math.isfinite(ratio) else "not finite"
            run.rollback_reason = (
                f"primary_metric_spike: the ratio on {where} is {shown}, at or above spike_threshold "
                f"{run.config.spike_threshold:g}"
            )
            run.stop = True

    def _validate_guards(self, run: _Run) -> None:
        from invarlock.guards.base import StatsGuard

        context = {"report": run.report, "run_context": run.config.context, "device": run.device}
        for index, guard in enumerate(run.guards):
            if index in run.skipped:
                continue
            outcome = validate_guard(guard, run.model, run.adapter, context)
            run.results.setdefault(guard.name, []).append(outcome)
            run.report.guards = {name: worst(outcomes) for name, outcomes in run.results.items()}
            if isinstance(guard, StatsGuard) and guard.subject is not None:
                run.subject_stats[guard.name] = guard.subject
            follows = consequence(outcome)
            run.log.log("guard_validate", "validated", guard=guard.name, passed=outcome["passed"], action=follows)
            self._apply_consequence(run, guard.name, outcome, follows)

    def _apply_consequence(self, run: _Run, name: str, outcome: dict[str, Any], follows: str) -> None:
        message = f"guard {name!r}: {outcome['message'] or 'failed without a message'}"
        if follows == "abort":
            raise GuardError(f"{message} (action: abort)")
        if follows == "rollback" and run.rollback_reason is None:
            run.rollback_reason = f"guard_failed: {message}"
        if follows == "warn":
            self._warn(run, message)

    def _evaluate(self, run: _Run) -> None:
        if run.windows is None:
            run.report.metrics["primary_metric"] = self._synthetic_metric(run)
            return
        try:
            subject = self._measure(run, reference=run.baseline.reference, ready=run.subject_stats)
        except Exception as error:  # the model under test may raise anything
            if settings.flag("INVARLOCK_EVAL_STRICT"):
                raise
            self._warn(run, f"evaluation failed and no metric was measured: {oneline(error)}")
            return
        run.report.evidence = subject.evidence.model_dump(mode="json")
        metric = _primary_metric(run, subject.evidence)
        run.report.metrics["primary_metric"] = metric
        run.log.log("eval", "primary_metric", ratio=metric["ratio_vs_baseline"], final=metric["final"])
        ratio = _damage_ratio(metric)
        before = run.rollback_reason
        self._check_spike(run, ratio, "all windows")
        if run.stop and before is not None:
            run.rollback_reason = before
        if run.rollback_reason is None and not ratio <= run.config.max_pm_ratio:
            run.rollback_reason = f"primary_metric_ratio: {ratio:.4f} is above max_pm_ratio {run.config.max_pm_ratio:g}"

    def _measure(
        self, run: _Run, *, keep_reference: bool = False, reference: Any = None, ready: Mapping[str, Any] | None = None
    ) -> Any:
        from invarlock.evidence.model import DataFacts
        from invarlock.flow.measure import measure_model, model_facts

        context = run.config.context
        tokenizer = tuple(context.get("tokenizer_facts") or (None, None))
        facts = model_facts(run.model, run.adapter, str(context.get("model_id", "in memory")), tokenizer)
        given = dict(context.get("data") or {})
        data = DataFacts(
            provider=given.pop("provider", "calibration_data"),
            seq_len=run.windows.seq_len,
            requested=list(run.windows.requested),
            digest=run.windows.digest(),
            **given,
        )
        measuring = run.guards if ready is None else [g for g in run.guards if g.name not in ready]
        measured = measure_model(
            run.model,
            run.adapter,
            run.windows,
            facts=facts,
            data=data,
            structure=_live_structure(run.model),
            metric_kind=run.metric_kind,
            guards=measuring,
            device=run.device,
            keep_reference=keep_reference,
            reference=reference,
            progress=context.get("progress"),
        )
        if ready:
            return _with_stats(measured, run, ready)
        return measured

    def _synthetic_metric(self, run: _Run) -> dict[str, Any]:
        """Measure a few windows of random tokens, marked as such; nothing is decided on them."""
        from invarlock.flow.synthetic_metric import synthetic_metric

        metric = synthetic_metric(run.model, run.adapter, run.device, run.seed)
        if metric["final"] is None:
            self._warn(run, f"no synthetic metric: {metric['reason']}")
        return metric

    def _finalize(self, run: _Run) -> None:
        run.report.guards = {name: worst(outcomes) for name, outcomes in run.results.items()}
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


def _checked_auto(given: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(given.keys() - set(_AUTO_KEYS))
    if unknown:
        raise ConfigError(f"auto_config has {unknown[0]!r}; expected only: {', '.join(_AUTO_KEYS)}")
    auto = {"enabled": True, "tier": "balanced", "probes": _DEFAULT_PROBES, "target_pm_ratio": 2.0, **given}
    if not isinstance(auto["probes"], int) or not 0 <= auto["probes"] <= 10:
        raise ConfigError(f"auto_config probes is {auto['probes']!r}; expected a whole number from 0 to 10")
    return auto


def _resolve(auto: Mapping[str, Any], context: Mapping[str, Any], guards: Sequence[Guard]) -> ResolvedPolicy:
    """Resolve the policy; what the guards were constructed with counts as explicit."""
    explicit: dict[str, Any] = {"guards": {"order": [guard.name for guard in guards]}}
    for guard in guards:
        overrides = getattr(guard, "overrides", None)
        if isinstance(overrides, dict) and overrides:
            explicit["guards"][guard.name] = overrides
    overrides = merge(explicit, context.get("policy_overrides") or {})
    profile = str(context.get("profile", "dev"))
    return resolve_policy(
        str(auto["tier"]), profile, overrides=overrides, edit_adjustments=context.get("edit_adjustments")
    )


def _window_counts(windows: Any) -> dict[str, Any]:
    requested, actual = windows.requested, (len(windows.preview), len(windows.final))
    return {
        "requested_preview": requested[0],
        "requested_final": requested[1],
        "actual_preview": actual[0],
        "actual_final": actual[1],
        "paired_windows": sum(actual),
        "window_match_fraction": 1.0,
        "window_overlap_fraction": _repeated(windows) / actual[1],
        "coverage": sum(actual) / sum(requested),
    }


def _repeated(windows: Any) -> int:
    """Count the final windows that stand in preview too; content counts, since ids of repeats are numbered."""
    preview = {(w.input_ids, w.mask, w.labels) for w in windows.preview}
    return sum((w.input_ids, w.mask, w.labels) in preview for w in windows.final)


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


def _shown(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _live_structure(model: Any) -> Any:
    from invarlock.evidence.model import Structure

    if not hasattr(model, "state_dict"):
        return Structure(source="model", tensors=[])
    from invarlock.checkpoints.files import live_structure

    return live_structure(model)


def _with_stats(measured: Any, run: _Run, ready: Mapping[str, Any]) -> Any:
    """Put what the guards measured in validate into the subject's evidence, under the baseline's contracts."""
    stats = {**measured.evidence.guards, **{k: v for k, v in ready.items() if k != "invariants"}}
    contracts = {**run.baseline.evidence.contracts, **measured.evidence.contracts}
    evidence = measured.evidence.model_copy(update={"guards": stats, "contracts": contracts})
    return type(measured)(evidence, measured.reference, stats)


def _primary_metric(run: _Run, subject: Any) -> dict[str, Any]:
    from invarlock.certificate.derive import Rows, primary_metric
    from invarlock.certificate.make import pair_rows
    from invarlock.certificate.reports import evidence_of

    given = run.config.context.get("baseline")
    base = run.baseline.evidence if given is None else evidence_of(given, "baseline")
    rows = Rows.of(pair_rows(base.preview, subject.preview, "preview"), pair_rows(base.final, subject.final, "final"))
    metric: dict[str, Any] = primary_metric(run.metric_kind, rows, run.policy.values).model_dump(mode="json")
    return {**metric, "source": "calibration_data", "mock": False}


def _verbose_handler() -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setLevel(logging.INFO)
    logger = logging.getLogger("invarlock")
    logger.addHandler(handler)
    logger.setLevel(min(logger.level or logging.INFO, logging.INFO))
    return handler
