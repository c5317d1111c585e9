"""The steps that every command takes, each written once. `certify`, `run` and `execute` differ in their order alone.

read ─ windows ─ load ─ measure ─ prepare ─ edit ─ measure ─ validate ─ overhead ─ report ─ compare
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from invarlock.certificate.reports import make_certificate
from invarlock.checkpoints.side import Side, read_side
from invarlock.checkpoints.structure import live_structure
from invarlock.core import registry, settings
from invarlock.core.api import Batches, Context, EditLike, Guard, ModelLike, RunReport
from invarlock.core.files import plain
from invarlock.eval.sources.base import score_all
from invarlock.eval.sources.torch_model import TorchSource
from invarlock.evidence.model import Structure, finite_or_none
from invarlock.evidence.windows import pick_indices
from invarlock.flow.job import Job
from invarlock.flow.measure import Measurement
from invarlock.guards.boundary import not_evaluated, prepare_guard, validate_guard
from invarlock.guards.invariants import behaviour_of
from invarlock.stats.paired import perplexity

__all__ = [
    "NOOP",
    "apply_edit",
    "baseline_report",
    "compare",
    "create_guards",
    "load",
    "measure_overhead",
    "prepare_guards",
    "read",
    "report",
    "side_in_memory",
    "validate_guards",
]

NOOP: Mapping[str, Any] = {"name": "noop", "deltas": {"params_changed": 0}}
_OVERHEAD_WINDOWS = 8


def create_guards(names: Sequence[str], arguments: Mapping[str, Mapping[str, Any]]) -> list[Guard]:
    """Create the guards that a policy orders; a name that stands twice is one guard, run twice."""
    made = {name: registry.guards.create(name, **dict(arguments.get(name, {}))) for name in dict.fromkeys(names)}
    return [made[name] for name in names]


def read(job: Job, model_id: str) -> Side:
    """Read a checkpoint's files."""
    job.tick("reading files", 0, 1)
    return read_side(job.adapter, model_id, job.loading)


def load(job: Job, side: Side, what: str) -> ModelLike:
    """Load the model of a checkpoint."""
    job.tick(f"loading {what}", 0, 1)
    return job.loading.load(job.adapter, side, job.device)


def side_in_memory(job: Job, model: ModelLike, context: Context) -> Side:
    """Say what a model in memory is: the checkpoint that its adapter loaded it from, as far as it still is that.

    A caller may say more in the context: `side` (a `Side`), or `model_id` and `tokenizer_facts` (digest, size).
    """
    side = context.get("side") or _origin_of(job, model)
    if not isinstance(side, Side):
        facts = tuple(context.get("tokenizer_facts") or (None, None))
        name = str(context.get("model_id", "in memory"))
        side = Side(name, None, Structure(source="model", tensors=[]), {}, None, (facts[0], facts[1]))
    return _as_it_is(model, side, behaviour_of(model))


def _origin_of(job: Job, model: ModelLike) -> Side | None:
    origin = getattr(job.adapter, "origin", lambda model: None)(model)
    return None if origin is None else read_side(job.adapter, origin.model_id, origin.loading)


def _as_it_is(model: ModelLike, side: Side, behaviour: dict[str, Any]) -> Side:
    if not hasattr(model, "state_dict"):
        return replace(side, behaviour=behaviour)
    like = side.structure if side.structure.tensors else None
    return replace(side, structure=live_structure(model, like), behaviour=behaviour)


def apply_edit(
    job: Job, model: ModelLike, side: Side, edit: EditLike, config: Mapping[str, Any], *, dry_run: bool = False
) -> tuple[dict[str, Any], Side]:
    """Change the model in place; return what the edit says of itself, and what the model now is."""
    name = getattr(edit, "name", type(edit).__name__)
    if dry_run:
        return {"name": name, "dry_run": True, "deltas": {"params_changed": 0, "layers_modified": 0}}, side
    before = behaviour_of(model)
    returned = edit.apply(model, job.adapter, **config)
    facts = {"name": name, "dry_run": False, **(plain(returned) if isinstance(returned, Mapping) else {})}
    after = behaviour_of(model)
    kept = {key: value for key, value in side.behaviour.items() if key in after or key not in before}
    changed = {key: value for key, value in after.items() if key not in before or before[key] != value}
    return facts, _as_it_is(model, side, {**kept, **changed})


