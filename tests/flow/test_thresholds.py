"""Thresholds follow from what guards saw under harmless edits, and the packaged ones from the recorded runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import norm

from invarlock.core.exceptions import DataError
from invarlock.flow.calibration import rmt_thresholds, spectral_thresholds, ve_thresholds
from invarlock.policy.resolve import resolve_policy
from invarlock.stats.linalg import SIGMA_CONTRACT

TIERS = ("conservative", "balanced", "aggressive")
RECORDED = Path(__file__).parents[2] / "benchmarks/results/calibration.json"


def _rows(column: str, values: list[float]) -> list[dict[str, Any]]:
    return [{column: {"ffn": [value]}} for value in values]


def test_tau_is_the_robust_deviation_and_never_below_five_estimation_errors() -> None:
    wide = spectral_thresholds(_rows("spectral", [0.02, -0.02] * 6))
    assert wide["tau"]["ffn"] == pytest.approx(1.4826 * 0.02)
    narrow = spectral_thresholds(_rows("spectral", [1e-5, -1e-5] * 6))
    assert narrow["tau"]["ffn"] == 5 * SIGMA_CONTRACT["tol"]


def test_kappa_holds_the_family_wise_level_and_covers_what_was_seen() -> None:
    level = float(norm.isf(0.05 / (2 * 256)))
    assert spectral_thresholds(_rows("spectral", [1e-4] * 12))["kappa"]["ffn"] == pytest.approx(level)
    assert spectral_thresholds(_rows("spectral", [1e-4] * 12 + [0.1]))["kappa"]["ffn"] == pytest.approx(0.1 / 0.005)


def test_the_deadband_has_the_margin_of_the_widest_family() -> None:
    rows = [{"spectral": {"ffn": [0.001], "attn": [-0.03]}}] * 12
    assert spectral_thresholds(rows)["deadband"] == pytest.approx(math.expm1(0.12))


def test_epsilon_leaves_a_margin_over_what_was_seen() -> None:
    assert rmt_thresholds(_rows("rmt", [0.001] * 12))["epsilon"]["ffn"] == 0.05
    assert rmt_thresholds(_rows("rmt", [0.03] * 12))["epsilon"]["ffn"] == pytest.approx(math.expm1(0.12))


def test_a_handful_of_runs_is_too_few() -> None:
    with pytest.raises(DataError, match="expected at least 10"):
        rmt_thresholds(_rows("rmt", [0.001] * 3))


def test_a_trial_that_proposed_nothing_gains_nothing() -> None:
    assert ve_thresholds([{"estimate": None}])["min_effect_lognll"] == 0.0
    assert ve_thresholds([{"estimate": -0.01}, {"estimate": 0.5}], level=1.0)["min_effect_lognll"] == 0.01


def test_the_packaged_thresholds_are_the_recorded_ones_rounded_up() -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    null = [row for runs in recorded["models"].values() for row in runs["null"]]
    spectral, rmt = spectral_thresholds(null), rmt_thresholds(null)
    guards = resolve_policy("balanced").values["guards"]
    for key, found in (("tau", spectral["tau"]), ("kappa", spectral["kappa"])):
        for family, value in found.items():
            assert value <= guards["spectral"][key][family] <= 1.05 * value
    assert all(resolve_policy(tier).values["guards"]["spectral"]["deadband"] >= spectral["deadband"] for tier in TIERS)
    for family, value in rmt["epsilon"].items():
        assert value <= guards["rmt"]["epsilon"][family] <= 1.05 * value
