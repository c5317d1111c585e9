"""The core without torch: an environment that holds our own distribution and what it requires, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata, resources
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from certification import CertifyOutcome
from invarlock.reporting.bundle import write_bundle

Bare = Callable[..., subprocess.CompletedProcess[str]]


def _required(name: str, seen: set[str]) -> set[str]:
    """Return the names of a distribution and of all that it requires without extras."""
    key = name.lower().replace("_", "-")
    if key in seen:
        return seen
    seen.add(key)
    for line in metadata.requires(name) or []:
        need = Requirement(line)
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            _required(need.name, seen)
    return seen


def _link(distribution: metadata.Distribution, site: Path) -> None:
    """Link the distribution's top-level files into `site`."""
    for file in distribution.files or []:
        first = file.parts[0]
        source = Path(str(distribution.locate_file(first)))
        if first not in ("..", "__pycache__") and source.exists() and not (site / first).exists():
            (site / first).symlink_to(source)


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Bare:
    root = tmp_path_factory.mktemp("bare")
    site = root / "site"
    site.mkdir()
    for name in _required("invarlock", set()) - {"invarlock"}:
        _link(metadata.distribution(name), site)
    own = Path(str(resources.files("invarlock")))
    (site / "invarlock").symlink_to(own)
    facts = site / "invarlock-1.0.0.dist-info"
    facts.mkdir()
    ours = metadata.distribution("invarlock")
    for name in ("METADATA", "entry_points.txt"):
        (facts / name).write_text(ours.read_text(name) or "", encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("INVARLOCK", "PYTHON"))}
    environment |= {"PYTHONPATH": str(site), "HOME": str(root)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-S", "-m", "invarlock", *arguments]  # -S: no site-packages
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=root)

    return run


@pytest.mark.slow
def test_the_environment_has_no_torch(bare: Bare) -> None:
    shown = bare("doctor", "--json")
    assert shown.returncode in (0, 1) and "torch" in shown.stdout, shown.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [("--help",), ("version",), ("plugins",), ("plugins", "list", "--json"), ("doctor",)], ids=" ".join
)
def test_what_needs_no_model_works(bare: Bare, arguments: tuple[str, ...]) -> None:
    done = bare(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and "Traceback" not in done.stderr


def test_certificates_are_verified_and_shown(bare: Bare, passed: CertifyOutcome, tmp_path: Path) -> None:
    write_bundle(passed.certificate, tmp_path)
    done = bare("verify", str(tmp_path))
    assert done.returncode == 0 and "INTACT" in done.stdout, done.stderr
    page = tmp_path / "page.html"
    done = bare("report", "html", str(tmp_path), "-o", str(page))
    assert done.returncode == 0 and page.read_text(encoding="utf-8").startswith("<!"), done.stderr
    assert bare("report", "explain", str(tmp_path)).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [("certify", "--baseline", "a", "--subject", "b"), ("demo",)], ids=lambda arguments: arguments[0]
)
def test_what_needs_a_model_names_the_extra_and_the_command(bare: Bare, arguments: tuple[str, ...]) -> None:
    done = bare(*arguments)
    assert done.returncode == 5
    assert done.stderr.startswith("DEPENDENCY-MISSING") and 'pip install "invarlock[' in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
