"""The steps that every command takes, each written once. `certify`, `run` and `execute` differ in their order alone.

read ─ windows ─ load ─ measure ─ prepare ─ edit ─ measure ─ validate ─ overhead ─ report ─ compare
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from pydantic import ValidationError

from invarlock.certificate.reports import check_baseline, evidence_of
from invarlock.checkpoints.side import Side, read_side
from invarlock.checkpoints.structure import live_structure
from invarlock.core import registry, settings
from invarlock.core.api import Batches, Context, EditLike, Guard, ModelLike, RunReport
from invarlock.core.exceptions import ConfigError, EditError, ModelLoadError
from invarlock.core.files import plain
from invarlock.eval.sources.engines import Engine
from invarlock.evidence.model import Evidence, Structure, finite_or_none
from invarlock.evidence.pack import Pack, is_pack, read_pack
from invarlock.evidence.reference import (
    TokenReference,
    read_reference,
    reference_bytes,
    reference_from,
    write_reference,
)
from invarlock.evidence.windows import pick_indices
from invarlock.flow.job import Job
from invarlock.flow.measure import Measurement
from invarlock.flow.run_folder import EVIDENCE, read_report, write_report
from invarlock.guards.boundary import not_evaluated, prepare_guard, validate_guard
from invarlock.guards.invariants import behaviour_of
from invarlock.stats.paired import perplexity

__all__ = [
    "NOOP",
    "apply_edit",
    "create_guards",
    "load",
    "measure_overhead",
    "measured_members",
    "members_measured",
    "prepare_guards",
    "read",
    "remark_on_baseline",
    "report",
    "side_in_memory",
    "stored_baseline",
    "stored_measurement",
    "text_facts",
    "validate",
    "write_measured",
]

_EVIDENCE_JSON = "evidence.json"
NOOP: Mapping[str, Any] = {"name": "noop", "deltas": {"params_changed": 0}}
_OVERHEAD_WINDOWS = 8


def create_guards(names: Sequence[str], arguments: Mapping[str, Mapping[str, Any]]) -> list[Guard]:
    """Create the guards that a policy orders; a name that stands twice is one guard, run twice."""
    made = {name: registry.guards.create(name, **dict(arguments.get(name, {}))) for name in dict.fromkeys(names)}
    return [made[name] for name in names]


def read(job: Job, model_id: str, engine: str | None = None) -> Side:
    """Read a checkpoint's files; of one that an engine serves, what of them is at hand."""
    job.tick("reading files", 0, 1)
    if engine is None:
        return read_side(job.adapter, model_id, job.loading)
    try:
        side = replace(read_side(job.adapter, model_id, job.loading), engine=engine)
    except ModelLoadError:
        if os.path.isdir(model_id) and any(Path(model_id).glob("*.safetensors")):
            raise  # it is there, and something is wrong with it
        side = Side(model_id, None, Structure(source="model", tensors=[]), {}, None, (None, None), engine=engine)
        job.notes.append(f"{model_id}: its files are not at hand, so that its weights are not evaluated")
    return side


def load(job: Job, side: Side, what: str, tokenizer: object = None) -> ModelLike:
    """Load the model of a checkpoint; what a reader should know of how it was read becomes a note.

    One that is served is reached instead; its token ids are held against `tokenizer`, that of the windows.
    """
    job.tick(f"loading {what}", 0, 1)
    if side.engine is not None:
        if job.metric.task != "causal":
            raise ConfigError(f"{side.engine} serves next tokens; expected a causal model, not {job.metric.kind}")
        return cast("ModelLike", Engine.open(side.engine, tokenizer or side.tokenizer))  # as an inference session does
    model = job.loading.load(job.adapter, side, job.device)
    if job.native and job.windows is not None and hasattr(job.adapter, "run_natively"):
        job.adapter.run_natively(model, job.windows.all[0].dressed().input_ids)
    told = job.adapter.describe(model).get("notes") if hasattr(job.adapter, "auto_class") else None
    said = [f"{side.id}: {note}" for note in told or ()]
    job.notes += [note for note in said if note not in job.notes]
    return model


