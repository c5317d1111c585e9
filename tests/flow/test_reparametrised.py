"""Weights may differ while the function is the same, on every architecture: folded gains, smoothing, rotations."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from certification import Certify

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
