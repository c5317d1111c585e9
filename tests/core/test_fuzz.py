"""A short slice of `python -m benchmarks.fuzz`: whatever stands in a file, the error is one of ours."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COUNTS = {
    "paths": 40, "presets": 40, "documents": 40, "certificates": 10, "headers": 60, "configurations": 4, "reports": 6,
    "tokenizers": 6, "ggufs": 6, "variables": 4,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNTS)
def test_hostile_input_never_ends_in_an_error_that_is_not_ours(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    from benchmarks.fuzz import KINDS, fuzz

    assert set(COUNTS) == set(KINDS)
    outcome = fuzz(kind, COUNTS[kind], seed=2)
    assert outcome.untyped == []
    assert outcome.counts["refused"] > 0
