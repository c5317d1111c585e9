"""The plugin guide, followed to the letter: its files are those of the example, its commands run, its lines are printed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Callable

import pytest

from .pages import DOCS, ROOT, Block, blocks

EXAMPLE = ROOT / "examples" / "my_invarlock_plugin"
GUIDE = blocks(DOCS / "user-guide" / "plugins.md")
FILES = {
    block.code.splitlines()[0].removeprefix("# "): block
    for block in GUIDE
    if block.language == "python" and block.code.startswith(("# src/", "# tests/"))
}
CONFIG = """
model: {id: gpt2, device: cpu}
dataset: {provider: python_docs, seq_len: 48}
edit: {name: noop}
guards:
  order: ["invariants", "nan_check"]
  nan_check: {strict: true}
"""
#: no network in the tests: the build tools are those that are installed
INSTALL = "--no-build-isolation --no-deps --no-index --quiet"

Shell = Callable[[str], subprocess.CompletedProcess[str]]


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def test_the_guide_prints_these_files() -> None:
    assert set(FILES) == {
        "src/my_plugin/my_guard.py",
        "src/my_plugin/threshold_guard.py",
        "src/my_plugin/custom_adapter.py",
        "tests/test_threshold_guard.py",
    }


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_example_is_what_the_guide_prints(name: str) -> None:
    printed, file = lines(FILES[name].code), lines((EXAMPLE / name).read_text(encoding="utf-8"))
    assert file in (printed, printed[1:])


def test_the_entry_points_of_the_guide_are_those_of_the_example() -> None:
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for block in (block for block in GUIDE if block.language == "toml"):
        printed = tomllib.loads(block.code)["project"]
        for group, names in printed.pop("entry-points").items():
            assert names.items() <= project["entry-points"][group].items()
        assert printed.items() <= project.items()


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A shell in a fresh environment beside a copy of the example; `gpt2` is a folder there, holding the demo model."""
    home = tmp_path_factory.mktemp("guide")
    shutil.copytree(
        EXAMPLE, home / "my_invarlock_plugin", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    )
    (home / "tests").symlink_to(home / "my_invarlock_plugin" / "tests")
    (home / "gpt2").symlink_to(ROOT / "src" / "invarlock" / "data" / "demo_model")
    (home / "config.yaml").write_text(CONFIG)
    venv.create(home / "env", with_pip=False, symlinks=True)
    scripts = home / "env" / "bin"
    site = next((home / "env" / "lib").glob("python*/site-packages"))
    (site / "parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    python = scripts / "python"
    commands = {
        "pip": f'what=$1; shift; exec "{sys.executable}" -m pip --python "{python}" "$what" {INSTALL} "$@"',
        "pytest": f'exec "{python}" -m pytest -p no:cacheprovider "$@"',
        "invarlock": f'exec "{python}" -m invarlock "$@"',
    }
    for name, command in commands.items():
        (scripts / name).write_text(f"#!/usr/bin/env bash\n{command}\n")
        (scripts / name).chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("INVARLOCK")}
    environment["PATH"] = f"{scripts}{os.pathsep}{environment['PATH']}"

    def run(code: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-euo", "pipefail", "-c", code]
        return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=280)

    return run


def test_the_commands_of_the_guide_run_in_order(shell: Shell) -> None:
    printed: dict[int, str] = {}
    for block in (block for block in GUIDE if block.language == "bash"):
        done = shell(block.code)
        assert done.returncode == 0, f"{block.where}\n{done.stdout}\n{done.stderr}"
        printed[block.line] = done.stdout
    promised = [
        (block, line.removeprefix("# Should show: "))
        for block in GUIDE
        for line in block.code.splitlines()
        if line.startswith("# Should show: ")
    ]
    assert promised
    for block, line in promised:
        assert line in printed[block.line].splitlines()


def test_the_integration_test_of_the_guide_runs_as_printed(shell: Shell) -> None:
    block: Block = next(block for block in GUIDE if block.code.startswith("# test_integration.py"))
    assert shell("pip install -e ./my_invarlock_plugin").returncode == 0
    done = shell(f"cat > test_integration.py <<'EOF'\n{block.code}EOF\npython test_integration.py")
    assert done.returncode == 0, done.stderr
    assert "Prepare: {'ready': True" in done.stdout and "'passed': True" in done.stdout
