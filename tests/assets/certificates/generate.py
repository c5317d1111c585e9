"""Make certificates of the kinds that are frozen in this folder, with the release of invarlock that is installed.

    python tests/assets/certificates/generate.py --out FOLDER [NAME ...]

Only the public command line and the public Python API are used, so that later releases can run it too. Commands run in
a folder of their own where models are called `baseline` and `subject`: no path of the machine gets into a certificate.
A case whose verdict is not the expected one stops everything.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

MODELS = Path(__file__).parents[1] / "models"
EXIT_CODES = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 4}
PYTHON_DOCS: Mapping[str, Any] = {"dataset": {"provider": "python_docs", "seq_len": 128}}
LONGER: Mapping[str, Any] = {"dataset": {"provider": "python_docs", "seq_len": 160}}
ACCURACY: Mapping[str, Any] = {**LONGER, "eval": {"metric": {"kind": "accuracy"}}}
PAIRS: Mapping[str, Any] = {"dataset": {"provider": {"kind": "seq2seq", "task": "reverse"}, "seq_len": 64}}
DEV = ("--profile", "dev")
CI_CPU = ("--profile", "ci_cpu")

Tensors = dict[str, NDArray[Any]]
Change = Callable[[Tensors], None]


def round_rows(bits: int) -> Change:
    """Round every matrix but the table of positions to 2^bits - 1 levels a row."""

    def change(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if tensor.ndim == 2 and "wpe" not in name:
                wide = tensor.astype(np.float32)
                scale = np.maximum(np.abs(wide).max(axis=1, keepdims=True), 1e-8) / (2 ** (bits - 1) - 1)
                tensors[name] = (np.round(wide / scale) * scale).astype(tensor.dtype)

    return change


def spoil(tensors: Tensors) -> None:
    """Put one NaN into one matrix."""
    tensors["transformer.h.2.mlp.c_fc.weight"][5, 7] = np.nan


def shuffle_rows(tensors: Tensors) -> None:
    """Shuffle the rows of one matrix of a GPT-NeoX model."""
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    tensors[name] = np.random.default_rng(11).permutation(tensors[name])


def zero(tensors: Tensors) -> None:
    """Zero one matrix of a GPT-NeoX model."""
    tensors["gpt_neox.layers.2.mlp.dense_4h_to_h.weight"][:] = 0


def pad_vocabulary(tensors: Tensors) -> None:
    """Add 64 rows that no token uses to the embedding of a Llama."""
    name = "model.embed_tokens.weight"
    rows = tensors[name]
    tensors[name] = np.concatenate([rows, np.repeat(rows.mean(0, keepdims=True), 64, axis=0).astype(rows.dtype)])


def pack_attention(tensors: Tensors) -> None:
    """Store the projections of attention as bitsandbytes does: 8 bits, with the largest magnitude of each row."""
    for name in [name for name in tensors if "self_attn" in name]:
        wide = tensors.pop(name).astype(np.float32)
        largest = np.abs(wide).max(axis=1)
        tensors[name] = np.round(wide / largest[:, None] * 127).astype(np.int8)
        tensors[f"{name.removesuffix('weight')}SCB"] = largest


def rtn(bits: int, **plan: Any) -> dict[str, Any]:
    """Return the edit that rounds linear layers to `bits` bits, as --edit-config takes it."""
    return {"name": "quant_rtn", "plan": {"bitwidth": bits, **plan}}


@dataclass(frozen=True)
class Case:
    """One `invarlock certify`. The subject is the baseline, after `change` of its file or with `edit` in memory.

    `reuse` names an earlier case whose measured baseline takes the place of the baseline model, as `pack` has one
    made of the baseline and certified against; `config` is what changes in the subject's config.json.
    """

    verdict: str
    model: str = "gpt2"
    change: Change | None = None
    edit: Mapping[str, Any] | None = None
    preset: Mapping[str, Any] = field(default_factory=lambda: PYTHON_DOCS)
    flags: tuple[str, ...] = DEV
    reuse: str | None = None
    pack: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)


CASES: Mapping[str, Case] = {
    "pass_8bit": Case("PASS", edit=rtn(8), preset=LONGER, flags=(*CI_CPU, "--edit-label", "8-bit")),
    "fail_2bit": Case("FAIL", edit=rtn(2), reuse="pass_8bit", preset={}, flags=CI_CPU),
    "fail_shuffled": Case("FAIL", "neox", change=shuffle_rows),
    "fail_zeroed": Case("FAIL", "neox", change=zero),
    "inconclusive": Case("INCONCLUSIVE", edit=rtn(2, max_modules=1)),
    "inconclusive_ratio": Case(
        "INCONCLUSIVE", edit=rtn(3, per_channel=False), flags=(*DEV, "--intent", "finetune")
    ),
    "refused_nan": Case("FAIL", change=spoil),
    "self": Case("PASS"),
    "accuracy_pass": Case("PASS", change=round_rows(8), preset=ACCURACY, flags=CI_CPU),
    "accuracy_inconclusive": Case("INCONCLUSIVE", change=round_rows(3), preset=ACCURACY, flags=CI_CPU),
    "accuracy_fail": Case("FAIL", edit=rtn(2), preset=ACCURACY, flags=CI_CPU),
    "plugin_guard": Case("PASS", change=round_rows(8), preset={
        **PYTHON_DOCS,
        "guards": {"order": ["invariants", "spectral", "hello_guard"], "hello_guard": {"message": "good day"}},
    }),
    "t5_8bit": Case("PASS", "t5", edit=rtn(8), preset=PAIRS),
    "bert_8bit": Case("PASS", "bert", change=round_rows(8)),
    "llama_8bit": Case("PASS", "llama", change=round_rows(8)),
    "finetune": Case("PASS", edit=rtn(2, max_modules=2), flags=(*DEV, "--intent", "finetune")),
    "conservative": Case("PASS", "qwen", change=round_rows(8), flags=(*DEV, "--tier", "conservative")),
    "aggressive": Case("PASS", "llama", edit=rtn(4), flags=(*DEV, "--tier", "aggressive")),
    "overrides": Case("PASS", edit=rtn(6, group_size=32, scope="ffn"), preset={
        **PYTHON_DOCS,
        "metrics": {"pm_ratio": {"limit": 1.3}, "guard_overhead": {"required": True, "max_ratio": 5.0}},
        "guards": {"order": ["invariants", "spectral", "rmt"], "spectral": {"deadband": 0.2, "max_caps": 7}},
        "eval": {"bootstrap": {"replicates": 400, "seed": 7}},
    }),
    "second_pass": Case("PASS", change=round_rows(8)),
    "second_fail": Case("FAIL", edit=rtn(2)),
    "second_inconclusive": Case("INCONCLUSIVE", edit=rtn(2, max_modules=1)),
    "second_refused": Case("FAIL", change=spoil),
    "second_accuracy": Case("INCONCLUSIVE", change=round_rows(8), preset=ACCURACY, flags=CI_CPU),
    "second_plugin_guard": Case("PASS", "neox", change=round_rows(8), preset={
        **PYTHON_DOCS, "guards": {"order": ["invariants", "rmt", "hello_guard"], "hello_guard": {"message": "good day"}},
    }),
    "second_restructure": Case(
        "PASS", "llama", change=pad_vocabulary, config={"vocab_size": 4160}, flags=(*DEV, "--intent", "restructure"),
    ),
    "second_packed": Case("PASS", "llama", change=pack_attention, config={
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    }),
    "third_pass": Case("PASS", change=round_rows(8)),
    "third_fail": Case("FAIL", edit=rtn(2)),
    "third_inconclusive": Case("INCONCLUSIVE", edit=rtn(2, max_modules=1)),
    "third_refused": Case("FAIL", change=spoil),
    "third_accuracy": Case("INCONCLUSIVE", change=round_rows(3), preset=ACCURACY, flags=CI_CPU),
    "third_plugin_guard": Case("PASS", "neox", change=round_rows(8), preset={
        **PYTHON_DOCS, "guards": {"order": ["invariants", "rmt", "hello_guard"], "hello_guard": {"message": "good day"}},
    }),
    "third_slices": Case("FAIL", "llama", edit=rtn(3), preset={"dataset": {"seq_len": 128, "slices": {
        "docs": {"provider": "python_docs"}, "code": {"provider": "python_code"},
    }}}, flags=CI_CPU),
    "third_packs": Case("PASS", "llama", change=round_rows(8), pack=True),
    "third_whole": Case("PASS", "bert", change=round_rows(8), flags=(*DEV, "--no-early-stop")),
    "third_looks": Case("PASS", "neox", change=round_rows(8), preset=LONGER, flags=CI_CPU),
    "third_pairs": Case("PASS", "t5", edit=rtn(8), preset=PAIRS),
    "third_restructure": Case(
        "PASS", "llama", change=pad_vocabulary, config={"vocab_size": 4160}, flags=(*DEV, "--intent", "restructure"),
    ),
    "third_packed": Case("PASS", "llama", change=pack_attention, config={
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    }),
    "fourth_fail": Case("FAIL", edit=rtn(2), preset=LONGER, flags=CI_CPU),
    "fourth_looks": Case("PASS", "neox", change=round_rows(8), preset=LONGER, flags=CI_CPU),
    "fourth_packs": Case("PASS", "llama", change=round_rows(8), pack=True),
    "fourth_slices": Case("FAIL", "llama", edit=rtn(3), preset={"dataset": {"seq_len": 128, "slices": {
        "docs": {"provider": "python_docs"}, "code": {"provider": "python_code"},
    }}}, flags=CI_CPU),
    "fourth_whole": Case("PASS", "bert", change=round_rows(8), flags=(*DEV, "--no-early-stop")),
}  # fmt: skip


def model_folder(name: str) -> Path:
    """Return the folder of a small trained model: the packaged one for gpt2, else one of tests/assets/models."""
    if name == "gpt2":
        return Path(str(resources.files("invarlock.data").joinpath("demo_model")))
    return MODELS / name


def _invarlock(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("INVARLOCK_")}
    return subprocess.run(
        [sys.executable, "-m", "invarlock", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def certify(name: str, work: Path) -> Path:
    """Run the case's command below `work` and return the certificate's file."""
    case, folder = CASES[name], work / name
    if case.reuse and not (work / case.reuse).exists():
        certify(case.reuse, work)
    baseline, subject = folder / "baseline", folder / "subject"
    for copy in (baseline, subject):
        shutil.copytree(model_folder(case.model), copy)
    if case.change is not None:
        tensors = load_file(subject / "model.safetensors")
        case.change(tensors)
        save_file(tensors, subject / "model.safetensors", metadata={"format": "pt"})
    if case.config:
        config = json.loads((subject / "config.json").read_text(encoding="utf-8"))
        (subject / "config.json").write_text(json.dumps({**config, **case.config}), encoding="utf-8")
    preset = []
    if case.preset:
        (folder / "preset.yaml").write_text(yaml.safe_dump(dict(case.preset)), encoding="utf-8")
        preset = ["--preset", "preset.yaml"]
    if case.pack:
        _invarlock(folder, "baseline", "make", "baseline", "-o", "baseline.pack", *case.flags, *preset)
    command = ["certify", "--subject", "subject", "--cert-out", "cert", "--out", "runs", "--device", "cpu", *case.flags]
    command += preset
    if case.reuse:
        command += ["--baseline-report", f"../{case.reuse}/runs/source"]
    else:
        command += ["--baseline", "baseline.pack" if case.pack else "baseline"]
    if case.edit is not None:
        (folder / "edit.yaml").write_text(yaml.safe_dump(dict(case.edit)), encoding="utf-8")
        command += ["--edit-config", "edit.yaml"]
    outcome = _invarlock(folder, *command)
    if outcome.returncode != EXIT_CODES[case.verdict]:
        raise SystemExit(
            f"{name}: exit {outcome.returncode}, expected {case.verdict}\n{outcome.stdout}{outcome.stderr}"
        )
    return folder / "cert" / "evaluation.cert.json"


def certify_in_python() -> dict[str, Any]:
    """Run the two runs of the README's example and return their certificate."""
    from invarlock.adapters import HF_Causal_Auto_Adapter
    from invarlock.assurance import make_certificate
    from invarlock.core.api import RunConfig
    from invarlock.core.runner import CoreRunner
    from invarlock.edits import NoopEdit, RTNQuantEdit
    from invarlock.eval.data import get_provider
    from invarlock.guards import InvariantsGuard, SpectralGuard

    source = str(model_folder("gpt2"))
    adapter = HF_Causal_Auto_Adapter()
    model = adapter.load_model(source, device="cpu")
    provider = get_provider("python_docs")
    preview, final = provider.windows(adapter.tokenizer(source), preview_n=32, final_n=32, seq_len=48)
    text = [{"input_ids": ids} for ids in preview.input_ids + final.input_ids]

    def run(edit: Any) -> Any:
        config = RunConfig(device="cpu", context={"profile": "dev"})
        guards = [InvariantsGuard(), SpectralGuard()]
        return CoreRunner().execute(model, adapter, edit, guards, config, calibration_data=text)

    baseline = run(NoopEdit())
    return make_certificate(run(RTNQuantEdit(bitwidth=8)), baseline)


def main() -> None:
    """Make the certificates that are asked for, or all, and the baseline report of pass_8bit."""
    parser = argparse.ArgumentParser(description="Make certificates of the kinds that are frozen beside this file.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"python, {', '.join(CASES)}; default: all")
    parser.add_argument("--out", type=Path, required=True, help="Where to write; files of the same name are replaced.")
    given = parser.parse_args()
    names = given.names or [*CASES, "python"]
    unknown = sorted(set(names) - {*CASES, "python"})
    if unknown:
        parser.error(f"unknown certificate {unknown[0]!r}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the commands
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for name in names:
            target = given.out / f"{name}.json"
            if name == "python":
                text = json.dumps(certify_in_python(), allow_nan=False, ensure_ascii=False, indent=1) + "\n"
                target.write_text(text, encoding="utf-8")
            else:
                shutil.copyfile(certify(name, work), target)
            if name == "pass_8bit":
                report = next((work / name / "runs" / "source").glob("*/report.json"))
                shutil.copyfile(report, given.out / f"{name}.baseline.report.json")
            status = json.loads(target.read_text(encoding="utf-8"))["verdict"]["status"]
            sys.stdout.write(f"{target.name:24} {status:12} {target.stat().st_size:8,} bytes\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
