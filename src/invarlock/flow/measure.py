"""One model and one set of windows in, one piece of evidence out. Used for both sides, in memory and from checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from invarlock.checkpoints.side import Side
from invarlock.core.api import AdapterLike, ModelLike
from invarlock.core.device import library_versions, thread_count
from invarlock.eval import divergence
from invarlock.eval.sources.base import Scores, Watch, score_all
from invarlock.eval.sources.torch_model import TorchSource
from invarlock.evidence.model import Evidence, ModelFacts, Runtime, canonical_digest
from invarlock.evidence.reference import TokenReference, reference_digest
from invarlock.evidence.rows import WindowRows
from invarlock.evidence.windows import Windows
from invarlock.flow.job import Job
from invarlock.guards.base import StatsGuard
from invarlock.guards.invariants import stats_of
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
    return ModelFacts(
        id=side.id,
        adapter=adapter.name,
        model_class=described.get("model_class"),
        parameters=sum(p.numel() for p in parameters),
        dtype=str(parameters[0].dtype).removeprefix("torch.") if parameters else None,
        describe=described,
        behaviour=side.behaviour,
        tokenizer_digest=side.tokenizer_facts[0],
        tokenizer_size=side.tokenizer_facts[1],
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
    source = TorchSource(model, job.metric.task, device=job.device)
    scored = source.score(
        windows.all,
        reference=reference,
        keep_reference=reference is None and job.wants_reference,
        correct=job.metric.is_accuracy,
        watch=[one for one in watching if isinstance(one, Watch)],
    )
    scores = score_all(scored, len(windows.all), lambda done, total: job.tick(f"measuring {what}", done, total))
    used = reference if reference is not None else scores.reference
    preview, final = _rows(scores, windows)
    facts = model_facts(model, job.adapter, side)
    evidence = Evidence(
        metric_kind=job.metric.kind,
        model=facts,
        data=windows.facts(),
        preview=preview,
        final=final,
        structure=side.structure,
        guards={name: guard.measure(model, job.adapter) for name, guard in guards.items()},
        sketches=dict(sketch_model(model)) if hasattr(model, "named_parameters") else {},
        kl_histogram=scores.kl_histogram,
        contracts=_contracts(job, guards.values()),
        reference_digest=reference_digest(used) if used is not None else None,
        runtime=Runtime(
            device=job.device,
            dtype=facts.dtype or "unknown",
            batch_tokens=source.batch_tokens,
            threads=thread_count(),
            versions=library_versions(),
        ),
    )
    return Measurement(evidence, scores.reference)


def _contracts(job: Job, guards: Any) -> dict[str, str]:
    scoring = {"task": job.metric.task, "log": "natural", "masked": "never"}
    contracts = {guard.name: guard.contract() for guard in guards}
    contracts |= {"divergence": divergence.contract(), "windows": scoring}
    return {name: canonical_digest(contract)[:16] for name, contract in contracts.items()}


def _rows(scores: Scores, windows: Windows) -> Sequence[WindowRows]:
    cuts = (0, len(windows.preview), len(windows.all))
    return [
        WindowRows.of(
            [window.id for window in windows.all[start:stop]],
            [window.document for window in windows.all[start:stop]],
            {name: values[start:stop] for name, values in scores.columns.items()},
        )
        for start, stop in pairwise(cuts)
    ]


def files_only(job: Job, side: Side) -> Evidence:
    """Return the evidence of a checkpoint of which only the files were read: no rows."""
    model = ModelFacts(
        id=side.id,
        adapter=job.adapter.name,
        parameters=sum(_product(t.shape) for t in side.structure.tensors),
        behaviour=side.behaviour,
        tokenizer_digest=side.tokenizer_facts[0],
        tokenizer_size=side.tokenizer_facts[1],
    )
    sample = job.policy.values["sample"]
    nothing = Windows((), (), 0, (int(sample["preview"]), int(sample["final"])))
    data = nothing.facts().model_copy(update={"provider": "none", "digest": ""})
    return Evidence(
        metric_kind=job.metric.kind,
        model=model,
        data=data,
        preview=WindowRows.of([], [], {"tokens": [], "loss": []}),
        final=WindowRows.of([], [], {"tokens": [], "loss": []}),
        structure=side.structure,
        runtime=Runtime(device=job.device, dtype="unknown", batch_tokens=0, threads=0, versions=library_versions()),
    )


def _product(shape: Sequence[int]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
