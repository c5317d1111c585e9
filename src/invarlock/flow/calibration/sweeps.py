"""Run harmless edits through the guards and write down what they saw.

`null_sweep` is about the spectral and the rmt guard, `ve_sweep` about variance equalisation. Both change the model in
place, edit by edit, and put it back. Every row names its edit and seed, so that a threshold can be traced to its runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from invarlock.core.api import AdapterLike, Batches, ModelLike
from invarlock.eval.sources.torch_model import TorchSource, task_of_model
from invarlock.evidence.windows import calibration_windows
from invarlock.flow.calibration.nulls import NULL_EDITS, restored
from invarlock.guards import RMTGuard, SpectralGuard, VarianceGuard

__all__ = ["Progress", "Row", "null_sweep", "ve_sweep"]

Row = dict[str, Any]
Progress = Callable[[str], None]


def _runs(model: ModelLike, adapter: AdapterLike, seeds: int, progress: Progress | None) -> Iterator[tuple[str, int]]:
    """Apply each harmless edit in turn, yield its name and seed, and undo it."""
    import torch

    restore = restored(model)
    for name, (apply, seeded) in NULL_EDITS.items():
        for seed in range(seeds if seeded else 1):
            if progress is not None:
                progress(f"{name}, seed {seed}")
            try:
                with torch.no_grad():
                    apply(model, adapter, torch.Generator().manual_seed(seed))
                yield name, seed
            finally:
                restore()


def null_sweep(
    model: ModelLike, adapter: AdapterLike, batches: Batches, *, seeds: int = 3, progress: Progress | None = None
) -> list[Row]:
    """Measure `model` under every harmless edit; `batches` as for `CoreRunner.execute`.

    Rows hold `edit`, `seed`, `spectral` {family: [ln(sigma1 / sigma0) a matrix]} and `rmt` {family: [ln(r1 / r0)]}.
    """
    spectral, rmt = SpectralGuard(), RMTGuard()
    weights, edges = spectral.measure(model, adapter), rmt.look(model, adapter, batches)
    rows = []
    for name, seed in _runs(model, adapter, seeds, progress):
        row: Row = {"edit": name, "seed": seed, "spectral": {}, "rmt": {}}
        for module in spectral.pair(weights, spectral.measure(model, adapter))["modules"]:
            before, after = module["sigma"]
            if before and after:
                row["spectral"].setdefault(module["family"], []).append(math.log(after / before))
        judged = rmt.judge(rmt.pair(edges, rmt.look(model, adapter, batches)), rmt.policy)
        for family, figures in judged["metrics"]["families"].items():
            row["rmt"][family] = [math.log1p(figures["change"])]
        rows.append(row)
    return rows


def ve_sweep(
    model: ModelLike,
    adapter: AdapterLike,
    batches: Batches,
    *,
    seeds: int = 1,
    progress: Progress | None = None,
    **policy: Any,
) -> list[Row]:
    """Let the variance guard propose and try scales under every harmless edit, with the largest taps always proposed.

    Rows hold `edit`, `seed`, `proposed` (how many scales), `enabled`, and the interval of the change of log-loss in
    nats a token: `estimate`, `lo`, `hi` (None where nothing was proposed).
    """
    chosen = {"deadband": 0.0, "min_abs_adjust": 0.0, "topk_backstop": 1, "max_adjusted_modules": 4, **policy}
    guard = VarianceGuard(**chosen)
    guard.prepare(model, adapter, batches, {})
    windows, source = calibration_windows(batches), TorchSource(model, task_of_model(model, adapter))
    rows = []
    for name, seed in _runs(model, adapter, seeds, progress):
        found = guard.validate(model, adapter, {"batches": batches})
        metrics = guard.remedy(model, adapter, found, windows, source)[0]["metrics"]
        interval = metrics["interval"] or {}
        row = {"edit": name, "seed": seed, "proposed": len(metrics["proposed"]), "enabled": metrics["enabled"]}
        rows.append({**row, **{key: interval.get(key) for key in ("estimate", "lo", "hi")}})
    return rows
