"""What each guard costs: CPU seconds that it adds to one side's measurement, and their share of it.

These models are so small that guards weigh more than on real ones; `benchmarks/cost.py` has the figures that count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks.faults.run import Bench

from invarlock.checkpoints.behaviour import load_config
from invarlock.checkpoints.files import read_structure
from invarlock.checkpoints.structure import layout_of
from invarlock.eval.sources.torch_model import TorchSource
from invarlock.guards import RMTGuard, SpectralGuard, VarianceGuard
from invarlock.guards.sketch import sketch_model

REPEATS = 3


def costs(bench: Bench) -> dict[str, Any]:
    """Return CPU seconds of a bare measurement and of what each guard adds; the least of three."""
    bench.live.load_state_dict(bench.state)
    windows = bench.used["docs"].all

    def run(guard: Any = None) -> None:
        watch = guard.watch(bench.live, bench.adapter, len(windows)) if guard is not None else None
        for _ in TorchSource(bench.live, bench.task).score(windows, watch=[watch] if watch is not None else []):
            pass
        if guard is not None:
            guard.measure(bench.live, bench.adapter)

    layout = layout_of(load_config(bench.folder), bench.adapter.auto_class)
    bare = _least(run)
    return {
        "bare": bare,
        "invariants": _least(lambda: read_structure(bench.folder, layout)),
        "spectral": _least(lambda: SpectralGuard().measure(bench.live, bench.adapter)),
        "rmt": max(0.0, _least(lambda: run(RMTGuard())) - bare),
        "variance": max(0.0, _least(lambda: run(VarianceGuard())) - bare),
        "sketches": _least(lambda: sketch_model(bench.live)),
    }


def _least(action: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        started = time.process_time()
        action()
        times.append(time.process_time() - started)
    return round(min(times), 4)
