"""Weights that accelerate leaves on disk or on the CPU are measured as those in memory are, guards included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from certification import Certify, gates
from invarlock.checkpoints.side import Loading

pytestmark = pytest.mark.slow

DISK = Loading(options={"device_map": "disk"})
ON_DISK = ("model.layers.1", "model.layers.2")
OTHERS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.3", "model.norm", "lm_head")
SPREAD = Loading(options={"device_map": {**dict.fromkeys(OTHERS, "cpu"), **dict.fromkeys(ON_DISK, "disk")}})


def _figures(certificate: dict[str, Any]) -> dict[str, Any]:
    """What was measured; a stored baseline has no whole distributions."""
    rows = {split: {**part, "kl_exact_sum": None} for split, part in certificate["evaluation_windows"].items()}
    return {"rows": rows, **{name: certificate[name] for name in ("spectral", "rmt", "variance", "weights")}}


def test_an_offloaded_model_gives_the_figures_of_one_in_memory(
    certify_models: Certify, llama_model: Path, copy_model: Callable[..., Path]
) -> None:
    def shrink(model: Any) -> None:
        model.model.layers[1].mlp.down_proj.weight.mul_(0.3)

    subject = copy_model(llama_model, shrink)
    here = certify_models(subject, llama_model)
    disk = certify_models(subject, llama_model, loading=DISK)
    assert _figures(disk.certificate) == _figures(here.certificate)
    assert gates(disk.certificate)["spectral"] == "fail"
    assert disk.certificate["weights"]["culprits"] == ["model.layers.1.mlp.down_proj.weight"]
    spread = certify_models(subject, baseline_report=here.source_report, loading=SPREAD)
    assert _figures(spread.certificate) == _figures(here.certificate)


def test_an_offloaded_model_passes_against_itself(certify_models: Certify, llama_model: Path) -> None:
    outcome = certify_models(llama_model, llama_model, loading=DISK)
    assert outcome.status == "PASS" and outcome.certificate["primary_metric"]["ratio_vs_baseline"] == 1
    assert not outcome.certificate["spectral"]["warnings"] and outcome.certificate["spectral"]["metrics"]["modules"]