def prepare_guards(
    job: Job, guards: Sequence[Guard], model: ModelLike, calib: Batches | None, about: RunReport
) -> dict[int, str]:
    """Show the guards the unedited model; return why those failed, by place, whose failure is tolerated."""
    failed: dict[int, str] = {}
    for place, guard in enumerate(guards):
        why = prepare_guard(guard, model, job.adapter, calib, job.guard_policy(guard.name), about)
        if why is not None:
            job.notes.append(f"guard {guard.name!r} failed in prepare and is not evaluated: {why}")
            failed[place] = why
    return failed


def validate_guards(
    job: Job, guards: Sequence[Guard], model: ModelLike, context: Context, failed: Mapping[int, str]
) -> Iterator[tuple[Guard, dict[str, Any]]]:
    """Yield each guard with its result on the edited model, in order."""
    for place, guard in enumerate(guards):
        if place in failed:
            yield guard, not_evaluated(guard.name, failed[place])
        else:
            yield guard, validate_guard(guard, model, job.adapter, context)


def measure_overhead(job: Job, model: ModelLike, measured: Measurement) -> dict[str, Any]:
    """Score a few windows again without guards where the policy requires it; `measured` is with them.

    Returns `evaluated`, `ratio`, `windows` and `skipped` (why it was not measured).
    """
    nothing = {"evaluated": False, "ratio": None, "windows": 0, "skipped": None}
    if settings.flag("INVARLOCK_SKIP_OVERHEAD_CHECK"):
        return {**nothing, "skipped": "INVARLOCK_SKIP_OVERHEAD_CHECK is set"}
    if not job.policy.values["metrics"]["guard_overhead"]["required"] or job.windows is None:
        return nothing
    windows = job.windows.all
    picked = pick_indices(len(windows), _OVERHEAD_WINDOWS)
    source = TorchSource(model, job.metric.task, device=job.device)
    bare = score_all(source.score([windows[i] for i in picked]), len(picked))
    losses = [*measured.evidence.preview.loss, *measured.evidence.final.loss]
    guarded = [float("nan") if (loss := losses[i]) is None else float(loss) for i in picked]
    ratio = perplexity(guarded, bare.tokens) / perplexity(bare.loss, bare.tokens)
    return {"evaluated": True, "ratio": finite_or_none(ratio), "windows": len(picked), "skipped": None}


def report(job: Job, measured: Measurement, edit: Mapping[str, Any], run_id: str, **meta: Any) -> RunReport:
    """Return the report of one side."""
    stored = job.windows is not None and settings.flag("INVARLOCK_STORE_EVAL_WINDOWS")
    auto = {"enabled": True, "tier": job.policy.tier, "profile": job.policy.profile}
    facts = {"run_id": run_id, "auto": auto, "warnings": list(job.notes), "timings": dict(job.timings)}
    return RunReport(
        meta={**facts, **job.facts(str(edit.get("name"))), **meta},
        edit=dict(edit),
        evaluation_windows=job.windows.to_dict() if stored and job.windows is not None else {},
        status="success",
        dataset=dataset_facts(job),
        evidence=measured.evidence.model_dump(mode="json"),
    )


def dataset_facts(job: Job) -> dict[str, Any]:
    """Return what a report says of the text, with the pairing facts."""
    if job.windows is None:
        return {}
    return {**job.windows.facts().model_dump(mode="json"), "windows": {"stats": job.windows.stats()}}


def baseline_report(job: Job, baseline: Measurement, run_id: str) -> RunReport:
    """Return the report of a baseline that was measured here, as one whose edit was none."""
    return report(job, baseline, NOOP, run_id)


def compare(subject: RunReport, baseline: RunReport | Mapping[str, Any]) -> dict[str, Any]:
    """Return the certificate that follows from the two sides' reports."""
    return make_certificate(subject, baseline)
