"""A primary metric without data: a few windows of random tokens, so that a run can finish. It certifies nothing."""

from __future__ import annotations

import hashlib
from typing import Any

from invarlock.core.api import AdapterLike, ModelLike
from invarlock.eval.metrics import metric_of
from invarlock.eval.sources.base import score_all
from invarlock.eval.sources.torch_model import TorchSource
from invarlock.evidence.model import finite_or_none
from invarlock.evidence.windows import Window
from invarlock.stats.paired import perplexity

__all__ = ["synthetic_metric"]

_WINDOWS, _LENGTH = 4, 32


def _random_windows(vocabulary: int, seed: int, length: int) -> list[Window]:
    """Return windows of tokens that follow from SHA-256 of (seed, window, position)."""

    def token(window: int, position: int) -> int:
        digest = hashlib.sha256(f"{seed}:{window}:{position}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % vocabulary

    rows = [tuple(token(w, p) for p in range(length)) for w in range(_WINDOWS)]
    return [Window(f"synthetic-{w}", f"synthetic-{w}", row, labels=row) for w, row in enumerate(rows)]


def synthetic_metric(model: ModelLike, adapter: AdapterLike, device: str, seed: int) -> dict[str, Any]:
    """Measure the model on random tokens. `final` is None, with a `reason`, where it takes no tokens."""
    kind = getattr(adapter, "metric_kind", "ppl_causal")
    described = adapter.describe(model)
    size = described.get("vocab_size") or getattr(getattr(model, "config", None), "vocab_size", None)
    blank = {"kind": kind, "unit": "perplexity", "direction": "lower", "source": "synthetic", "mock": True}
    blank |= {"preview": None, "final": None, "ratio_vs_baseline": None, "windows": 0}
    if not size:
        return {**blank, "reason": "the size of the vocabulary is unknown"}
    length = min(_LENGTH, int(described.get("max_position_embeddings") or _LENGTH))
    windows = _random_windows(int(size), seed, length)
    try:
        rows = score_all(TorchSource(model, metric_of(kind).task, device=device).score(windows), len(windows))
    except Exception as error:  # noqa: BLE001 - the model may be anything; without data a run finishes all the same
        return {**blank, "reason": f"the model takes no token ids ({type(error).__name__}: {error})".splitlines()[0]}
    halves = {"preview": slice(_WINDOWS // 2), "final": slice(_WINDOWS // 2, None)}
    found = {name: finite_or_none(perplexity(rows.loss[part], rows.tokens[part])) for name, part in halves.items()}
    return {**blank, **found, "windows": _WINDOWS, "reason": "no calibration data"}
