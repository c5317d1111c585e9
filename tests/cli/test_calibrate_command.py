"""`invarlock calibrate`: rows that can be traced, and thresholds that a configuration takes as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from invarlock.policy.config import load_config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sweep", "arguments", "guards"),
    [("null-sweep", ["--seeds", "2"], {"spectral", "rmt"}), ("ve-sweep", [], {"variance"})],
)
def test_a_sweep_prints_thresholds_that_a_configuration_takes(
    cli: Any, configure: Callable[..., Path], tmp_path: Path, sweep: str, arguments: list[str], guards: set[str]
) -> None:
    result = cli("calibrate", sweep, "-c", str(configure()), "--out", str(tmp_path), *arguments)
    assert result.exit_code == 0, result.stderr
    printed = yaml.safe_load(result.stdout)
    stored = json.loads((tmp_path / f"{sweep.replace('-', '_')}.json").read_text())
    assert printed == {"guards": stored["guards"]} and set(printed["guards"]) == guards
    assert stored["data"]["digest"] and stored["model"]["weights"]
    assert {(row["edit"], row["seed"]) for row in stored["rows"]} and len(stored["rows"]) >= 8
    config = load_config(configure(**printed))
    assert {name: config.guards.by_name[name] for name in guards} == printed["guards"]


@pytest.mark.slow
def test_too_few_runs_give_no_thresholds(cli: Any, configure: Callable[..., Path], tmp_path: Path) -> None:
    result = cli("calibrate", "null-sweep", "-c", str(configure()), "--out", str(tmp_path), "--seeds", "1")
    assert result.exit_code == 5
    assert "expected at least 10: use more seeds or models" in result.stderr
    assert list(tmp_path.iterdir()) == []
