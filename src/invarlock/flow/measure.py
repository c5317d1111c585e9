"""One model and one set of windows in, one piece of evidence out. Used for both sides, in memory and from checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from invarlock.checkpoints.side import Side
from invarlock.core.api import AdapterLike, ModelLike
from invarlock.core.device import library_versions, thread_count
from invarlock.eval import divergence
from invarlock.eval.sources.base import Scores, score_all
from invarlock.evidence.model import Evidence, ModelFacts, Runtime, canonical_digest
from invarlock.evidence.reference import TokenReference, reference_digest
from invarlock.evidence.rows import WindowRows
from invarlock.evidence.windows import Window, Windows
from invarlock.flow.job import Job
from invarlock.guards.base import StatsGuard
from invarlock.guards.invariants import stats_of
from invarlock.guards.peaks import BlockPeaks
from invarlock.guards.sketch import sketch_model

__all__ = ["Measurement", "files_only", "measure", "model_facts"]


@dataclass(frozen=True)
class Measurement:
    """The evidence of one side, and the compact distributions where they were kept."""

    evidence: Evidence
    reference: TokenReference | None = None

    @property
    def guard_stats(self) -> dict[str, dict[str, Any]]:
        """What each built-in guard measured, by name."""
        return {**self.evidence.guards, "invariants": stats_of(self.evidence)}


def model_facts(model: ModelLike, adapter: AdapterLike, side: Side) -> ModelFacts:
    """Return who the model is. A plugin's `describe` may lack any key."""
    described = dict(adapter.describe(model))
    parameters = list(model.parameters()) if hasattr(model, "parameters") else []
    kind, count = described.get("model_class"), sum(p.numel() for p in parameters)
    dtype = str(parameters[0].dtype).removeprefix("torch.") if parameters else None
    return _identity(side, adapter, model_class=kind, parameters=count, dtype=dtype, describe=described)


def _identity(side: Side, adapter: AdapterLike, **found: Any) -> ModelFacts:
    digest, size = side.tokenizer_facts
    tokenizer = {"tokenizer_digest": digest, "tokenizer_size": size}
    return ModelFacts(
        id=side.id, adapter=adapter.name, behaviour=side.behaviour, usage=side.usage, **tokenizer, **found
    )


def measure(
    job: Job, model: ModelLike, side: Side, what: str, *, reference: TokenReference | None = None
) -> Measurement:
    """Score every window once, with the guards watching, then measure the weights.

    `side` says what the model is as a checkpoint. Without `reference` this is the baseline's side, whose own is kept.
    """
    assert job.windows is not None
    windows = job.windows
    guards = {g.name: g for g in job.guards if isinstance(g, StatsGuard) and g.name != "invariants"}
    watching = [guard.watch(model, job.adapter, len(windows.all)) for guard in guards.values()]
    peaks = BlockPeaks(model)
    watch = [*(one for one in watching if one is not None), peaks.watch(len(windows.all))]
    source, keep = job.source(model), reference is None and job.policy.limits.divergence.mode != "off"
    scored = source.score(
        windows.all, reference=reference, keep_reference=keep, correct=job.metric.is_accuracy, watch=watch
    )
    scores = score_all(scored, len(windows.all), lambda done, total: job.tick(f"measuring {what}", done, total))
    used = scores.reference if reference is None else reference
    facts = model_facts(model, job.adapter, side)
    evidence = Evidence(
        metric_kind=job.metric.kind,
        model=facts,
        data=windows.facts(),
        **_rows(scores, windows),
        structure=side.structure,
        guards={name: guard.measure(model, job.adapter) for name, guard in guards.items()},
        sketches=dict(sketch_model(model)) if hasattr(model, "named_parameters") else {},
        kl_histogram=scores.kl_histogram,
        contracts=_contracts(job, windows, guards.values()),
        reference_digest=reference_digest(used) if used is not None else None,
        peaks=peaks.peaks() or None,
        runtime=_runtime(job, facts.dtype or "unknown", source.batch_tokens, thread_count()),
    )
    return Measurement(evidence, scores.reference)


def _runtime(job: Job, dtype: str, batch_tokens: int, threads: int) -> Runtime:
    return Runtime(
        device=job.device, dtype=dtype, batch_tokens=batch_tokens, threads=threads, versions=library_versions()
    )


def _contracts(job: Job, windows: Windows, guards: Iterable[StatsGuard]) -> dict[str, str]:
    contracts = {guard.name: guard.contract() for guard in guards} | {"divergence": divergence.contract()}
    around = {"prefix": list(windows.prefix), "suffix": list(windows.suffix)}
    contracts["windows"] = {"task": job.metric.task, "log": "natural", "masked": "never"}
    contracts["windows"] |= {name: ids for name, ids in around.items() if ids}
    return {name: canonical_digest(contract)[:16] for name, contract in contracts.items()}


def _rows(scores: Scores, windows: Windows) -> dict[str, Any]:
    cut = len(windows.preview)
    return {
        split: WindowRows.of(
            [window.id for window in windows.all[part]],
            [window.document for window in windows.all[part]],
            {**_kinds(windows.all[part]), **{name: values[part] for name, values in scores.columns.items()}},
        )
        for split, part in (("preview", slice(cut)), ("final", slice(cut, None)))
    }


def _kinds(windows: Sequence[Window]) -> dict[str, list[str]]:
    """Return the kind of each window's text as a column, where there are several."""
    named = [window.slice for window in windows if window.slice is not None]
    return {"slices": named} if named else {}


def files_only(job: Job, side: Side) -> Evidence:
    """Return the evidence of a checkpoint of which only the files were read: no rows."""
    sample = job.policy.limits.sample
    nothing = Windows((), (), 0, (sample.preview, sample.final))
    return Evidence(
        metric_kind=job.metric.kind,
        model=_identity(side, job.adapter, parameters=sum(math.prod(t.shape) for t in side.structure.tensors)),
        data=nothing.facts().model_copy(update={"provider": "none", "digest": ""}),
        **_rows(Scores({"tokens": [], "loss": []}), nothing),
        structure=side.structure,
        runtime=_runtime(job, "unknown", 0, 0),
    )
