"""Calibrate the guards' thresholds on small trained models: `python -m benchmarks.calibrate [--model NAME ...]`.

Runs the harmless edits of `invarlock.flow.calibration` on the models of four architectures, never on those held out, and on
the text that the fault matrix does not use (`train`). Writes every run and the thresholds that follow from them to
benchmarks/results/calibration.json; the numbers in tiers.yaml are these, rounded up.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.faults.__main__ import MODELS, ROOT

from invarlock.adapters import HF_Auto_Adapter
from invarlock.core.device import library_versions
from invarlock.eval.data import get_provider
from invarlock.evidence.windows import mask_tokens, windows_from_provider
from invarlock.flow.calibration import null_sweep, rmt_thresholds, spectral_thresholds, ve_sweep, ve_thresholds

CALIBRATED_ON = ("gpt2", "llama", "bert", "t5")
SEQ_LEN, WINDOWS = 128, 16


def batches(adapter: Any, folder: Path) -> list[dict[str, list[int]]]:
    """Return calibration windows of the model's own kind."""
    tokenizer = adapter.tokenizer(str(folder))
    provider = get_provider("seq2seq" if adapter.task == "seq2seq" else "python_docs", split="train")
    parts = provider.windows(tokenizer, preview_n=WINDOWS // 2, final_n=WINDOWS // 2, seq_len=SEQ_LEN, seed=1)
    windows = windows_from_provider(*parts, SEQ_LEN, (WINDOWS // 2, WINDOWS // 2))
    if adapter.task == "mlm":
        windows = mask_tokens(windows, tokenizer.mask_token_id, tokenizer.all_special_ids, seed=1)
    rows = [{"input_ids": list(w.input_ids), "labels": list(w.labels or ())} for w in windows.all]
    return [{key: value for key, value in row.items() if value} for row in rows]


def sweep(name: str, folder: Path, seeds: int) -> dict[str, Any]:
    adapter = HF_Auto_Adapter()
    model = adapter.load_model(str(folder), device="cpu", dtype="float32")
    data = batches(adapter, folder)
    null = null_sweep(model, adapter, data, seeds=seeds, progress=lambda what: print(name, what, flush=True))
    return {"null": null, "ve": ve_sweep(model, adapter, data)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibrate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=CALIBRATED_ON)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/calibration.json")
    arguments = parser.parse_args()
    stored = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"models": {}}
    for name in arguments.model or CALIBRATED_ON:
        if (MODELS[name] / "model.safetensors").is_file():
            stored["models"][name] = sweep(name, MODELS[name], arguments.seeds)
    null = [row for runs in stored["models"].values() for row in runs["null"]]
    trials = [row for runs in stored["models"].values() for row in runs["ve"]]
    stored["thresholds"] = {
        "spectral": spectral_thresholds(null),
        "rmt": rmt_thresholds(null),
        "variance": ve_thresholds(trials),
    }
    stored["settings"] = {
        "seeds": arguments.seeds,
        "windows": WINDOWS,
        "seq_len": SEQ_LEN,
        "versions": library_versions(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(stored, separators=(",", ":")) + "\n", encoding="utf-8")
    print(json.dumps(stored["thresholds"], indent=1))


if __name__ == "__main__":
    main()
