"""The package of the plugin guide: installed for real, listed as printed, its own tests green, its classes usable."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distributions import EXAMPLE
from invarlock.eval.data import get_provider

CHECK = """
import torch
from invarlock.core import registry
from invarlock.policy.config import load_config
from invarlock.core.api import GuardWithPrepare

settings = load_config({path!r})
guard = registry.guards.create("nan_check", **settings.plugin_arguments("nan_check"))
assert guard.strict is False and isinstance(guard, GuardWithPrepare)
adapter = registry.adapters.create("custom_format")
model = torch.nn.Linear(3, 3)
guard.prepare(model, adapter, None, None)
before = [p.clone() for p in model.parameters()]
kept = adapter.snapshot(model)
with torch.no_grad():
    model.weight[0, 0] = float("nan")
result = guard.validate(model, adapter, {{}})
assert (result["passed"], result["action"], result["metrics"]["nan_params"]) == (False, "warn", ["weight"])
adapter.restore(model, kept)
assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
assert guard.validate(model, adapter, {{}})["passed"]
assert adapter.describe(model)["n_layer"] is None and adapter.tokenizer("x") is None
print("OK")
"""


def test_the_line_of_the_guide_is_printed(run, installed: Path) -> None:
    done = run("plugins", "guards", site=installed)
    assert "nan_check | Plugin | Guard | — | — | ✅ Ready" in done.stdout.splitlines()


@pytest.mark.parametrize("arguments", [[], ["list"], ["list", "plugins"], ["--only", "plugin"], ["--only", "ready"]])
def test_it_is_in_every_listing_that_it_belongs_to(run, installed: Path, arguments: list[str]) -> None:
    names = {line.split(" | ")[0] for line in run("plugins", *arguments, site=installed).stdout.splitlines()}
    assert {"nan_check", "threshold", "custom_format", "text_folder"} <= names


def test_only_plugins_leaves_ours_out(run, installed: Path, items) -> None:
    listed = items(run("plugins", "list", "plugins", "--json", site=installed).stdout)
    assert set(listed) == {"nan_check", "threshold", "custom_format", "text_folder"}
    assert listed["custom_format"] == {
        "name": "custom_format",
        "kind": "adapter",
        "origin": "plugin",
        "module": "my_plugin.custom_adapter",
        "attribute": "CustomFormatAdapter",
        "entry_point": "invarlock.adapters: custom_format = my_plugin.custom_adapter:CustomFormatAdapter",
        "distribution": "my-invarlock-plugin",
        "version": "0.1.0",
        "backend": None,
        "status": "ready",
        "reason": None,
        "hint": None,
    }


def test_explain_shows_where_it_comes_from_and_what_it_takes(run, installed: Path) -> None:
    done = run("plugins", "adapters", "--explain", "custom_format", site=installed)
    assert done.returncode == 0
    rows = dict(re.split(r":\s+", line, maxsplit=1) for line in done.stdout.splitlines())
    assert rows["module"] == "my_plugin.custom_adapter"
    assert rows["distribution"] == "my-invarlock-plugin"
    assert rows["constructor"] == "no parameters"
    shown = run("plugins", "guards", "--explain", "threshold", site=installed).stdout
    assert "max_magnitude=100.0, warn_magnitude=50.0, scope='all'" in shown


def test_its_provider_is_listed_explained_and_suggested(run, installed: Path, items) -> None:
    listed = items(run("plugins", "list", "datasets", "--json", site=installed).stdout)
    assert (listed["text_folder"]["kind"], listed["text_folder"]["origin"]) == ("provider", "plugin")
    assert listed["python_docs"]["origin"] == "core"
    shown = run("plugins", "list", "datasets", "--explain", "text_folder", site=installed).stdout
    assert "split=None, folder='.', pattern='*.txt'" in shown
    done = run("plugins", "list", "datasets", "--explain", "text_foldr", site=installed)
    assert "unknown dataset 'text_foldr' (did you mean 'text_folder'?)" in done.stderr


def test_its_provider_serves_a_certificate(run, installed: Path, demo_model: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for document in get_provider("synthetic", count=40).documents():
        (tmp_path / "texts" / f"{document.document_id.replace(':', '-')}.txt").write_text(document.text)
    preset = tmp_path / "preset.yaml"
    preset.write_text(f"dataset: {{provider: {{kind: text_folder, folder: {tmp_path / 'texts'}}}, seq_len: 48}}\n")
    assert run("doctor", "--config", str(preset), "--profile", "dev", site=installed).returncode == 0
    sides = ["--baseline", str(demo_model), "--subject", str(demo_model)]
    places = ["--out", str(tmp_path / "runs"), "--cert-out", str(tmp_path / "cert")]
    done = run("certify", *sides, "--preset", str(preset), "--profile", "dev", *places, site=installed)
    assert done.returncode == 0, done.stderr
    certificate = json.loads((tmp_path / "cert" / "evaluation.cert.json").read_text())
    assert (certificate["dataset"]["provider"], certificate["verdict"]["status"]) == ("text_folder", "PASS")


def test_verbose_shows_module_and_entry_point(run, installed: Path) -> None:
    shown = run("plugins", "guards", "--verbose", site=installed).stdout
    assert "my_plugin.my_guard:NaNCheckGuard  [invarlock.guards]  my-invarlock-plugin 0.1.0" in shown


def test_debug_trace_logs_the_discovery_on_stderr(run, installed: Path) -> None:
    done = run("plugins", "list", site=installed, INVARLOCK_DEBUG_TRACE="1")
    assert "nan_check = my_plugin.my_guard:NaNCheckGuard" in done.stderr
    assert "DEBUG" not in done.stdout


def test_uninstall_names_the_distribution(run, installed: Path) -> None:
    done = run("plugins", "uninstall", "nan_check", site=installed)
    assert done.stdout == "dry run: pip uninstall -y my-invarlock-plugin\n"


def test_its_classes_work_with_a_configuration(tmp_path: Path, installed: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: {id: x}\nguards:\n  order: [invariants, nan_check]\n  nan_check: {strict: false}\n")
    program = CHECK.format(path=str(path))
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("OK\n", 0), done.stderr


def test_its_own_tests_pass(installed: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE / "tests")]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b12 passed\b", done.stdout)
