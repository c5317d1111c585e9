"""What the guards say of edits whose effect is known, on models that have learned something."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from guards import faults  # noqa: E402 - torch is needed first
from guards.models import trained  # noqa: E402
from invarlock.eval.data import get_provider  # noqa: E402
from invarlock.guards.rmt import RMTGuard  # noqa: E402
from invarlock.guards.sketch import compare_all, culprits, sketch_model  # noqa: E402
from invarlock.guards.spectral import SpectralGuard  # noqa: E402

NAMES = ("gpt2", "llama", "bert", "t5", "neox", "qwen")


@functools.cache
def baseline(name: str) -> dict[str, Any]:
    model, tokenizer = trained(name)
    preview, _ = get_provider("python_docs").windows(tokenizer, preview_n=8, final_n=8, seq_len=64, stride=64)
    batches = [{"input_ids": ids} for ids in preview.input_ids]
    return {
        "model": model,
        "batches": batches,
        "spectral": SpectralGuard().measure(model, None),
        "rmt": RMTGuard().look(model, None, batches),
        "sketches": sketch_model(model),
    }


def judged(name: str, edit: Any) -> tuple[dict[str, Any], dict[str, Any], Any]:
    before = baseline(name)
    model = copy.deepcopy(before["model"])
    with torch.no_grad():
        edit(model)
    spectral, rmt = SpectralGuard(), RMTGuard()
    return (
        spectral.judge(spectral.pair(before["spectral"], spectral.measure(model, None)), spectral.policy),
        rmt.judge(rmt.pair(before["rmt"], rmt.look(model, None, before["batches"])), rmt.policy),
        culprits(compare_all(before["sketches"], sketch_model(model))),
    )


HARMLESS = {
    "nothing": lambda model: None,
    "8 bits": lambda model: faults.round_to(model, 8),
    "bfloat16": lambda model: model.bfloat16().float(),
    "a tenth pruned": faults.prune,
}


#: matrices of a few large and many small values (the BERT begins with heads that look at neighbours), which 8 bits a row
#: round more coarsely than the others: that their change stands out is true, and harms nobody
COARSE = {("bert", "8 bits"): {f"bert.encoder.layer.0.attention.self.{part}.weight" for part in ("query", "key")}}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("edit", HARMLESS)
def test_harmless_edits_leave_no_finding(name: str, edit: str) -> None:
    spectral, rmt, found = judged(name, HARMLESS[edit])
    for result in (spectral, rmt):
        assert result["passed"] and result["evaluated"], result["message"]
        assert (result["warnings"], result["errors"]) == ([], [])
    named = {row["name"] for row in found.named}
    assert named == COARSE.get((name, edit), set())
    assert found.uniform is (edit != "nothing" and not named)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_rounding_to_two_bits_is_seen_and_called_uniform(name: str) -> None:
    spectral, rmt, found = judged(name, lambda model: faults.round_to(model, 2))
    assert not (spectral["passed"] and rmt["passed"])
    assert found.uniform


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", faults.FAULTS)
def test_faults_are_named(name: str, fault: str) -> None:
    expected: set[str] = set()
    _, _, found = judged(name, lambda model: expected.update(faults.FAULTS[fault](model)))
    assert {row["name"] for row in found.named} == expected
