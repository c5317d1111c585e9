"""The terminal sessions of the documentation are what the command prints now."""

from __future__ import annotations

import subprocess
import sys

import pytest

from .pages import ROOT


@pytest.mark.slow
@pytest.mark.timeout(900)  # seven commands that measure or start
def test_the_recorded_sessions_say_what_the_command_says() -> None:
    command = [sys.executable, str(ROOT / "tools" / "sessions.py"), "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
