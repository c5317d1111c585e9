"""Two ways to call the command line: in this process (fast, state put back), and as the installed script."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from invarlock.cli.app import app
from invarlock.core import network

Cli = Callable[..., Result]
Script = Callable[..., subprocess.CompletedProcess[str]]

_HF_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """Run the command line within this process; the network and the log are as they were afterwards."""
    for switch in _HF_SWITCHES:
        monkeypatch.setenv(switch, os.environ.get(switch, "1"))
    monkeypatch.setattr(network, "_closed", network._closed)
    monkeypatch.setenv(network._INHERITED, str(os.getpid()))
    logger = logging.getLogger("invarlock")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield lambda *arguments: CliRunner().invoke(app, list(arguments))
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def script() -> Script:
    """Run the installed `invarlock` with extra environment variables."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "invarlock"), *arguments]
        return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)

    return run
