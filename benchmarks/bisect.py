"""Does `bisect` put first what was planted, and does its ranking recover more than that by relative change?

    python -m benchmarks.bisect [--model NAME] [--every N] [--only single|pair|global|repair]

- single: every edit of one matrix of the fault matrix that fails by behaviour, alone and beside 8-bit rounding of all
  other matrices (alone, the only changed tensor is first by itself)
- pair: two such edits of different matrices, each of which fails alone, beside 8-bit rounding
- repair: rounding to 4 and 3 bits that fails, repaired as `bisect --repair` does: bytes of the tensors that it gives back and
  the verdict of its certificate, beside the bytes of whole layers given back in order of their expected damage
- global: rounding of all matrices to 4, 3 and 2 bits (a row, groups of 32, a tensor): nats recovered when the first 1, 2,
  3, 5 ... of the ranking are given back, and the area under that curve over all sizes as a share of all that was lost
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shutil
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.faults.__main__ import MODELS, ROOT
from benchmarks.faults.edits import EDITS, UNIFORM, Case, cases

from invarlock.edits.rtn import RTNQuantEdit
from invarlock.flow import bisect as flow
from invarlock.flow.bisect import Bisection, BisectRequest, Search, bisect, open_search
from invarlock.flow.damage import Changed, Trials, changed_tensors
from invarlock.flow.repair import repair
from invarlock.guards.families import layer_index

SIZES = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89)
BITS = {
    f"{bits} bits {what}": {"bitwidth": bits, **how}
    for bits in (4, 3, 2)
    for what, how in (("a row", {}), ("in groups of 32", {"group_size": 32}), ("a tensor", {"per_channel": False}))
}
WINDOWS, SEQ_LEN = 16, 96
REPAIR_WINDOWS = 64  # as the command line's: to search on, and as many held back


class Bench:
    """A baseline, and a second copy of it on which faults are made in memory."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        provider = "seq2seq" if name == "t5" else "python_docs"
        data = {"provider": provider, "split": "test", "seq_len": SEQ_LEN}
        self.folder = folder
        self.request = BisectRequest(str(folder), str(folder), dataset=data, search=WINDOWS)
        self.search = open_search(self.request, None)
        self.model: Any = self.search.subject
        self.state = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.trials = Trials(self.search.job, self.search.baseline, self.search.subject, self.search.windows.preview)

    def restore(self) -> None:
        """Give the copy its own values again; a search lets it share memory with the baseline where both are the same."""
        for name, parameter in self.model.named_parameters():
            parameter.data = self.state[name].clone()

    def plant(self, faults: Sequence[Case], rounding: dict[str, Any] | None) -> list[str] | None:
        """Make the faults; return the names of what they changed, None where the model has no place for one."""
        named: list[str] = []
        self.restore()
        with torch.no_grad():
            if rounding is not None:
                RTNQuantEdit(**rounding).apply(self.model, None)
            for case in faults:
                assert case.edit.change is not None
                found = case.edit.change(case.place(self.model, frozenset()))
                if found is None or len(found) != 1 or found == UNIFORM:
                    return None
                named += found
        return named if len(set(named)) == len(faults) else None

    def fails(self, faults: Sequence[Case], rounding: dict[str, Any] | None) -> list[str] | None:
        """Plant, and return the names if the damage is beyond a limit on these windows."""
        named = self.plant(faults, rounding)
        if named is None:
            return None
        return named if self.trials.damage().fails else None

    def ranked(self) -> Bisection:
        """Search without giving back together."""
        found = Bisection(self.name, "planted")
        together, flow._together = flow._together, lambda *_: None
        try:
            flow._search(self.search, found)
        finally:
            flow._together = together
        return found


ROUNDED = {"bitwidth": 8}


def candidates() -> list[Case]:
    """Return the edits of the matrix that change one matrix and act on what a model says."""
    return [c for c in cases(EDITS) if c.edit.kind in ("behaviour", "degenerate") and c.edit.change is not None]


