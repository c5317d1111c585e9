"""What certification costs, as ratios in one run (SPEC §11).

    python benchmarks/cost.py            a 26M-parameter model, about a minute and a half on two cores
    python benchmarks/cost.py --full     the contract's conditions: 124M parameters, over 50,000 tokens

Prints a table and exits 0 whether or not a goal is met: it measures, it does not judge. Each figure is a ratio of two
measurements of the same process on the same machine, taken in turn; absolute seconds are shown for orientation only.

- certify / plain: `certify` end to end over loading both models and running two plain batched forward passes with
  cross-entropy on the same windows, batched the same way;
- extras: the share of certify that guards, divergence and sketches take: certify as it is, less the same job with the
  guards off, divergence off and sketches off, over certify as it is;
- memory: the peak above the imports over the size of one model in memory, each job in a process of its own;
- cached baseline: certify with --baseline-report over certify without;
- bootstrap: 3200 replicates over 400 windows; `--help`: the start of the command line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SMALL = {"n_embd": 512, "n_layer": 8, "n_head": 8, "vocab_size": 4096, "windows": 30, "seq_len": 256}
FULL = {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "windows": 52, "seq_len": 512}


def make_model(folder: Path, size: dict[str, int]) -> None:
    """Write a GPT-2-shaped model with seeded random weights: cost does not depend on what it has learned."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {key: size[key] for key in ("n_embd", "n_layer", "n_head", "vocab_size")}
    config = GPT2Config(**shape, n_positions=size["seq_len"], bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    demo = Path(__file__).parents[1] / "src/invarlock/data/demo_model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, folder)


def request(folder: Path, size: dict[str, int], out: Path, **changes: Any) -> Any:
    from invarlock.core.certify import CertifyRequest

    count = size["windows"]
    overrides: dict[str, Any] = {"sample": {"preview": count, "final": count, "min_tokens": 0}}
    overrides = {**overrides, **changes.pop("overrides", {})}
    if "baseline_report" not in changes:
        changes["baseline"] = str(folder)
    return CertifyRequest(
        subject=str(folder),
        profile="ci_cpu",
        dataset={"provider": "python_docs", "split": "all", "seq_len": size["seq_len"]},
        overrides=overrides,
        out=out,
        **changes,
    )


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    value = work()
    return time.perf_counter() - started, value


def plain(folder: Path, report: Path, batch_tokens: int) -> int:
    """Load the model twice, and run two plain passes over the windows that certify used; returns the tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    windows = json.loads(report.read_text())["evaluation_windows"]
    rows = windows["preview"]["input_ids"] + windows["final"]["input_ids"]
    by_length: dict[int, list[list[int]]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    for _ in range(2):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.inference_mode():
            for length, group in by_length.items():
                size = max(1, batch_tokens // length)
                for start in range(0, len(group), size):
                    ids = torch.tensor(group[start : start + size])
                    logits = model(ids, use_cache=False).logits
                    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
                    torch.nn.functional.cross_entropy(flat, ids[:, 1:].reshape(-1))
        del model
    return sum(map(len, rows))


def peak_child(mode: str, folder: Path, size: dict[str, int], out: Path) -> float:
    """Run one job in a process of its own and return its peak resident memory above the imports, in bytes."""
    command = [sys.executable, __file__, "--child", mode, str(folder), json.dumps(size), str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.strip().splitlines()[-1])


def child(mode: str, folder: Path, size: dict[str, int], out: Path) -> None:
    import torch  # noqa: F401 - the imports are what the peak is measured above
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    import invarlock.eval.measure  # noqa: F401
    from invarlock.core.certify import certify

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if mode == "certify":
        certify(request(folder, size, out))
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def help_seconds() -> float:
    command = [sys.executable, "-m", "invarlock", "--help"]
    times = [seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))[0] for _ in range(5)]
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

    from invarlock.eval.bootstrap import weighted_mean_interval

    values = np.random.default_rng(0).normal(size=400)
    weighted_mean_interval(values, np.ones(400), range(400), replicates=100)
    return seconds(lambda: weighted_mean_interval(values, np.ones(400), range(400), replicates=3200))[0]


def measure(size: dict[str, int], rounds: int) -> list[tuple[str, float, str]]:
    from invarlock.core.certify import certify
    from invarlock.eval.loop import BATCH_TOKENS

    off = {
        "guards": {"order": ["invariants"]},
        "metrics": {"divergence": {"mode": "off"}},
    }
    rows: list[tuple[str, float, str]] = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        folder = root / "model"
        make_model(folder, size)
        bytes_on_disk = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        outcome = certify(request(folder, size, root / "warm"))  # warms caches and gives the windows
        report = outcome.source_report
        assert report is not None
        table: dict[str, list[float]] = {"certify": [], "plain": [], "cached": [], "bare": []}
        tokens = 0
        for turn in range(rounds):
            table["certify"].append(seconds(lambda t=turn: certify(request(folder, size, root / f"c{t}")))[0])
            taken, tokens = seconds(lambda: plain(folder, report, BATCH_TOKENS))
            table["plain"].append(taken)
            table["bare"].append(
                seconds(lambda t=turn: certify(request(folder, size, root / f"b{t}", overrides=off)))[0]
            )
            table["cached"].append(
                seconds(lambda t=turn: certify(request(folder, size, root / f"r{t}", baseline_report=report)))[0]
            )
        best = {name: min(values) for name, values in table.items()}
        peak = peak_child("certify", folder, size, root / "peak")
        print(f"{bytes_on_disk / 4e6:.0f}M parameters, {tokens} tokens, {rounds} rounds, best of each")
        for name, value in best.items():
            print(f"  {name:<8} {value:8.2f} s")
        rows += [
            ("certify / two plain passes and loading", best["certify"] / best["plain"], "<= 1.15"),
            ("share of guards, divergence, sketches", 1 - best["bare"] / best["certify"], "<= 0.08"),
            ("cached baseline / certify", best["cached"] / best["certify"], "about 0.5"),
            ("(peak memory - 300 MB) / one model", (peak - 300e6) / bytes_on_disk, "<= 1.25"),
        ]
    rows += [
        ("invarlock --help, seconds", help_seconds(), "<= 0.4"),
        ("invarlock --help imports torch", float(help_imports_torch()), "0"),
        ("3200 replicates over 400 windows, seconds", bootstrap_seconds(), "<= 0.3"),
    ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="124M parameters and over 50,000 tokens")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        mode, folder, size, out = arguments.child
        child(mode, Path(folder), json.loads(size), Path(out))
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    rows = measure(FULL if arguments.full else SMALL, arguments.rounds)
    print(f"{'figure':<44} {'measured':>9}  goal")
    for name, value, goal in rows:
        print(f"{name:<44} {value:9.3f}  {goal}")


if __name__ == "__main__":
    main()
