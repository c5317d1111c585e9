"""The pages for contributors are true of the source: their steps work on a copy of it, their files and rooms exist."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from invarlock.certificate.third import GATE_NAMES
from test_house import ROOMS

from .pages import DOCS, ROOT, Block, blocks

PAGES = DOCS / "developers"
BESIDE = ("pyproject.toml", "README.md", "LICENSE")
Run = Callable[..., subprocess.CompletedProcess[str]]


def test_the_table_of_rooms_is_the_order_that_holds() -> None:
    page = (PAGES / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("| Room |")[2].partition("\n\n")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == ROOMS


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", *sorted(PAGES.glob("*.md"))], ids=lambda page: page.stem)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    made = {block.file for block in blocks(page) if block.language == "python"}
    for name in re.findall(r"`((?:\w+/)+(?:\w+\.(?:py|yaml|md|json))?)`", text):
        places = [ROOT / name, ROOT / "src" / "invarlock" / name]
        assert any(place.exists() for place in places) or "my_" in name or made & {name, f"src/invarlock/{name}"}, name


def test_the_tables_of_the_architecture_are_where_it_says() -> None:
    page = (PAGES / "architecture.md").read_text(encoding="utf-8")
    found = re.findall(r"\| `([A-Z_]+)`, `([\w/]+\.py)` \|", page)
    assert len(found) >= 8
    for name, file in found:
        assert re.search(
            rf"^{name}\b", (ROOT / "src" / "invarlock" / file).read_text(encoding="utf-8"), re.MULTILINE
        ), name


def changed(text: str, diff: str, where: str) -> str:
    """Apply a diff without line numbers: each hunk (split by `@@`) names lines that stand in the file exactly once, or, after
    `@@ everywhere`, at least once."""
    hunks: list[tuple[bool, list[str]]] = [(False, [])]
    for line in diff.splitlines():
        if line.startswith("@@"):
            hunks.append(("everywhere" in line, []))
        else:
            hunks[-1][1].append(line)
    for everywhere, lines in hunks:
        old, new = ("".join(f"{line[1:]}\n" for line in lines if line[:1] in kept) for kept in (" -", " +"))
        count = text.count(old)
        assert count == 1 or (everywhere and count), f"{where}: these lines stand in the file {count} times:\n{old}"
        text = text.replace(old, new)
    return text


def follow(page: Path, home: Path, run: Run) -> set[str]:
    """Take the steps of a page in a copy of the source; return the files of the source that they touched."""
    shutil.copytree(
        ROOT / "src" / "invarlock", home / "src" / "invarlock", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in BESIDE:
        shutil.copy(ROOT / name, home / name)
    touched = set()
    for block in blocks(page):
        if block.file is not None:
            write(block, home / block.file)
            touched.add(block.file)
        elif block.remark is None:
            command = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
            done = run(*command, block.code)
            assert done.returncode == 0, f"{block.where}\n{done.stdout}\n{done.stderr}"
    return {name for name in touched if name.startswith("src/")}


def write(block: Block, path: Path) -> None:
    if block.language == "diff":
        path.write_text(changed(path.read_text(encoding="utf-8"), block.code, block.where), encoding="utf-8")
    else:
        assert not path.exists(), f"{block.where}: {path.name} is there already"
        path.write_text(block.code, encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a command with the copy of the source in the place of the source."""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}

    def _run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return _run


def test_adding_a_provider_takes_one_file(tmp_path: Path, run: Run) -> None:
    assert len(follow(PAGES / "add-a-provider.md", tmp_path, run)) == 1
    done = run(sys.executable, "-c", "from setuptools import setup; setup()", "-q", "egg_info")
    assert done.returncode == 0, done.stderr
    done = run(sys.executable, "-m", "invarlock", "plugins", "list", "datasets")
    assert "text_folder | Core | Provider | — | — | ✅ Ready" in done.stdout.splitlines()


def test_adding_a_format_takes_one_file_and_a_row(tmp_path: Path, run: Run) -> None:
    touched = follow(PAGES / "add-a-format.md", tmp_path, run)
    assert touched == {"src/invarlock/checkpoints/npz.py", "src/invarlock/checkpoints/files.py"}


def test_adding_a_gate_on_a_new_figure_takes_four_files(tmp_path: Path, run: Run, demo_model: Path) -> None:
    assert "entropy" not in GATE_NAMES
    assert len(follow(PAGES / "add-a-gate.md", tmp_path, run)) == 4
    (tmp_path / "preset.yaml").write_text("dataset: {provider: synthetic, seq_len: 32}\n")
    (tmp_path / "edit.yaml").write_text("edit: {name: quant_rtn, plan: {bitwidth: 2}}\n")
    sides = ["--baseline", str(demo_model), "--subject", str(demo_model), "--edit-config", "edit.yaml"]
    places = ["--preset", "preset.yaml", "--profile", "dev", "--out", "runs", "--cert-out", "cert"]
    done = run(sys.executable, "-m", "invarlock", "certify", *sides, *places)
    assert done.returncode == 1, done.stderr
    certificate = json.loads((tmp_path / "cert" / "evaluation.cert.json").read_text(encoding="utf-8"))
    (gate,) = (gate for gate in certificate["gates"] if gate["name"] == "entropy")
    assert (gate["decision"], gate["limit"]) == ("fail", 0.1) and gate["measured"] > 0.1
    assert "ENTROPY" in [reason["code"] for reason in certificate["verdict"]["reasons"]]
    measured = certificate["dataset"]["windows"]["preview"]  # so clear a change is decided before the last of the 32
    assert len(certificate["evaluation_windows"]["preview"]["subject_entropy"]) == measured > 0
    for path in ("cert", str(ROOT / "tests" / "assets" / "certificates" / "pass_8bit.json")):
        assert "INTACT" in run(sys.executable, "-m", "invarlock", "verify", path).stdout
