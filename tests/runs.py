"""Runs of the demo model on a few windows, made once a session and shared by the tests of `run` and `report`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from invarlock.flow.run import RunOutcome, RunRequest
from invarlock.flow.run import run as run_pipeline
from invarlock.policy.config import load_config
from invarlock.policy.resolve import merge

Configure = Callable[..., Path]
Run = Callable[..., RunOutcome]


@pytest.fixture(scope="session")
def configure(tmp_path_factory: pytest.TempPathFactory, demo_model: Path, text_file: Path) -> Configure:
    """Write a configuration of a small run of the demo model; sections are laid over it. One guard: the cheapest."""

    def write(name: str = "small", **sections: Mapping[str, Any]) -> Path:
        base = {
            "model": {"id": str(demo_model), "device": "cpu"},
            "dataset": {"provider": "local_jsonl", "file": str(text_file), "seq_len": 32, "preview_n": 4, "final_n": 4},
            "guards": {"order": ["invariants"]},
            "eval": {"bootstrap": {"replicates": 50}},
        }
        path = tmp_path_factory.mktemp("config") / f"{name}.yaml"
        path.write_text(yaml.safe_dump(merge(base, sections)), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def run_small(tmp_path_factory: pytest.TempPathFactory, configure: Configure) -> Run:
    """Run a small configuration; keywords of `RunRequest` and sections of the configuration mix freely."""

    def execute(tick: Any = None, **options: Any) -> RunOutcome:
        keys = RunRequest.__dataclass_fields__.keys() & options.keys()
        request = {"out": tmp_path_factory.mktemp("runs"), **{key: options.pop(key) for key in keys}}
        return run_pipeline(RunRequest(settings=load_config(configure(**options)), **request), tick)

    return execute


@pytest.fixture(scope="session")
def noop_run(run_small: Run) -> RunOutcome:
    """The demo model measured as it is, by every guard of its tier: a baseline for other runs."""
    return run_small(name="baseline", guards={"order": None})


@pytest.fixture(scope="session")
def edited_run(run_small: Run) -> RunOutcome:
    """The demo model rounded to 8 bits, measured with its own baseline."""
    return run_small(edit={"name": "quant_rtn", "plan": {"bitwidth": 8}}, output={"save_model": True})
