"""How long and how much disk: measured on small models, extrapolated by a formula.

    python -m benchmarks.resources            measures, some minutes on one core; writes results/resources.json
    python -m benchmarks.resources --table    prints the table of the last measurement again

A model of N parameters is certified against itself on T scored tokens, each job in a process of its own and on one
thread. Fitted by least squares over all jobs:

- seconds of the processor = a + b N + c N T: starting; reading, loading and looking at the weights; two passes over the text;
- bytes written = d + e T.

The peak of memory above the imports stands job by job and is not extrapolated: models this small take less than the work.

The table puts other N and T into these. It is an extrapolation over orders of magnitude: a larger model is
used more efficiently by the same processor, and an accelerator has figures of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.cost import in_child

RESULTS = Path(__file__).parent / "results" / "resources.json"
#: shapes, and for each the numbers of windows (preview, and as many final)
_JOBS: tuple[tuple[dict[str, int], tuple[int, ...]], ...] = (
    ({"n_embd": 256, "n_layer": 6, "n_head": 4, "vocab_size": 8192}, (16, 32)),
    ({"n_embd": 512, "n_layer": 8, "n_head": 8, "vocab_size": 16384}, (16, 32)),
    ({"n_embd": 768, "n_layer": 6, "n_head": 12, "vocab_size": 4096}, (4,)),
    ({"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 4096}, (4,)),
)
_SEQ_LEN = 128
_MODELS = {"1B": 1e9, "7B": 7e9, "70B": 70e9}
_TOKENS = {"ci_cpu": 25_000, "ci": 50_000}


def job(folder: Path, windows: int, out: Path) -> dict[str, float]:
    """Certify the model in `folder` against itself, in this process; return what that took."""
    import torch

    from invarlock.flow.certify import CertifyRequest, certify
    from invarlock.reporting.bundle import write_bundle

    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    sample = {"preview": windows, "final": windows, "min_tokens": 0, "early_stop": False}
    request = CertifyRequest(
        subject=str(folder),
        baseline=str(folder),
        profile="ci_cpu",
        dataset={"provider": "python_docs", "split": "all", "seq_len": _SEQ_LEN},
        overrides={"sample": sample},
        out=out / "runs",
    )
    outcome = certify(request)
    write_bundle(outcome.certificate, out / "certificate")
    rows = outcome.certificate["evaluation_windows"]
    return {
        "tokens": sum(sum(rows[split]["tokens"]) for split in ("preview", "final")),
        "parameters": outcome.certificate["meta"]["subject_model"]["parameters"],
        "seconds": time.process_time() - started,
        "memory": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024,
        "disk": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    }


def _child(folder: Path, windows: int, out: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.resources", "--child", json.dumps([str(folder), windows, str(out)])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def measure() -> dict[str, Any]:
    """Run every job; return them with the fit and the machine."""
    jobs = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, (shape, sizes) in enumerate(_JOBS):
            folder = Path(scratch) / f"model{number}"
            in_child("make", str(folder), {**shape, "seq_len": _SEQ_LEN})  # this process must stay small
            for windows in sizes:
                out = Path(scratch) / f"out{number}-{windows}"
                jobs.append({"vocabulary": shape["vocab_size"], **_child(folder, windows, out)})
                print({key: round(value, 1) for key, value in jobs[-1].items()}, flush=True)
    return {"machine": f"{platform.machine()}, one core of {_processor()}", "jobs": jobs, "fit": fit(jobs)}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "this machine")


def fit(jobs: list[dict[str, float]]) -> dict[str, list[float]]:
    """Return the coefficients of both formulas, each with the largest error relative to what was measured."""
    n, t = (np.array([row[key] for row in jobs], dtype=float) for key in ("parameters", "tokens"))
    one = np.ones(len(jobs))
    designs = {"seconds": (one, n, n * t), "disk": (one, t)}
    found = {}
    for key, columns in designs.items():
        seen = np.array([row[key] for row in jobs], dtype=float)
        scale = np.array([column.max() for column in columns])  # columns of one size, for the sake of the arithmetic
        solved = np.linalg.lstsq(np.stack(columns, 1) / scale, seen, rcond=None)[0] / scale
        error = float(np.abs(np.stack(columns, 1) @ solved / seen - 1).max())
        found[key] = [*map(float, solved), error]
    return found


def table(result: dict[str, Any]) -> str:
    """Return the extrapolation as a table in Markdown."""
    (a, b, c, _), (d, e, _) = (result["fit"][key] for key in ("seconds", "disk"))
    lines = [
        "| model | profile | tokens | hours on one core | weights, float32 | weights, 16 bits | disk |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, n in _MODELS.items():
        for profile, t in _TOKENS.items():
            memory = [f"{size * n / 1e9:.0f} GB" for size in (4, 2)]
            cells = (
                name,
                f"`{profile}`",
                f"{t:,}",
                f"{(a + b * n + c * n * t) / 3600:.1f}",
                *memory,
                f"{(d + e * t) / 1e6:.0f} MB",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="measure nothing; print the table of the last measurement")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        folder, windows, out = json.loads(arguments.child)
        print(json.dumps(job(Path(folder), windows, Path(out))))
        return
    if not arguments.table:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    print(json.dumps(result["fit"]))
    print(table(result))


if __name__ == "__main__":
    main()
