"""Every code block of the documentation that can run is run; every other one is at least parsed."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from invarlock.policy.config import load_config

from .pages import DOCS, Block, blocks, chapter, pages

GUIDES = (DOCS / "reference" / "api-guide.md", DOCS / "user-guide" / "plugins.md")  # these stand as they were given
RUNNABLE = [page for page in pages() if page not in GUIDES and not any(block.file for block in blocks(page))]
GUIDE = [page for page in chapter("User guide") if page in RUNNABLE]


def parse(block: Block) -> None:
    if block.language == "python":
        ast.parse(block.code)
    elif block.language in ("yaml", "yml"):
        yaml.safe_load(block.code)
    elif block.language == "json":
        json.loads(block.code)
    elif block.language == "toml":
        tomllib.loads(block.code)
    elif block.language == "bash":
        subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)
    else:
        assert block.language in ("text", "diff"), f"{block.where}: unknown language {block.language}"


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_block_parses(page: Path) -> None:
    for block in blocks(page):
        parse(block)
        assert block.reason != "", f"{block.where}: not run, and no reason given"


def environment() -> dict[str, str]:
    """The environment of a shell block: this interpreter and its scripts first."""
    scripts = os.pathsep.join([str(Path(sys.executable).parent), sysconfig.get_path("scripts")])
    return {**os.environ, "PATH": scripts + os.pathsep + os.environ["PATH"]}


def run_block(block: Block, folder: Path, names: dict[str, Any]) -> None:
    if block.language == "bash":
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.code],
            cwd=folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, f"{block.where}\n{done.stdout}\n{done.stderr}"
    elif block.language == "python":
        exec(compile(block.code, block.where, "exec", dont_inherit=True), names)
    elif block.language == "yaml":
        path = folder / "block.yaml"
        path.write_text(block.code, encoding="utf-8")
        load_config(path, require_model=False)


def run_page(page: Path, folder: Path) -> None:
    """Run the blocks of a page in a folder, in the order in which they stand there."""
    names: dict[str, Any] = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks(page):
            if block.remark is None:
                run_block(block, folder, names)


@pytest.mark.slow
@pytest.mark.timeout(900)  # all of its pages in one go
def test_the_guide_runs_in_its_own_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a reader goes through it, in one folder; what its pages say of the first certificates holds."""
    for page in GUIDE:
        run_page(page, tmp_path)
    verdicts = {
        name: json.loads((tmp_path / "reports" / name / "evaluation.cert.json").read_text())["verdict"]["status"]
        for name in ("demo-8bit", "demo-2bit")
    }
    assert verdicts == {"demo-8bit": "PASS", "demo-2bit": "FAIL"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [p for p in RUNNABLE if p not in GUIDE and any(b.remark is None for b in blocks(p))],
    ids=lambda p: p.name,
)
def test_the_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_page(page, tmp_path)


@pytest.mark.parametrize("page", [page for page in pages() if page not in GUIDES], ids=lambda page: page.name)
def test_what_is_installed_is_a_copy_a_wheel_or_somebody_elses(page: Path) -> None:
    """The name `invarlock` of the registry is not ours yet: whoever installed by it would get another program."""
    for line in re.findall(r"pip install[^`\n]*", page.read_text(encoding="utf-8")):
        assert not re.search(r"[ \"']invarlock(\[[\w,]*\])?(==|[\"'\s]|$)", line), line


def api_guide_names(demo_model: Path, calibration: list[Mapping[str, Any]]) -> dict[str, Any]:
    """What the fragments of the guide take for granted."""
    from transformers import AutoTokenizer

    from invarlock.adapters import HF_Causal_Adapter
    from invarlock.core.api import RunConfig
    from invarlock.edits import NoopEdit
    from invarlock.flow.execute import CoreRunner
    from invarlock.guards import InvariantsGuard, SpectralGuard

    adapter = HF_Causal_Adapter()
    model = adapter.load_model(str(demo_model), device="cpu")
    guards = [InvariantsGuard(), SpectralGuard(sigma_quantile=0.95, deadband=0.10)]
    baseline = CoreRunner().execute(
        model, adapter, NoopEdit(), guards, RunConfig(device="cpu"), calibration_data=calibration
    )
    return {
        "__name__": "__main__",
        "tokenizer": AutoTokenizer.from_pretrained(demo_model, local_files_only=True),
        "calibration_data": calibration,
        "auto_config": {"tier": "balanced"},
        "edit_config": {"bitwidth": 8},
        "preview_n": 8,
        "final_n": 8,
        "guard": SpectralGuard(),
        "calib": calibration,
        "policy_config": {},
        "baseline_report": baseline,
    }


@pytest.mark.slow
def test_the_blocks_of_the_api_guide_run_as_printed(
    demo_model: Path, calibration: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`gpt2` is a folder here, holding the demo model; `wikitext2`, which needs the network, reads python_docs."""
    from invarlock.eval.data import PythonDocsProvider, Wikitext2Provider

    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").symlink_to(demo_model)
    monkeypatch.setattr(Wikitext2Provider, "documents", lambda self, split=None: PythonDocsProvider().documents())
    names = api_guide_names(demo_model, calibration)
    ran = [block for block in blocks(GUIDES[0]) if block.language == "python"]
    for block in ran:
        if "get_provider" in block.code:
            block = Block(block.page, block.line, block.language, block.code.replace("512", "48"), None)
        run_block(block, tmp_path, names)
    assert len(ran) >= 7
    assert names["report"].status == "success" and names["certificate"]["verdict"]["status"] in ("PASS", "INCONCLUSIVE")
    assert len(names["calibration"]) == 128
