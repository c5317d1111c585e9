"""One model and one set of windows in, one piece of evidence out. Used for both sides, in memory and from checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from invarlock.core.api import Guard
from invarlock.core.device import library_versions, thread_count
from invarlock.core.exceptions import DataError, ModelLoadError
from invarlock.core.files import write_whole
from invarlock.eval import divergence
from invarlock.eval.sources.torch_model import (
    BATCH_TOKENS,
    ActivationSampler,
    LoopResult,
    Task,
    evenly_spaced,
    forward_windows,
)
from invarlock.evidence.model import (
    DataFacts,
    Evidence,
    ModelFacts,
    Runtime,
    Structure,
    TokenFile,
    WindowRows,
    canonical_digest,
    finite_or_none,
)
from invarlock.evidence.windows import WindowSet
from invarlock.stats.paired import is_accuracy

__all__ = [
    "METRIC_KINDS",
    "Measurement",
    "measure_model",
    "model_facts",
    "read_reference",
    "reference_digest",
    "task_of",
    "write_reference",
]

#: metric kind -> how the loop scores tokens
METRIC_KINDS: dict[str, Task] = {
    "ppl_causal": "causal",
    "ppl_mlm": "mlm",
    "ppl_seq2seq": "seq2seq",
    "accuracy": "causal",
}
_REFERENCE_FIELDS = ("ids", "log_probs", "label_log_prob")
SAMPLED_WINDOWS = 8


@dataclass(frozen=True)
class Measurement:
    """What `measure_model` returns: the evidence, and the compact distributions where they were asked for."""

    evidence: Evidence
    reference: divergence.TokenReference | None
    guard_stats: dict[str, dict[str, Any]] = field(default_factory=dict)


def task_of(metric_kind: str) -> Task:
    """Return how the loop scores tokens for a metric kind; DataError for an unknown one."""
    if metric_kind not in METRIC_KINDS:
        raise DataError(f"metric kind is {metric_kind!r}; expected one of: {', '.join(METRIC_KINDS)}")
    return METRIC_KINDS[metric_kind]


def model_facts(model: Any, adapter: Any, model_id: str, tokenizer: tuple[str | None, int | None]) -> ModelFacts:
    """Return who the model is. A plugin's `describe` may lack any key."""
    described = dict(adapter.describe(model))
    parameters = list(model.parameters()) if hasattr(model, "parameters") else []
    config = getattr(model, "config", None)
    facts: dict[str, Any] = {}
    if config is not None and hasattr(config, "to_dict"):
        from invarlock.checkpoints.files import behaviour

        facts = behaviour(config)
    return ModelFacts(
        id=model_id,
        adapter=adapter.name,
        model_class=described.get("model_class"),
        parameters=sum(p.numel() for p in parameters),
        dtype=str(parameters[0].dtype).removeprefix("torch.") if parameters else None,
        describe=described,
        behaviour=facts,
        tokenizer_digest=tokenizer[0],
        tokenizer_size=tokenizer[1],
    )


