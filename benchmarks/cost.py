"""What certification costs, as ratios in one run (SPEC §11).

    python -m benchmarks.cost            the contract's conditions: 124M parameters, over 50,000 tokens (about 15 minutes)
    python -m benchmarks.cost --small    34M parameters and 13,000 tokens, about two minutes

Prints a table and exits 0 whether or not a goal is met: it measures, it does not judge. Each figure is a ratio of two
measurements on the same machine, taken in turn, each job in a process of its own and without its imports; absolute
seconds are shown for orientation only.

- certify / plain: `certify` end to end over loading both models and running two plain batched forward passes with
  cross-entropy on the same windows, batched the same way;
- share: the part of certify's time that goes into guards, divergence and sketches, by clocks around just these within
  the run itself (two runs of a minute differ by more than the share does); `--without` also runs certify with all of it
  switched off, for whoever does not trust the clocks;
- memory: the peak above the imports over the size of one model in memory;
- cached baseline: certify with --baseline-report over certify without;
- fixed: what a command takes beside scoring windows, on 8,000 tokens, over two plain passes over these; from the start
  of the process to its end, imports included, loading the two models told apart;
- warm: certify an 8-bit rounding, look by look, with the baseline found in the cache, over two plain passes over the
  planned tokens; `wrecked`: seconds from command to FAIL of a model whose layers' inputs are shifted by one, less loading;
- pack: bytes a token of a baseline pack's distributions, and of the whole file;
- bootstrap: 3200 replicates over 400 windows; `--help`: the start of the command line.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

SMALL = {"hidden": 512, "layers": 8, "vocabulary": 8192, "windows": 30, "seq_len": 256}
FULL = {"hidden": 768, "layers": 12, "vocabulary": 50257, "windows": 125, "seq_len": 256}
SHORT_TOKENS = 8_000  # on which the fixed cost is taken
FILLED = 0.77  # of a window, on average, since documents end within
#: what a run does beyond loading, forward passes and log-loss: module, attribute
EXTRAS = (
    ("invarlock.eval.divergence", "reference_rows"),
    ("invarlock.eval.divergence", "kl_and_flips"),
    ("invarlock.flow.measure", "reference_digest"),
    ("invarlock.flow.steps", "write_reference"),
    ("invarlock.guards.spectral", "SpectralGuard.measure"),
    ("invarlock.guards.rmt", "_see"),
    ("invarlock.guards.variance", "_see"),
    ("invarlock.guards.sketch", "sketch_model"),
)
#: scoring windows and loading a model, which are no fixed cost
PARTS = (("invarlock.flow.measure", "_score"), ("invarlock.flow.steps", "load"))
WITHOUT = {"guards": {"order": ["invariants"]}, "metrics": {"divergence": {"mode": "off"}}}


def make_model(folder: Path, size: dict[str, int], bits: int = 8) -> None:
    """Write a trained model in a body of this size. Beside it lie `rounded`, to so many bits, and `wrecked`, whose layers'
    matrices are shifted by one input."""
    import torch
    from benchmarks.widened import SMALL_MODEL, widened

    from invarlock.edits import RTNQuantEdit

    model = widened(size["hidden"], size["layers"], size["vocabulary"], size["seq_len"])
    model.save_pretrained(folder)
    with torch.no_grad():
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        RTNQuantEdit(bitwidth=bits).apply(model, None)
        model.save_pretrained(folder.with_name("rounded"))
        model.load_state_dict(state)
        for name, parameter in model.named_parameters():
            if ".layers." in name and parameter.ndim == 2:
                parameter.copy_(parameter.roll(1, 1))
        model.save_pretrained(folder.with_name("wrecked"))
    for path in SMALL_MODEL.glob("tokenizer*.json"):
        for side in (folder.name, "rounded", "wrecked"):
            shutil.copy(path, folder.with_name(side))


@contextlib.contextmanager
def clocked(seconds: dict[str, float], what: tuple[tuple[str, str], ...]) -> Iterator[None]:
    """Add up, by name, the time spent in each of `what`."""

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def run(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return work(*arguments, **options)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

        return run

    with contextlib.ExitStack() as patches:
        for module, attribute in what:
            target = functools.reduce(getattr, attribute.split(".")[:-1], __import__(module, fromlist=["_"]))
            last = attribute.split(".")[-1]
            patches.enter_context(mock.patch.object(target, last, timed(attribute, getattr(target, last))))
        yield


def certify_job(folder: Path, size: dict[str, int], out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Certify; returns seconds, those spent on extras and parts, and what the certificate says of the amount of text.

    `options`: `subject` (default: the model itself), `report` of a measured baseline, `overrides`, `early` (look by
    look), `cache`, `verdict` to expect, `windows` of each of preview and final.
    """
    from invarlock.flow.certify import CertifyRequest, certify

    count, report = options.get("windows", size["windows"]), options.get("report")
    sample = {"preview": count, "final": count, "min_tokens": 0, "early_stop": options.get("early", False)}
    if "windows" in options:
        sample["min_documents"] = 0
    request = CertifyRequest(
        subject=str(folder.with_name(options.get("subject", folder.name))),
        baseline=None if report else str(folder),
        baseline_report=Path(report) if report else None,
        profile="ci_cpu",
        dataset={"provider": "python_docs", "split": "all", "seq_len": size["seq_len"]},
        overrides={"sample": sample, **options.get("overrides", {})},
        out=out,
        cache=options.get("cache", False),
    )
    extras: dict[str, float] = {}
    parts: dict[str, float] = {}
    started = time.perf_counter()
    with clocked(extras, EXTRAS), clocked(parts, PARTS):
        outcome = certify(request)
    taken = time.perf_counter() - started
    expected = options.get("verdict", "PASS")
    assert outcome.status == expected, f"{outcome.status}, {outcome.certificate['verdict']['reasons']}"
    share = (outcome.certificate.get("looks") or {}).get("share_used", 1.0)
    return {
        "seconds": taken, "extras": extras, "parts": parts, "report": str(outcome.source_report), "share": share,
        "timings": outcome.timings,
    }  # fmt: skip


