"""Weights may differ while the function is the same, on every architecture: folded gains, smoothing, rotations."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from certification import Certify
from invarlock.certificate.verify import verify_certificate

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def measured(model_folder: Callable[[str], Path], demo_model: Path, certify_models: Certify) -> Callable[[str], Path]:
    """The stored measurement of a trained model against itself, made once."""
    made: dict[str, Path] = {}

    def measure(name: str) -> Path:
        if name not in made:
            folder = demo_model if name == "gpt2" else model_folder(name)
            report = certify_models(folder, folder).source_report
            assert report is not None
            made[name] = report
        return made[name]

    return measure


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "edit"),
    [
        ("llama", "rotate"),
        ("llama", "fold_gains"),
        ("qwen", "rotate"),
        ("qwen", "smooth"),
        ("gpt2", "fold_gains"),
        ("gpt2", "smooth"),
        ("neox", "fold_gains"),
        ("neox", "smooth"),
    ],
)
def test_what_changes_weights_and_nothing_else_passes_on_every_architecture(
    model: str,
    edit: str,
    measured: Callable[[str], Path],
    model_folder: Callable[[str], Path],
    demo_model: Path,
    certify_models: Certify,
    tmp_path: Path,
) -> None:
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.faults import reparametrise
    finally:
        sys.path.remove(str(ROOT))
    subject = tmp_path / "subject"
    shutil.copytree(demo_model if model == "gpt2" else model_folder(model), subject)
    assert getattr(reparametrise, edit)(subject, torch.Generator().manual_seed(1))
    outcome = certify_models(subject, baseline_report=measured(model))
    assert outcome.status == "PASS", outcome.certificate["verdict"]["reasons"]
    assert outcome.certificate["divergence"]["kl_mean"] < 1e-5
    assert outcome.certificate["weights"]["identical"] is False


@pytest.mark.slow
def test_a_layer_that_did_nothing_may_be_dropped_where_that_is_asked_for(
    model_folder: Callable[[str], Path], certify_models: Certify, tmp_path: Path
) -> None:
    """Behind the dropped layer every other is compared with the one that it was, and not with its number."""
    baseline, subject = tmp_path / "baseline", tmp_path / "subject"
    for folder in (baseline, subject):
        shutil.copytree(model_folder("llama"), folder)
        tensors = load_file(folder / "model.safetensors")
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.1.{part}.weight"] *= 1e-3
        if folder is subject:
            kept = {n: t for n, t in tensors.items() if ".layers.1." not in n}
            tensors = {re.sub(r"layers\.([23])\.", lambda m: f"layers.{int(m[1]) - 1}.", n): t for n, t in kept.items()}
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            config["num_hidden_layers"] -= 1
            config.pop("layer_types", None)
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    outcome = certify_models(subject, baseline, intent="restructure")
    found = outcome.certificate
    assert found["layers_paired"] == {"model.layers.1.": "model.layers.2.", "model.layers.2.": "model.layers.3."}
    assert outcome.status == "PASS", found["verdict"]["reasons"]
    assert verify_certificate(found).intact
    refused = certify_models(subject, baseline)
    assert refused.status == "FAIL" and "--intent restructure" in refused.certificate["primary_metric"]["reason"]