def measure_model(
    model: Any,
    adapter: Any,
    windows: WindowSet,
    *,
    facts: ModelFacts,
    data: DataFacts,
    structure: Structure,
    metric_kind: str,
    guards: Sequence[Guard] = (),
    device: str = "cpu",
    batch_tokens: int = BATCH_TOKENS,
    keep_reference: bool = False,
    reference: divergence.TokenReference | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Run every window through `model` once, with the activation hooks of `guards` attached, then measure the weights.

    keep_reference and reference: see `forward_windows`. A guard in the measure / pair / judge form contributes its
    `measure`; others are left alone.
    """
    from invarlock.guards.base import StatsGuard
    from invarlock.guards.sketch import sketch_model

    measuring = {guard.name: guard for guard in guards if isinstance(guard, StatsGuard) and guard.name != "invariants"}
    sampler = ActivationSampler(frozenset(_sampled(measuring.values(), len(windows.all))))
    with ExitStack() as hooks:
        for guard in measuring.values():
            observe = getattr(guard, "observe", None)
            if observe is not None:
                hooks.enter_context(observe(model, adapter, sampler))
        result = forward_windows(
            model,
            windows.all,
            task=task_of(metric_kind),
            device=device,
            batch_tokens=batch_tokens,
            want_correct=is_accuracy(metric_kind),
            keep_reference=keep_reference,
            reference=reference,
            sampler=sampler,
            progress=progress,
        )
    stats = {name: guard.measure(model, adapter) for name, guard in measuring.items()}
    contracts = {name: canonical_digest(guard.contract())[:16] for name, guard in measuring.items()}
    contracts["divergence"] = canonical_digest(divergence.contract())[:16]
    contracts["windows"] = canonical_digest({"task": task_of(metric_kind), "log": "natural", "masked": "never"})[:16]
    used = reference if reference is not None else result.reference
    splits = _rows(result, len(windows.preview), windows)
    evidence = Evidence(
        metric_kind=metric_kind,
        model=facts,
        data=data,
        preview=splits[0],
        final=splits[1],
        structure=structure,
        guards=stats,
        sketches=dict(sketch_model(model)) if hasattr(model, "named_parameters") else {},
        kl_histogram=None if result.kl_histogram is None else [int(n) for n in result.kl_histogram],
        contracts=contracts,
        reference_digest=reference_digest(used) if used is not None else None,
        runtime=Runtime(
            device=device,
            dtype=facts.dtype or "unknown",
            batch_tokens=batch_tokens,
            threads=thread_count(),
            versions=library_versions(),
        ),
    )
    return Measurement(evidence, result.reference, stats)


def _sampled(guards: Iterable[Guard], total: int) -> list[int]:
    """Return the windows whose activations are looked at: those that a guard's policy chooses, else a few."""
    chosen = [list(guard.sample(total)) for guard in guards if hasattr(guard, "sample")]
    return chosen[0] if chosen else evenly_spaced(total, SAMPLED_WINDOWS)


def _rows(result: LoopResult, cut: int, windows: WindowSet) -> tuple[WindowRows, WindowRows]:
    def rows(start: int, stop: int) -> WindowRows:
        part = windows.all[start:stop]

        def column(values: Sequence[Any] | None) -> Any:
            return None if values is None else list(values[start:stop])

        def numbers(values: Sequence[float] | None) -> list[float | None] | None:
            return None if values is None else [finite_or_none(value) for value in values[start:stop]]

        return WindowRows(
            window_ids=[w.id for w in part],
            document_ids=[w.document for w in part],
            tokens=column(result.tokens),
            loss=cast(list[float | None], numbers(result.loss)),
            kl_sum=numbers(result.kl_sum),
            kl_max=numbers(result.kl_max),
            kl_exact_sum=None
            if result.kl_exact_sum is None
            else [None if x is None else finite_or_none(x) for x in result.kl_exact_sum[start:stop]],
            flips=column(result.flips),
            correct=column(result.correct),
        )

    return rows(0, cut), rows(cut, len(windows.all))


def reference_digest(reference: divergence.TokenReference) -> str:
    """Return 32 hex digits of SHA-256 over the arrays."""
    sha = hashlib.sha256()
    for name in _REFERENCE_FIELDS:
        sha.update(getattr(reference, name).contiguous().numpy().tobytes())
    return sha.hexdigest()[:32]


def write_reference(reference: divergence.TokenReference, path: Path) -> TokenFile:
    """Write the compact distributions beside the report and return what the evidence says of them."""
    from safetensors.torch import save

    blob = save({name: getattr(reference, name).contiguous() for name in _REFERENCE_FIELDS})
    write_whole(path, blob)
    tokens = max(1, len(reference.label_log_prob))
    return TokenFile(name=path.name, sha256=hashlib.sha256(blob).hexdigest(), bytes_per_token=len(blob) / tokens)


def read_reference(path: Path, facts: TokenFile) -> divergence.TokenReference:
    """Read what `write_reference` wrote; ModelLoadError where the file is gone or is not the one recorded."""
    from safetensors.torch import load

    if not path.is_file():
        raise ModelLoadError(f"the baseline's evidence file {path} is missing; expected it beside its report.json")
    blob = path.read_bytes()
    if hashlib.sha256(blob).hexdigest() != facts.sha256:
        raise ModelLoadError(f"{path} is not the file that the baseline's report recorded; measure the baseline again")
    arrays = load(blob)
    ids, log_probs, label = (arrays[name] for name in _REFERENCE_FIELDS)
    return divergence.TokenReference(ids, log_probs, label)
