"""What arithmetic alone does to the figures: the baseline against itself, computed in other ways.

Batch shape, number of threads, attention and type are changed one at a time; weights and windows stay. What the ratio
moves by is the noise that a comparison across such a change could not be told from. It decides nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from invarlock.core.api import ModelLike
from invarlock.core.exceptions import DataError
from invarlock.core.files import first_line
from invarlock.eval.sources.base import Source, score_all
from invarlock.eval.sources.torch_model import TorchSource
from invarlock.evidence.model import finite_or_none
from invarlock.evidence.plan import Cut
from invarlock.evidence.windows import Windows
from invarlock.flow.job import Job
from invarlock.flow.measure import Measurement
from invarlock.stats.intervals import weighted_mean_interval

__all__ = ["noise_floor"]

#: tokens that are scored again in each way: windows from the beginning on that hold about so many
_TOKENS = 4096


def noise_floor(job: Job, model: ModelLike, measured: Measurement) -> list[dict[str, Any]]:
    """Score windows of the baseline again in each other way, and return what each of them changed, as the certificate
    records it. The model is left in another type than it came in."""
    assert job.windows is not None
    cut = _few(job, measured.reach)
    windows = job.windows.between((0, 0), cut)
    old = [getattr(measured.evidence, split).loss[:n] for split, n in zip(("preview", "final"), cut, strict=True)]
    reference = measured.reference_of((0, 0), cut)
    found = []
    for name, usual, other in _ways(model):
        with _changed(job, model, name, other) as source:
            job.tick(f"noise floor: {name}", 0, 1)
            try:
                scores = score_all(source.score(windows.all, reference=reference), len(windows.all))
            except (DataError, RuntimeError, ValueError) as error:  # what a model cannot do is no noise
                job.notes.append(f"noise floor: {name} {other} could not be measured: {first_line(error)}")
                continue
        found.append({"name": name, "usual": usual, "other": other, **_figures(scores.columns, sum(old, []), windows)})
    return found


def _few(job: Job, reach: Cut) -> Cut:
    """Return how many windows of preview and final hold about `_TOKENS` tokens."""
    assert job.windows is not None
    cut = reach
    while min(cut) > 1:
        tokens = job.scored(job.windows.between((0, 0), cut))
        if tokens <= _TOKENS:
            break
        share = max(_TOKENS / tokens, 0.5)
        cut = max(1, min(cut[0] - 1, int(cut[0] * share))), max(1, min(cut[1] - 1, int(cut[1] * share)))
    return cut


def _ways(model: Any) -> Iterator[tuple[str, str, str]]:
    """Yield what can be changed, how it is, and how it can be too; the type last, which rounds the weights."""
    import torch

    threads = torch.get_num_threads()
    yield "batch", "windows of one length together", "one window at a time"
    yield "threads", str(threads), str(1 if threads > 1 else 2)
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if attention in ("sdpa", "eager") and hasattr(model, "set_attn_implementation"):
        yield "attention", attention, "eager" if attention == "sdpa" else "sdpa"
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    yield "dtype", str(dtype).removeprefix("torch."), str(other).removeprefix("torch.")


@contextlib.contextmanager
def _changed(job: Job, model: Any, name: str, other: str) -> Iterator[Source]:
    """Yield a source that scores in another way; all but the type is put back."""
    import torch

    threads, attention = torch.get_num_threads(), getattr(getattr(model, "config", None), "_attn_implementation", None)
    try:
        if name == "threads":
            torch.set_num_threads(int(other))
        elif name == "attention":
            model.set_attn_implementation(other)
        elif name == "dtype":
            model.to(getattr(torch, other))
        one_by_one = {"batch_tokens": 1} if name == "batch" else {}
        yield TorchSource(model, job.metric.task, device=job.device, **one_by_one)
    finally:
        torch.set_num_threads(threads)
        if name == "attention":
            model.set_attn_implementation(attention)


def _figures(columns: Mapping[str, Sequence[Any]], old: Sequence[float | None], windows: Windows) -> dict[str, Any]:
    tokens = [int(count) for count in columns["tokens"]]
    documents = [window.document for window in windows.all]
    nan = float("nan")
    moved = [nan if None in (a, b) else b - a for a, b in zip(old, columns["loss"], strict=True)]
    ratio = weighted_mean_interval(moved, tokens, documents)

    def mean(name: str) -> float | None:
        values = columns.get(name)
        return None if not values else finite_or_none(sum(float(nan if v is None else v) for v in values) / sum(tokens))

    return {
        "windows": len(tokens),
        "documents": len(set(documents)),
        "tokens": sum(tokens),
        "log_ratio": finite_or_none(ratio.estimate),
        "std_error": finite_or_none(ratio.std_error),
        "kl_mean": mean("kl_sum"),
        "flip_rate": mean("flips"),
    }