def pack_job(folder: Path, size: dict[str, int], out: Path) -> dict[str, Any]:
    """Make a baseline pack of a short text; returns bytes a token of its distributions and of the whole file."""
    from invarlock.flow.baseline import make_pack
    from invarlock.flow.certify import CertifyRequest

    count = size["windows"] // 4
    made = make_pack(
        CertifyRequest(
            subject="",
            baseline=str(folder),
            profile="ci_cpu",
            dataset={"provider": "python_docs", "split": "all", "seq_len": size["seq_len"]},
            overrides={"sample": {"preview": count, "final": count, "min_tokens": 0}},
            cache=False,
        ),
        out,
    )
    return {"seconds": 0.0, "reference": made.reference_bytes_per_token, "whole": made.size / made.tokens}


def plain_job(folder: Path, report: str) -> dict[str, Any]:
    """Load the model twice, and run two plain passes over the windows that certify used."""
    import torch
    from transformers import AutoModelForCausalLM

    from invarlock.eval.sources.torch_model import BATCH_TOKENS

    windows = json.loads(Path(report).read_text())["evaluation_windows"]
    rows = windows["preview"]["input_ids"] + windows["final"]["input_ids"]
    by_length: dict[int, list[list[int]]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    started, passes = time.perf_counter(), 0.0
    for _ in range(2):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        loaded = time.perf_counter()
        with torch.inference_mode():
            for length, group in by_length.items():
                size = max(1, BATCH_TOKENS // length)
                for start in range(0, len(group), size):
                    ids = torch.tensor(group[start : start + size])
                    logits = model(ids, use_cache=False).logits
                    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
                    torch.nn.functional.cross_entropy(flat, ids[:, 1:].reshape(-1))
        passes += time.perf_counter() - loaded
        del model
    return {"seconds": time.perf_counter() - started, "passes": passes, "tokens": sum(map(len, rows))}


def in_child(job: str, *arguments: Any) -> dict[str, Any]:
    """Run one job in a process of its own; adds the peak of its resident memory above the imports, in bytes, and the
    seconds from the start of the process to its end."""
    command = [sys.executable, "-m", "benchmarks.cost", "--child", json.dumps([job, *arguments])]
    started = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    wall = time.perf_counter() - started
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "wall": wall}


def child(job: str, *arguments: Any) -> None:
    import torch  # noqa: F401 - the imports are what time and peak are measured above
    import transformers.models.llama.modeling_llama
    import transformers.tokenization_utils_tokenizers  # noqa: F401

    import invarlock.eval.data
    import invarlock.flow.certify
    import invarlock.flow.measure
    import invarlock.guards  # noqa: F401

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    folder, *rest = arguments
    result: dict[str, Any] = {}
    if job == "make":
        make_model(Path(folder), *rest)
    elif job == "plain":
        result = plain_job(Path(folder), *rest)
    else:
        size, out, *options = rest
        result = {"certify": certify_job, "pack": pack_job}[job](Path(folder), size, Path(out), *options)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(json.dumps({**result, "peak": peak}))


def help_seconds() -> float:
    command = [sys.executable, "-m", "invarlock", "--help"]
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return min(times)


def help_imports_torch() -> bool:
    code = (
        "import atexit, sys; sys.argv = ['invarlock', '--help']\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "from invarlock.cli.app import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stderr.strip().endswith("True")


def bootstrap_seconds() -> float:
    import numpy as np

    from invarlock.stats.intervals import weighted_mean_interval

    values = np.random.default_rng(0).normal(size=400)
    weighted_mean_interval(values, np.ones(400), range(400), replicates=100)
    started = time.perf_counter()
    weighted_mean_interval(values, np.ones(400), range(400), replicates=3200)
    return time.perf_counter() - started


def quick_rows(folder: Path, size: dict[str, int], rounds: int, passes: float) -> list[tuple[str, float, str]]:
    """What is not forward passes, and what a decision takes that needs few of them; `passes`: two over all tokens."""
    found: dict[str, list[dict[str, Any]]] = {}
    short = {"windows": round(SHORT_TOKENS / (2 * FILLED * size["seq_len"])), "subject": "rounded"}
    quick = {"early": True, "cache": True}
    for turn in range(rounds):
        out = str(folder.with_name(f"quick{turn}"))
        os.environ["INVARLOCK_CACHE"] = out + "-cache"  # the children's
        wrecked = {**quick, "subject": "wrecked", "verdict": "FAIL"}
        jobs = {"short": short, "wrecked": wrecked, "cold": {**quick, "subject": "rounded"}, "wrecked, warm": wrecked,
                "warm": {**quick, "subject": "rounded"}}  # fmt: skip
        for name, options in jobs.items():
            found.setdefault(name, []).append(in_child("certify", str(folder), size, f"{out}-{name}", options))
        found.setdefault("plain, short", []).append(in_child("plain", str(folder), found["short"][-1]["report"]))
        found.setdefault("pack", []).append(in_child("pack", str(folder), size, out + ".pack"))
    best = {name: min(jobs, key=lambda job: job["wall"]) for name, jobs in found.items()}
    for name, job in best.items():
        parts = "".join(f", {part} {seconds:.2f}" for part, seconds in job.get("parts", {}).items())
        used = f", {job['share']:.0%} of the tokens" if "share" in job else ""
        print(f"  {name:<14} {job['wall']:7.2f} s from start to end{parts}{used} {job.get('timings', '')}")
    one, plain, pack = best["short"], best["plain, short"], best["pack"]
    beside = one["wall"] - one["parts"]["_score"]
    after = {name: best[name]["wall"] - best[name]["parts"]["load"] for name in ("wrecked", "wrecked, warm")}
    return [
        (f"fixed, {plain['tokens']} tokens / two plain passes", (beside - one["parts"]["load"]) / plain["passes"],
         "<= 0.20"),
        ("  with loading both models", beside / plain["passes"], ""),
        ("  with all that scoring adds to them", (one["wall"] - one["parts"]["load"]) / plain["passes"] - 1, ""),
        ("wrecked: seconds to FAIL beyond loading", after["wrecked"], "<= 15"),
        ("  with a warm baseline", after["wrecked, warm"], ""),
        ("warm baseline / two plain passes", best["warm"]["wall"] / passes, "<= 0.35"),
        ("  share of the planned tokens", best["warm"]["share"], "<= 0.25"),
        ("pack: bytes a token of distributions", pack["reference"], ""),
        ("pack: bytes a token of the whole file", pack["whole"], ""),
    ]  # fmt: skip


def measure(size: dict[str, int], rounds: int, without: bool) -> list[tuple[str, float, str]]:
    """Run every job `rounds` times in turn, print the best of each, and return the rows of the table."""
    found: dict[str, list[dict[str, Any]]] = {"certify": [], "plain": [], "cached": [], "without": []}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        folder = root / "model"
        in_child("make", str(folder), size)  # a child's peak begins at the size of its parent, which must stay small
        model_bytes = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        for turn in range(rounds):
            out = str(root / f"run{turn}")
            found["certify"].append(in_child("certify", str(folder), size, out, {}))
            report = found["certify"][-1]["report"]
            found["plain"].append(in_child("plain", str(folder), report))
            found["cached"].append(in_child("certify", str(folder), size, out + "c", {"report": report}))
            if without:
                found["without"].append(in_child("certify", str(folder), size, out + "w", {"overrides": WITHOUT}))
        rows = quick_rows(folder, size, rounds, min(job["passes"] for job in found["plain"]))
    best = {name: min(jobs, key=lambda job: job["seconds"]) for name, jobs in found.items() if jobs}
    certify, plain, cached = best["certify"], best["plain"], best["cached"]
    print(f"{model_bytes / 4e6:.0f}M parameters, {plain['tokens']} tokens, {rounds} round(s), the best of each job")
    for name, job in best.items():
        print(f"  {name:<8} {job['seconds']:8.2f} s   peak {job['peak'] / 1e6:6.0f} MB above the imports")
    for name, spent in sorted(certify["extras"].items(), key=lambda pair: -pair[1]):
        print(f"    {name:<24} {spent:6.2f} s  {spent / certify['seconds']:6.2%}")
    rows += [
        ("certify / two plain passes and loading", certify["seconds"] / plain["seconds"], "<= 1.15"),
        ("share of guards, divergence, sketches", sum(certify["extras"].values()) / certify["seconds"], "<= 0.08"),
        ("cached baseline / certify", cached["seconds"] / certify["seconds"], "about 0.5"),
        ("(peak memory - 300 MB) / one model", (certify["peak"] - 300e6) / model_bytes, "<= 1.25"),
    ]
    if without:
        rows.append(("1 - without them / certify", 1 - best["without"]["seconds"] / certify["seconds"], "<= 0.08"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="34M parameters and 13,000 tokens, two rounds")
    parser.add_argument("--without", action="store_true", help="also certify with all extras switched off")
    parser.add_argument("--rounds", type=int, help="default: 1, or 2 with --small")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*json.loads(arguments.child))
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    rounds = arguments.rounds or (2 if arguments.small else 1)
    rows = measure(SMALL if arguments.small else FULL, rounds, arguments.without)
    rows += [
        ("invarlock --help, seconds", help_seconds(), "<= 0.4"),
        ("invarlock --help imports torch", float(help_imports_torch()), "0"),
        ("3200 replicates over 400 windows, seconds", bootstrap_seconds(), "<= 0.3"),
    ]
    print(f"{'figure':<44} {'measured':>9}  goal")
    for name, value, goal in rows:
        print(f"{name:<44} {value:9.3f}  {goal}")


if __name__ == "__main__":
    main()
