"""A fast slice of the fault matrix: harmless edits pass, damage fails, and the certificate names what was damaged.

The whole matrix runs by `python -m benchmarks.faults`. What behavioural damage deserves is measured here too, by the
matrix's oracle, on other text than the certificate's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).parents[2]
SAMPLE = {"sample": {"preview": 24, "final": 24, "min_tokens": 1000}}

HARMLESS = (
    "self@0.5#0",
    "re-saved@0.5#0",
    "bfloat16@0.5#0",
    "int8 a channel@0.5#0",
    "int8 a group@0.5#0",
    "tiny LoRA@0.5#0",
    "permuted neurons@0.5#0",
    "permuted heads@0#0",
    "factor moved@1#0",
)
DAMAGE = (
    "NaN@0.5#0",
    "zeroed MLP@0.5#0",
    "scaled up@1#0",
    "scaled down@0#0",
    "sign flipped@0#0",
    "rows shuffled@0#0",
    "2-bit a channel@0.5#0",
    "pruned 70 %@0.5#0",
    "layers swapped@0#0",
    "layer dropped@0.5#0",
    "head lost@0.5#0",
    "head re-initialised@0.5#0",
    "unseen tokens zeroed@0.5#0",
    "vocabulary shifted@0.5#0",
    "epsilon@0.5#0",
    "head count@0.5#0",
    "foreign tokenizer@0.5#0",
)

Run = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Run one case of the matrix on the demo model, by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT), *sys.path])
        from benchmarks.faults.edits import EDITS, cases
        from benchmarks.faults.run import Bench, summary

    folder = ROOT / "src/invarlock/data/demo_model"
    bench = Bench("gpt2", folder, tmp_path_factory.mktemp("faults"), overrides=SAMPLE, seq_len=64)
    known = {case.name: case for case in cases(EDITS)}

    def _run(name: str) -> dict[str, Any]:
        record = bench.run(known[name])
        assert record is not None
        return summary(record, known[name])

    yield _run
    bench.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_edit_passes_without_a_failed_gate(run: Run, name: str) -> None:
    row = run(name)
    assert (row["verdict"], row["failed"]) == ("PASS", []), row["reasons"]


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGE)
def test_damage_fails_and_is_named(run: Run, name: str) -> None:
    row = run(name)
    assert row["harmful"], "the oracle finds no harm: choose another case"
    assert row["verdict"] == "FAIL"
    assert row["named_rightly"], f"named {row['named']}, expected one of {row['expected']}: {row['reasons']}"