def side_in_memory(job: Job, model: ModelLike, context: Context) -> Side:
    """Say what a model in memory is: the checkpoint that its adapter loaded it from, as far as it still is that.

    A caller may say more in the context: `side` (a `Side`), or `model_id` and `tokenizer_facts` (digest, size).
    """
    side, origin = context.get("side"), getattr(job.adapter, "origin", lambda model: None)(model)
    if not side and origin is not None:
        side = read_side(job.adapter, origin.model_id, origin.loading)
    if not isinstance(side, Side):
        digest, size = context.get("tokenizer_facts") or (None, None)
        name = str(context.get("model_id", "in memory"))
        side = Side(name, None, Structure(source="model", tensors=[]), {}, None, (digest, size))
    return _as_it_is(model, side, behaviour_of(model))


def _as_it_is(model: ModelLike, side: Side, behaviour: dict[str, Any]) -> Side:
    like = side.structure if side.structure.tensors else None
    structure = live_structure(model, like) if hasattr(model, "state_dict") else side.structure
    return replace(side, structure=structure, behaviour=behaviour)


def apply_edit(
    job: Job, model: ModelLike, side: Side, edit: EditLike, config: Mapping[str, Any], *, dry_run: bool = False
) -> tuple[dict[str, Any], Side]:
    """Change the model in place; return what the edit says of itself, and what the model now is."""
    name = getattr(edit, "name", type(edit).__name__)
    if dry_run:
        return {"name": name, "dry_run": True, "deltas": {"params_changed": 0, "layers_modified": 0}}, side
    if getattr(model, "runs_elsewhere", False) and name != "noop":
        raise EditError(
            f"{side.id} can be evaluated only; make the edit {name} on the checkpoint that it was exported from"
        )
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
        policy = {**job.policy.limits.guards.get(guard.name, {}), "intent": job.intent}
        why = prepare_guard(guard, model, job.adapter, calib, policy, about)
        if why is not None:
            job.notes.append(f"guard {guard.name!r} failed in prepare and is not evaluated: {why}")
            failed[place] = why
    return failed


def validate(job: Job, guard: Guard, model: ModelLike, context: Context, failed: str | None) -> dict[str, Any]:
    """Return a guard's result on the edited model; `failed` says why it did not get to see the unedited one."""
    if failed is not None:
        return not_evaluated(guard.name, failed)
    return validate_guard(guard, model, job.adapter, context)


def remark_on_baseline(job: Job, evidence: Evidence) -> None:
    """Note a baseline that predicts no better than guessing: then nothing that an edit breaks would show."""
    size = evidence.structure.output_rows or evidence.structure.embedding_rows or evidence.model.tokenizer_size
    rows = [*zip(evidence.preview.loss, evidence.preview.tokens, strict=True)]
    rows += zip(evidence.final.loss, evidence.final.tokens, strict=True)
    scored = [(loss, count) for loss, count in rows if loss is not None]
    if not size or not scored or job.metric.is_accuracy:
        return
    mean = sum(loss * count for loss, count in scored) / sum(count for _, count in scored)
    if mean >= math.log(size):
        job.notes.append(
            f"the baseline is no better than guessing: {mean:.2f} nats a token, and {math.log(size):.2f} are those of a "
            f"uniform guess among {size} tokens; look at its weights, its tokenizer and the text"
        )


