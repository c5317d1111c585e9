"""Edits near a limit, and what other rules say of them: `python -m benchmarks.faults.near [--model NAME ...]`.

The harmless edits of the matrix lie far inside every limit. Here the size of an edit is searched until the figure that
lies nearest to its limit (ratio, KL or flips, measured on text that no certificate uses) is a third, a half or two
thirds of it, which is harmless, or one and a half times, which is not. Noise on every matrix mostly flips tokens;
sharpening or flattening the output, by the gain of the last norm, moves KL and the ratio and flips none.

All rules see the same windows. `looks` and `whole`: InvarLock, look by look and on all of the text. `ratio`, `KL`: a
threshold on the estimate. `unpaired`: fail where the mean log-losses of the two models differ by more than 1.96 standard
errors of independent samples. Written to benchmarks/results/near.{txt,json}.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.faults.__main__ import MODELS, ROOT
from benchmarks.faults.edits import UNIFORM, Case, Culprits, Edit, Place, noise
from benchmarks.faults.looks import by_looks, recorded
from benchmarks.faults.run import OVERRIDES, PROFILE, TIER, Bench

from invarlock.certificate.derive import derive
from invarlock.policy.limits import Limits
from invarlock.policy.resolve import resolve_policy

TARGETS = (1 / 3, 1 / 2, 2 / 3, 1.5)  # of the nearest limit
RULES = ("looks", "whole", "ratio", "KL", "unpaired")
SEARCHED, TRUE = 4, 24  # blocks of the oracle's text that the search looks at, and that say what an edit does
CLOSE, STEPS = 0.02, 14  # a size is found at this relative distance from the target, or after so many steps
Sized = Callable[[float], Callable[[Place], Culprits]]


def gain(power: float) -> Sized:
    """Multiply the gain of the last norm by (1 + size) ** power."""

    def sized(size: float) -> Callable[[Place], Culprits]:
        def change(place: Place) -> Culprits:
            norms = [m for m in place.model.modules() if "norm" in type(m).__name__.lower() and m.weight is not None]
            for parameter in norms[-1].parameters(recurse=False):
                parameter.mul_((1.0 + size) ** power)
            return UNIFORM

        return change

    return sized


#: name -> (edit of a size, seeds, largest size)
EDITS: dict[str, tuple[Sized, int, float]] = {
    "noise": (noise, 2, 1.0),
    "sharpened": (gain(1.0), 1, 4.0),
    "flattened": (gain(-1.0), 1, 4.0),
}


def nearness(bench: Bench, change: Callable[[Place], Culprits], case: Case, blocks: int) -> tuple[float, str]:
    """Return the figure that lies nearest to its limit, as a share of it, and its name."""
    with torch.no_grad():
        bench.live.load_state_dict(bench.state)
        change(case.place(bench.live, bench.seen))
        figures = bench.oracle.figures(bench.live, "docs", blocks)
    limits = bench.oracle.limits
    return max((figures[name] / limits[name], name) for name in limits)


def search(bench: Bench, sized: Sized, case: Case, target: float, largest: float) -> float:
    """Return the size of an edit at which the nearest figure is `target` of its limit: secant steps on the logarithms
    of both, in which figures are nearly straight lines, halved where they leave what is known to hold the answer."""
    low, high, size, before = 0.0, largest, largest / 16.0, None
    for _ in range(STEPS):
        value = nearness(bench, sized(size), case, SEARCHED)[0]
        if abs(value / target - 1.0) < CLOSE:
            break
        low, high = (size, high) if value < target else (low, size)
        slope = 1.0  # of the logarithms, where nothing is known of it
        if before is not None and before[0] != size and 0.0 < before[1] != value:
            slope = math.log(value / before[1]) / math.log(size / before[0])
        before, step = (size, value), size * (target / max(value, 1e-9)) ** (1.0 / max(slope, 0.5))
        size = step if low < step < high else (low + high) / 2.0
    return size


def verdicts(certificate: dict[str, Any]) -> dict[str, str]:
    """Return what every rule says, of the rows of a certificate on all of the text."""
    r = recorded(certificate)
    rows = list(r.evaluation_windows.values())
    columns = {
        name: np.array([value for split in rows for value in getattr(split, name)], dtype=float)
        for name in ("tokens", "baseline_loss", "subject_loss", "kl_sum")
    }
    tokens, old, new = (columns[name] for name in ("tokens", "baseline_loss", "subject_loss"))
    limits = Limits.model_validate(r.resolved_policy)
    moved = float((tokens * (new - old)).sum() / tokens.sum())
    error = math.sqrt((old.var(ddof=1) + new.var(ddof=1)) / len(tokens))
    fails = {
        "ratio": moved > math.log(limits.ratio.limit),
        "KL": columns["kl_sum"].sum() / tokens.sum() > limits.divergence.kl_max,
        "unpaired": float(new.mean() - old.mean()) > 1.96 * error,
    }
    sample = limits.sample
    found = {"looks": by_looks(r, sample.early_documents), "whole": derive(r)}
    said = {name: one.verdict.status for name, one in found.items()}
    return said | {name: "FAIL" if failed else "PASS" for name, failed in fails.items()}


def runs(name: str, folder: Path, work: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for every edit, seed and target of one model."""
    whole = {"sample": {**OVERRIDES["sample"], "early_stop": False}}
    bench = Bench(name, folder, work, texts=("docs",), overrides=whole)
    try:
        for kind, (sized, seeds, largest) in EDITS.items():
            for seed in range(seeds):
                for target in TARGETS:
                    blank = Case(Edit(f"near {kind}", "harmless"), 0.5, seed)
                    size = search(bench, sized, blank, target, largest)
                    true, figure = nearness(bench, sized(size), blank, TRUE)
                    case = Case(Edit(blank.edit.name, "harmless", change=sized(size)), 0.5, seed)
                    record = bench.run(case)
                    assert record is not None
                    said = verdicts(record["certificates"]["docs"]) if record["certificates"] else {}
                    yield {"model": name, "edit": kind, "seed": seed, "target": target, "size": size, "true": true,
                           "nearest": figure, "verdicts": said}  # fmt: skip
    finally:
        bench.close()


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a line for every edit and target: false alarms, undecided and missed of each rule."""
    shown = {"PASS": "passed", "FAIL": "failed", "INCONCLUSIVE": "undecided"}
    yield f"{'edit':<10} {'of the limit':>12} {'runs':>5}  " + "  ".join(f"{rule:>16}" for rule in RULES)
    yield f"{'':<30} " + "  ".join(f"{'/'.join(word[:5] for word in shown.values()):>16}" for _ in RULES)
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        for kind in (row["edit"], "all"):
            groups.setdefault((kind, row["target"]), []).append(row)
    for (kind, target), group in groups.items():
        cells = []
        for rule in RULES:
            counts = Counter(row["verdicts"].get(rule) for row in group)
            cells.append("/".join(str(counts[status]) for status in shown))
        yield f"{kind:<10} {target:>12.2f} {len(group):>5}  " + "  ".join(f"{cell:>16}" for cell in cells)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults.near", description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=list(MODELS), help="which models (default: all)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "near")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/near.json")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in arguments.model or MODELS:
        for row in runs(name, MODELS[name], arguments.work):
            rows.append(row)
            print(json.dumps(row), flush=True)
    lines = [f"tier {TIER}, profile {PROFILE}, documentation; harmless up to 1.00 of a limit", *table(rows)]
    print("\n".join(lines))
    arguments.out.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    limits = resolve_policy(TIER, PROFILE).values["metrics"]
    arguments.out.write_text(json.dumps({"limits": limits, "runs": rows}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
