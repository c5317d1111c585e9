"""What each guard costs: CPU seconds that it adds to one side's measurement, and their share of it.

These models are so small that guards weigh more than on real ones; `benchmarks/cost.py` has the figures that count.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from benchmarks.faults.run import Bench

from invarlock.checkpoints import files as checkpoint
from invarlock.eval.sources.torch_model import ActivationSampler, Task, evenly_spaced, forward_windows
from invarlock.guards import RMTGuard, SpectralGuard, VarianceGuard
from invarlock.guards.sketch import sketch_model

REPEATS = 3


def costs(bench: Bench) -> dict[str, Any]:
    """Return CPU seconds of a bare measurement and of what each guard adds; the least of three."""
    bench.live.load_state_dict(bench.state)
    windows = bench.used["docs"].all
    task: Task = bench.task  # type: ignore[assignment]  # the adapter's, one of the three
    sampled = frozenset(evenly_spaced(len(windows), 8))

    def run(guard: Any = None) -> None:
        sampler = ActivationSampler(sampled)
        with contextlib.ExitStack() as hooks:
            if hasattr(guard, "observe"):
                hooks.enter_context(guard.observe(bench.live, bench.adapter, sampler))
            forward_windows(bench.live, windows, task=task, sampler=sampler)
        if guard is not None:
            guard.measure(bench.live, bench.adapter)

    layout = checkpoint.layout_of(checkpoint.load_config(bench.folder), bench.adapter.auto_class)
    bare = _least(run)
    return {
        "bare": bare,
        "invariants": _least(lambda: checkpoint.read_structure(bench.folder, layout)),
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