def measure_overhead(job: Job, model: ModelLike, measured: Measurement) -> dict[str, Any]:
    """Score a few windows again without guards where the policy requires it; `measured` is with them.

    Returns `evaluated`, `ratio`, `windows` and `skipped` (why it was not measured).
    """
    nothing = {"evaluated": False, "ratio": None, "windows": 0, "skipped": None}
    if settings.flag("INVARLOCK_SKIP_OVERHEAD_CHECK"):
        return {**nothing, "skipped": "INVARLOCK_SKIP_OVERHEAD_CHECK is set"}
    if not job.policy.limits.overhead.required or job.windows is None:
        return nothing
    windows = job.windows.between((0, 0), measured.reach).all
    picked = pick_indices(len(windows), _OVERHEAD_WINDOWS)
    bare = job.score(model, [windows[i] for i in picked])
    guarded = np.array([*measured.evidence.preview.loss, *measured.evidence.final.loss], float)[picked]
    ratio = perplexity(guarded, bare.tokens) / perplexity(bare.loss, bare.tokens)
    return {"evaluated": True, "ratio": finite_or_none(ratio), "windows": len(picked), "skipped": None}


def report(job: Job, measured: Measurement, edit: Mapping[str, Any], run_id: str | None, **meta: Any) -> RunReport:
    """Return the report of one side."""
    auto = {"enabled": True, "tier": job.policy.tier, "profile": job.policy.profile}
    facts = {"run_id": run_id, "auto": auto, "warnings": list(job.notes), "timings": dict(job.timings)}
    facts |= {**job.facts(str(edit.get("name"))), **meta}
    evidence = measured.evidence.model_dump(mode="json")
    return RunReport(meta=facts, edit=dict(edit), status="success", evidence=evidence, **text_facts(job))


def text_facts(job: Job) -> dict[str, Any]:
    """Return what a report says of the text: the windows, where they are kept, and its facts with those of the pairing."""
    if job.windows is None:
        return {}
    windows = job.windows.to_dict() if settings.flag("INVARLOCK_STORE_EVAL_WINDOWS") else {}
    dataset = {**job.windows.facts().model_dump(mode="json"), "windows": {"stats": job.windows.stats()}}
    return {"evaluation_windows": windows, "dataset": dataset}


def stored_baseline(path: Path) -> tuple[dict[str, Any], Evidence, Path]:
    """Read the report of a stored baseline: it, its evidence and its place. Raises CertificateError where it is none."""
    found, place = read_report(path)
    check_baseline(found)
    return found, evidence_of(found, "baseline"), place


def stored_measurement(evidence: Evidence, place: Path) -> Measurement:
    """Read the distributions beside the report at `place` too, or in its pack. Raises ModelLoadError where they are gone."""
    file = evidence.token_file
    if file is None:
        return Measurement(evidence)
    if is_pack(place):
        return Measurement(evidence, _distributions(read_pack(place), place))
    return Measurement(evidence, read_reference(place.parent / file.name, file))


def measured_members(measured: Measurement) -> dict[str, bytes]:
    """Return a measurement as members of a pack."""
    members = {_EVIDENCE_JSON: measured.evidence.model_dump_json().encode()}
    if measured.reference is not None:
        members[EVIDENCE] = reference_bytes(measured.reference)
    return members


def members_measured(pack: Pack, place: Path) -> Measurement:
    """Return what `measured_members` made. Raises ModelLoadError where it is of another release."""
    try:
        evidence = Evidence.model_validate(pack.json(_EVIDENCE_JSON, str(place)))
    except ValidationError as error:
        raise ModelLoadError(f"{place} holds evidence of another release ({error.error_count()} problems)") from None
    return Measurement(evidence, _distributions(pack, place) if EVIDENCE in pack.members else None)


def _distributions(pack: Pack, place: Path) -> TokenReference:
    if EVIDENCE not in pack.members:
        raise ModelLoadError(f"{place} has no {EVIDENCE}; expected the baseline's distributions: make the pack again")
    return reference_from(pack.members[EVIDENCE])


def write_measured(data: dict[str, Any], reference: TokenReference | None, folder: Path) -> Path:
    """Write a report and the distributions that later comparisons with it need; its evidence names their file."""
    if reference is not None:
        data["evidence"]["token_file"] = plain(write_reference(reference, folder / EVIDENCE).model_dump())
    return write_report(data, folder)
