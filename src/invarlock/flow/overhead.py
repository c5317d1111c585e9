"""Does measuring change what is measured? The metric with the guards' hooks attached, as a ratio of the bare one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from invarlock.core import settings
from invarlock.eval.sources.torch_model import evenly_spaced, forward_windows
from invarlock.evidence.model import Evidence, finite_or_none
from invarlock.flow.measure import SAMPLED_WINDOWS, task_of
from invarlock.stats.paired import perplexity

__all__ = ["guard_overhead"]


def guard_overhead(
    model: Any, windows: Any, evidence: Evidence, device: str, limits: Mapping[str, Any]
) -> dict[str, Any]:
    """Measure a few windows again without hooks where `limits` require it; `evidence` is of the guarded measurement.

    Returns `evaluated`, `ratio`, `windows` and `skipped` (why it was not measured).
    """
    if settings.flag("INVARLOCK_SKIP_OVERHEAD_CHECK"):
        return {"evaluated": False, "ratio": None, "windows": 0, "skipped": "INVARLOCK_SKIP_OVERHEAD_CHECK is set"}
    if not limits["required"]:
        return {"evaluated": False, "ratio": None, "windows": 0, "skipped": None}
    picked = evenly_spaced(len(windows.all), SAMPLED_WINDOWS)
    bare = forward_windows(model, [windows.all[i] for i in picked], task=task_of(evidence.metric_kind), device=device)
    losses = evidence.preview.loss + evidence.final.loss
    guarded = [float("nan") if (loss := losses[i]) is None else float(loss) for i in picked]
    ratio = perplexity(guarded, bare.tokens) / perplexity(bare.loss, bare.tokens)
    return {"evaluated": True, "ratio": finite_or_none(ratio), "windows": len(picked), "skipped": None}
