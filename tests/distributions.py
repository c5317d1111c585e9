"""Distributions for tests: the example plugin, installed for real, and others made on the spot."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from invarlock.core import registry

EXAMPLE = Path(__file__).parents[1] / "examples" / "my_invarlock_plugin"

Run = Callable[..., subprocess.CompletedProcess[str]]
Site = Callable[..., Path]


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build and install a copy of the example into a folder of its own, without the network; return that folder."""
    work = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, work / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--target", str(work / "site"), str(work / "source")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return work / "site"


@pytest.fixture
def run() -> Run:
    """Run the command line in a process of its own, with more folders to import from."""

    def _run(*arguments: str, site: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        path = {"PYTHONPATH": os.pathsep.join(filter(None, (str(site or ""), os.environ.get("PYTHONPATH"))))}
        command = [sys.executable, "-m", "invarlock", *arguments]
        return subprocess.run(
            command, env={**os.environ, **path, **environment}, capture_output=True, text=True, check=False
        )

    return _run


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Put a distribution into a folder, as pip would: metadata, and modules by name with their source."""

    def _site(name: str, entry_points: str, **modules: str) -> Path:
        folder = tmp_path / f"{name}-3.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 3.0\n")
        (folder / "entry_points.txt").write_text(entry_points)
        for module, source in modules.items():
            (tmp_path / f"{module}.py").write_text(source)
        return tmp_path

    return _site


@pytest.fixture
def distribute(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Like `site`, for this process."""
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._installed.cache_clear()
    before = set(sys.modules)
    yield site
    registry._installed.cache_clear()
    for module in set(sys.modules) - before:
        if str(getattr(sys.modules[module], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[module]


@pytest.fixture
def items() -> Callable[[str], dict[str, dict[str, Any]]]:
    """Read a `plugins-v1` envelope, which must be one line, into its items by name."""

    def _items(stdout: str) -> dict[str, dict[str, Any]]:
        assert stdout.count("\n") == 1
        envelope = json.loads(stdout)
        assert (envelope["format_version"], envelope["component"]) == ("plugins-v1", "plugins")
        return {item["name"]: item for item in envelope["items"]}

    return _items