def singles(bench: Bench, every: int) -> Iterator[dict[str, Any]]:
    for case in candidates()[::every]:
        for rounding in (None, ROUNDED):
            named = bench.fails([case], rounding)
            if named is None:
                continue
            ranking = named if rounding is None else [change.name for change in bench.ranked().ranking]
            yield row(
                bench,
                "single",
                case.name,
                beside=rounding is not None,
                place=ranking.index(named[0]) + 1,
                of=len(ranking),
            )


def pairs(bench: Bench, every: int) -> Iterator[dict[str, Any]]:
    failing = [case for case in candidates()[:: max(1, every // 2)] if bench.fails([case], None)]
    for one, two in list(itertools.combinations(failing, 2))[:: 3 * every * max(1, len(failing) // 12)]:
        named = bench.fails([one, two], ROUNDED)
        if named is None:
            continue
        ranking = [change.name for change in bench.ranked().ranking]
        place = max(ranking.index(name) + 1 for name in named)
        yield row(bench, "pair", f"{one.name} and {two.name}", place=place, of=len(ranking))


def curves(bench: Bench, every: int) -> Iterator[dict[str, Any]]:
    search: Search = bench.search
    for name, how in list(BITS.items())[:: min(every, 3)]:
        bench.restore()
        with torch.no_grad():
            RTNQuantEdit(**how).apply(bench.model, None)
        found = bench.ranked()
        changes = changed_tensors(search.baseline, search.subject)
        orders = {
            "gradient": sorted(found.ranking, key=lambda change: -change.expected),
            "bisect": found.ranking,
            "relative change": sorted(changes.values(), key=lambda change: -(change.rel_change or 0.0)),
        }
        trials = bench.trials
        whole = trials.damage()
        sizes = [0, *(size for size in SIZES if size < len(changes)), len(changes)]
        recovered: dict[str, list[float]] = {}
        for order, ranking in orders.items():
            names = [change.name for change in ranking]
            recovered[order] = [whole.kl.estimate - trials.damage(names[:size]).kl.estimate for size in sizes]
        area = {
            order: float(np.trapezoid(values, sizes) / (whole.kl.estimate * len(changes)))
            for order, values in recovered.items()
        }
        yield row(
            bench, "global", name, kl=whole.kl.estimate, fails=whole.fails, sizes=sizes, recovered=recovered, area=area
        )


def repairs(bench: Bench) -> Iterator[dict[str, Any]]:
    """Repair for real, as the command line does: search, choose, write, and certify on windows that were held back."""
    for name in (name for name in BITS if not name.startswith("2")):
        bench.restore()
        with torch.no_grad():
            RTNQuantEdit(**BITS[name]).apply(bench.model, None)
        if not bench.trials.damage().fails:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            subject = Path(scratch) / "subject"
            bench.model.save_pretrained(subject)
            for path in bench.folder.iterdir():  # the tokenizer
                if path.suffix in (".json", ".txt") and not (subject / path.name).exists():
                    shutil.copy(path, subject)
            request = dataclasses.replace(
                bench.request, subject=str(subject), search=REPAIR_WINDOWS, held=REPAIR_WINDOWS
            )
            search = open_search(request, None)
            found = bisect(search)
            made, outcome = repair(request, search, found, Path(scratch) / "mended", Path(scratch) / "runs")
        sizes = {change.name: change.bytes for change in found.ranking}
        verdict = outcome.certificate["verdict"] if outcome is not None else None
        yield row(
            bench, "repair", name, everything=made.everything, verdict=verdict and verdict["status"],
            why=[reason["message"] for reason in verdict["reasons"]] if verdict and verdict["status"] != "PASS" else [],
            bytes=sum(sizes[one] for one in made.names), of=sum(sizes.values()), by_layers=_by_layers(search, found),
        )  # fmt: skip


def _by_layers(search: Search, found: Bisection) -> int:
    """Return the bytes of whole layers given back in the order of their expected damage until it passes as well."""
    trials = Trials(search.job, search.baseline, search.subject, search.windows.preview)
    layers: dict[int | None, list[Changed]] = {}
    for change in found.ranking:
        layers.setdefault(layer_index(change.name), []).append(change)
    given: list[Changed] = []
    for members in sorted(layers.values(), key=lambda members: -sum(change.expected for change in members)):
        given += members
        if trials.damage([change.name for change in given]).passes_again:
            break
    return sum(change.bytes for change in given)


def row(bench: Bench, kind: str, case: str, **facts: Any) -> dict[str, Any]:
    found = {"model": bench.name, "kind": kind, "case": case, **facts}
    shown = {key: value for key, value in facts.items() if key not in ("sizes", "recovered")}
    print(bench.name, kind, case, shown, flush=True)
    return found


def summary(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield what the rows say, in words."""
    for what, chosen, within in (
        ("single, alone: planted tensor first", [r for r in rows if r["kind"] == "single" and not r["beside"]], 1),
        (
            "single, beside 8-bit rounding: planted tensor first",
            [r for r in rows if r["kind"] == "single" and r["beside"]],
            1,
        ),
        ("pair, beside 8-bit rounding: both in the first three", [r for r in rows if r["kind"] == "pair"], 3),
    ):
        if chosen:
            right = sum(r["place"] <= within for r in chosen)
            yield f"{what}: {right} of {len(chosen)} ({right / len(chosen):.1%})"
    mended = [r for r in rows if r["kind"] == "repair"]
    if mended:
        some = [r for r in mended if not r["everything"]]
        yield (
            f"repair: of {len(mended)} edits that fail, a set short of everything found for {len(some)}; certified on other "
            f"windows: {', '.join(f'{count} {verdict}' for verdict, count in Counter(r['verdict'] for r in some).items())}; "
            f"fewer bytes than whole layers in {sum(r['bytes'] < r['by_layers'] for r in some)}"
        )
    runs = [r for r in rows if r["kind"] == "global"]
    for order in ("gradient", "bisect", "relative change") if runs else ():
        area = statistics.mean(r["area"][order] for r in runs)
        yield f"global, area under the curve by {order}: mean {area:.3f} (n = {len(runs)})"
    for order in ("gradient", "bisect") if runs else ():
        better = sum(r["area"][order] > r["area"]["relative change"] for r in runs)
        points = [
            (a, b, r["kl"])
            for r in runs
            for a, b in list(zip(r["recovered"][order], r["recovered"]["relative change"], strict=True))[1:-1]
        ]
        at = sum(a >= b - 1e-3 * kl for a, b, kl in points)
        yield f"global, {order} over relative change: larger area in {better} of {len(runs)}, at {at} of {len(points)} sizes"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bisect", description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--every", type=int, default=1, help="take one case in so many")
    parser.add_argument("--only", choices=("single", "pair", "global", "repair"), action="append")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/bisect.json")
    arguments = parser.parse_args()
    wanted = arguments.only or ["single", "pair", "global", "repair"]
    rows: list[dict[str, Any]] = []
    for name in arguments.model or MODELS:
        bench = Bench(name, MODELS[name])
        rows += singles(bench, arguments.every) if "single" in wanted else ()
        rows += pairs(bench, arguments.every) if "pair" in wanted else ()
        rows += curves(bench, arguments.every) if "global" in wanted else ()
        rows += repairs(bench) if "repair" in wanted else ()
        about = f"{', '.join(dict.fromkeys(r['model'] for r in rows))}; {WINDOWS} windows of {SEQ_LEN} tokens"
        lines = [f"{about}; one case in {arguments.every}", *summary(rows)]
        settings = {"windows": WINDOWS, "seq_len": SEQ_LEN, "every": arguments.every}
        found = json.loads(
            json.dumps({"settings": settings, "rows": rows}), parse_float=lambda x: float(f"{float(x):.5g}")
        )
        arguments.out.write_text(json.dumps(found).replace('{"model"', '\n{"model"') + "\n", encoding="utf-8")
        arguments.out.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
