"""What the ranking of `bisect` costs at 124M parameters, over plain passes of the baseline on the same windows.

    python -m benchmarks.bisect_cost [--windows 16]

Certifying is measured in benchmarks/cost.py. Here both models are loaded as `bisect` loads them, the subject rounded to 4
bits, so that every matrix differs. Prints the time of the ranking over that of one plain forward pass, and the peak of
memory above the imports over the size of one model; the goals are 6 passes and two models. It measures, it does not judge.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.cost import FULL, SMALL, make_model

SEQ_LEN = 256


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(folder: Path, windows: int) -> dict[str, float]:
    """Rank the changes of `rounded` beside `folder`, in this process."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401 - what is imported before the peak is taken

    from invarlock.flow.bisect import BisectRequest, open_search
    from invarlock.flow.damage import changed_tensors, rank

    before = _peak()
    data = {"provider": "python_docs", "split": "all", "seq_len": SEQ_LEN}
    search = open_search(
        BisectRequest(str(folder), str(folder.with_name("rounded")), dataset=data, search=windows), None
    )
    chosen = search.windows.preview
    changes = changed_tensors(search.baseline, search.subject)
    started, loaded = time.perf_counter(), _peak()
    with torch.inference_mode():
        for window in chosen:
            search.baseline(torch.tensor([window.input_ids]), use_cache=False)
    passed = time.perf_counter()
    rank(search.job, search.baseline, search.subject, changes, chosen)
    done = time.perf_counter()
    size = sum(parameter.numel() * parameter.element_size() for parameter in search.baseline.parameters())
    return {
        "tokens": sum(len(window.input_ids) for window in chosen), "changed": len(changes), "plain": passed - started,
        "ranking": done - passed, "size": size, "loaded": loaded - before, "peak": _peak() - before,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bisect_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--small", action="store_true", help="34M parameters")
    parser.add_argument("--child", choices=("make", "rank"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = SMALL if arguments.small else FULL
    if arguments.child == "make":
        make_model(arguments.folder, size, bits=4)
        return
    if arguments.child == "rank":
        print(json.dumps(measured(arguments.folder, arguments.windows)))
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as scratch:
        again = [sys.executable, "-m", "benchmarks.bisect_cost", *sys.argv[1:], "--folder", f"{scratch}/model"]
        subprocess.run([*again, "--child", "make"], check=True, stderr=subprocess.DEVNULL)  # a child's peak is its own
        done = subprocess.run([*again, "--child", "rank"], check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{found['size'] / 4e6:.0f}M parameters, {found['tokens']} tokens, {found['changed']} changed tensors")
    print(f"{'ranking / one plain pass':<44} {found['ranking'] / found['plain']:9.3f}  <= 6")
    print(f"{'both loaded, memory / one model':<44} {found['loaded'] / found['size']:9.3f}")
    print(f"{'peak memory / one model':<44} {found['peak'] / found['size']:9.3f}  <= 2")


if __name__ == "__main__":
    main()
