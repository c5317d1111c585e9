"""The policy decides what the guards look at, not only what they make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from invarlock.flow.certify import CertifyRequest, certify

SAMPLE = {"preview": 6, "final": 6, "min_tokens": 1}


def _facts(demo_model: Path, tmp_path: Path, guards: dict[str, Any]) -> dict[str, Any]:
    request = CertifyRequest(
        baseline=str(demo_model),
        subject=str(demo_model),
        device="cpu",
        profile="dev",
        dataset={"provider": "python_docs", "seq_len": 32},
        overrides={"sample": SAMPLE, "guards": guards},
        out=tmp_path,
    )
    return certify(request).certificate


@pytest.mark.slow
def test_as_many_windows_are_sampled_as_the_policy_says(demo_model: Path, tmp_path: Path) -> None:
    few = _facts(demo_model, tmp_path, {"rmt": {"activation": {"sampling": {"windows": {"count": 2}}}}})
    more = _facts(demo_model, tmp_path, {"rmt": {"activation": {"sampling": {"windows": {"count": 4}}}}})
    seen = [sum(m["tokens"][0] for m in c["rmt"]["facts"]["modules"]) for c in (few, more)]
    assert 0 < seen[0] < seen[1]
    contracts = [c["provenance"]["contracts"]["baseline"]["rmt"] for c in (few, more)]
    assert contracts[0] != contracts[1]


@pytest.mark.slow
def test_variance_watches_the_tap_of_the_policy(demo_model: Path, tmp_path: Path) -> None:
    taps = {
        tap: [
            row["name"] for row in _facts(demo_model, tmp_path, {"variance": {"tap": tap}})["variance"]["facts"]["taps"]
        ]
        for tap in ("ffn", "attn")
    }
    assert all(".mlp." in name for name in taps["ffn"])
    assert taps["attn"] and all(".attn." in name for name in taps["attn"])


def test_a_constructor_argument_stands_above_the_policy() -> None:
    from invarlock.guards import VarianceGuard

    guard = VarianceGuard(tap="attn")
    guard.configure({"tap": "ffn", "deadband": 0.5})
    assert (guard.policy["tap"], guard.policy["deadband"]) == ("attn", 0.5)
