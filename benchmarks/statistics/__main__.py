"""Simulate the statistics, print tables, and write benchmarks/results/statistics.{txt,json}.

python -m benchmarks.statistics              every table, each within two minutes on one core
python -m benchmarks.statistics --fast       a slice of ten seconds; writes nothing
python -m benchmarks.statistics --only power sequential
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: one core, so that times can be compared

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.statistics import tables
from benchmarks.statistics.sequential import EARLIER, EARLY, sequential
from benchmarks.statistics.sigma import sigma
from benchmarks.statistics.tables import BOUND, FAST, FULL, MINIMUM, Extent, Row

OUT = Path(__file__).resolve().parents[1] / "results"
ICCS = (0.0, 0.1, 0.3, 1.0)  # at 1 damage strikes whole documents
TABLES: dict[str, Callable[[Extent], list[Row]]] = {
    **{f"limit, ICC {icc:g}": lambda extent, icc=icc: tables.limit(extent, icc) for icc in ICCS},
    "power": tables.power,
    "advice": tables.advice,
    "sequential": sequential,
    "earlier looks": lambda extent: sequential(extent._replace(**EARLIER), EARLY),
    "accuracy": tables.accuracy,
    "divergence": tables.divergence,
    "glance": tables.glance,
    "sigma": lambda _: sigma(),
}
#: rows of the plain tables whose truth is at the limit or beyond, and the name of their false PASS
FALSE: dict[str, tuple[Callable[[Row], bool], str]] = {
    "sequential": (lambda row: True, "false pass"),
    "earlier looks": (lambda row: True, "false pass"),
    "accuracy": (lambda row: True, "new passes"),
    "divergence": (lambda row: float(row["truth"]) >= 1.0, "new passes"),
}
SLICE = ("limit, ICC 0.3", "power", "advice", "sequential", "accuracy", "divergence", "glance")


def pivoted(rows: list[Row]) -> Iterator[str]:
    """The tables at the limit: a line for values and sizes, for each number of documents old and new false PASS."""
    columns = sorted({int(row["documents"]) for row in rows})
    yield "false PASS where the truth is the limit, nominal .025: old rule, new rule, coverage of the new one"
    yield f"{'values':8} {'sizes':15}" + "".join(f"{f'{n} documents':>20}" for n in columns)
    for key in dict.fromkeys((row["values"], row["sizes"]) for row in rows):
        cells = {int(row["documents"]): row for row in rows if (row["values"], row["sizes"]) == key}
        line = f"{key[0]:8} {key[1]:15}"
        for n in columns:
            row = cells[n]
            new = float(row["new passes"])
            mark = "f" if float(row["effective"]) < MINIMUM else "*" if new > BOUND else " "
            line += f"{row['old passes']:8.3f}{new:6.3f}{mark}{row['new covers']:5.2f}"
        yield line


def plain(rows: list[Row], title: str) -> Iterator[str]:
    """One line a row; a star where a false PASS lies above the bound."""
    beyond, figure = FALSE.get(title, (lambda row: False, ""))
    names = list(rows[0])
    text = [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in text)) for i, name in enumerate(names)]
    marks = ["*" if beyond(row) and float(row[figure]) > BOUND else "" for row in rows]
    for line, mark in zip((names, *text), ("", *marks), strict=True):
        yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + mark


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.statistics", description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a slice of ten seconds; nothing is written")
    parser.add_argument("--only", nargs="+", metavar="TABLE", help="tables whose names begin so; nothing is written")
    arguments = parser.parse_args()
    extent = FAST if arguments.fast else FULL
    names = tuple(arguments.only or (SLICE if arguments.fast else TABLES))
    chosen = {name: make for name, make in TABLES.items() if name.startswith(names)}
    lines = [f"{extent.simulations} samples a cell; values of mean 0 and variance 1 a window, truth 0",
             f"* false PASS above {BOUND:g}; f fewer than {MINIMUM} effective documents: no PASS is given there"]  # fmt: skip
    found: dict[str, list[Row]] = {}
    print("\n".join(lines))
    for name, make in chosen.items():
        start = time.process_time()
        rows = make(extent)
        shown = ["", f"## {name}", *(pivoted(rows) if name.startswith("limit") else plain(rows, name))]
        print("\n".join(shown), f"\n({time.process_time() - start:.0f} s)", flush=True)
        lines += shown
        found[name] = rows
    if not (arguments.fast or arguments.only):
        (OUT / "statistics.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (OUT / "statistics.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
