"""`invarlock certify`: verdicts become exit codes, files appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from certification import SEQ_LEN, CertifyOutcome

from .conftest import Cli, Script

BUNDLE = {"evaluation.cert.json", "evaluation_certificate.md", "evaluation.html", "manifest.json"}


@pytest.fixture
def preset(tmp_path: Path, text_file: Path) -> Path:
    path = tmp_path / "preset.yaml"
    data = {"provider": {"kind": "local_jsonl", "file": str(text_file)}, "seq_len": SEQ_LEN}
    path.write_text(json.dumps({"dataset": data}), encoding="utf-8")  # JSON is YAML
    return path


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _arguments(folder: Path, **options: Any) -> list[str]:
    chosen = {"out": folder / "runs", "cert_out": folder / "cert", "profile": "dev", **options}
    return [x for name, value in chosen.items() for x in (f"--{name.replace('_', '-')}", str(value))]


def _one_line(result: Result | subprocess.CompletedProcess[str]) -> str:
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def test_a_pass_writes_the_whole_bundle_and_exits_with_0(
    script: Script, demo_model: Path, preset: Path, tmp_path: Path
) -> None:
    arguments = _arguments(tmp_path, baseline=demo_model, subject=demo_model, preset=preset, edit_label="none at all")
    result = script("certify", *arguments, "--timing")
    assert result.returncode == 0, result.stderr
    assert "PASS" in result.stdout and "evaluation.cert.json" in result.stdout
    assert f"MB in all; to free it: invarlock cache clear --runs {tmp_path / 'runs'}" in result.stdout
    folder = tmp_path / "cert"
    assert _files(folder) == BUNDLE
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert (entry["sha256"], entry["bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))
    certificate = json.loads((folder / "evaluation.cert.json").read_text(encoding="utf-8"))
    assert certificate["edit"]["label"] == "none at all"
    assert {Path(name).parts[0] for name in _files(tmp_path / "runs")} == {"source", "edited"}
    assert {Path(name).name for name in _files(tmp_path / "runs")} == {
        "report.json",
        "events.jsonl",
        "evidence.safetensors",
    }


def test_a_fail_exits_with_1_and_names_the_reason(
    cli: Cli, wrecked: Path, passed: CertifyOutcome, tmp_path: Path
) -> None:
    arguments = _arguments(tmp_path, baseline_report=passed.source_report, subject=wrecked)
    result = cli("certify", *arguments, "--json")
    shown = json.loads(result.stdout)
    assert result.exit_code == shown["exit_code"] == 1
    assert shown["verdict"]["status"] == "FAIL" and shown["verdict"]["reasons"]
    assert len(result.stdout.strip().splitlines()) == 1
    assert _files(tmp_path / "cert") == BUNDLE


@pytest.mark.slow
def test_a_refused_subject_exits_with_1_and_names_the_tensor(
    cli: Cli, demo_model: Path, damaged: Path, preset: Path, tmp_path: Path
) -> None:
    result = cli("certify", *_arguments(tmp_path, source=demo_model, edited=damaged, preset=preset))
    assert result.exit_code == 1
    assert "transformer.h.2.mlp.c_fc.weight" in result.stdout
    assert _files(tmp_path / "cert") == BUNDLE
    assert not (tmp_path / "runs").exists()


def test_a_wrong_key_in_the_preset_is_one_line_and_2(
    script: Script, demo_model: Path, preset: Path, tmp_path: Path
) -> None:
    preset.write_text("dataset: {provider: python_docs, seq_length: 64}\n", encoding="utf-8")
    result = script("certify", *_arguments(tmp_path, baseline=demo_model, subject=demo_model, preset=preset))
    assert result.returncode == 2
    line = _one_line(result)
    assert "seq_length" in line and "seq_len" in line
    assert _files(tmp_path) == {"preset.yaml"}


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"baseline_report": "nowhere"}, 2, "no report.json"),
        ({"baseline": "{demo}", "baseline_report": "nowhere"}, 2, "both"),
        ({}, 2, "neither"),
        ({"baseline": "/no/such/model"}, 5, "no such folder"),
        ({"baseline": "{demo}", "profile": "nightly"}, 2, "nightly"),
        ({"baseline": "{demo}", "device": "abacus"}, 2, "abacus"),
        ({"baseline": "{demo}", "intent": "finetun"}, 2, "expected preserve or finetune"),
        ({"baseline": "{demo}", "preset": "nowhere.yaml"}, 2, "nowhere.yaml"),
        ({"baseline": "{demo}", "edit_config": "nowhere.yaml"}, 2, "nowhere.yaml"),
        ({"baseline": "{demo}", "adapter": "hf_casual"}, 2, "hf_causal"),
    ],
)
def test_wrong_usage_is_one_line_and_writes_nothing(
    options: dict[str, str], code: int, words: str, cli: Cli, demo_model: Path, tmp_path: Path
) -> None:
    filled = {name: value.format(demo=demo_model) for name, value in options.items()}
    result = cli("certify", *_arguments(tmp_path, subject=demo_model, **filled))
    assert result.exit_code == code
    assert words in _one_line(result)
    assert _files(tmp_path) == set()


def test_too_little_text_is_a_hard_stop_in_ci(script: Script, demo_model: Path, preset: Path, tmp_path: Path) -> None:
    arguments = _arguments(tmp_path, baseline=demo_model, subject=demo_model, preset=preset, profile="ci")
    result = script("certify", *arguments)
    assert result.returncode == 3
    assert "[INVARLOCK:E001]" in _one_line(result)
    assert _files(tmp_path) == {"preset.yaml"}


def test_few_documents_are_inconclusive_and_4(
    script: Script, demo_model: Path, harmless: Path, text_file: Path, tmp_path: Path
) -> None:
    one = tmp_path / "one.jsonl"
    texts = [json.loads(line)["text"] for line in text_file.read_text(encoding="utf-8").splitlines()[:6]]
    one.write_text(json.dumps({"text": " ".join(texts)}) + "\n", encoding="utf-8")
    preset = tmp_path / "one.yaml"
    data = {"provider": {"kind": "local_jsonl", "file": str(one)}, "seq_len": SEQ_LEN}
    preset.write_text(json.dumps({"dataset": data}), encoding="utf-8")
    result = script("certify", *_arguments(tmp_path, baseline=demo_model, subject=harmless, preset=preset))
    assert result.returncode == 4, result.stderr
    assert "INCONCLUSIVE" in result.stdout
    assert script("verify", str(tmp_path / "cert")).returncode == 4


def test_an_edit_from_a_file_is_applied_to_the_subject(
    cli: Cli, demo_model: Path, passed: CertifyOutcome, tmp_path: Path
) -> None:
    edit = tmp_path / "edit.yaml"
    edit.write_text("edit: {name: quant_rtn, plan: {bitwidth: 2}}\n", encoding="utf-8")
    arguments = _arguments(tmp_path, baseline_report=passed.source_report, subject=demo_model, edit_config=edit)
    result = cli("certify", *arguments)
    assert result.exit_code == 1, result.stderr
    certificate = json.loads((tmp_path / "cert" / "evaluation.cert.json").read_text(encoding="utf-8"))
    assert (certificate["edit"]["name"], certificate["edit"]["plan"]["bitwidth"]) == ("quant_rtn", 2)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGINT, "start"),
        (signal.SIGTERM, "runs/source"),
        (signal.SIGINT, "runs/source/*/evidence.safetensors"),
        (signal.SIGTERM, "runs/source/*/report.json"),
    ],
)
def test_an_interrupted_run_leaves_nothing_half_written(
    number: int, moment: str, demo_model: Path, preset: Path, tmp_path: Path
) -> None:
    command = [str(Path(sys.executable).parent / "invarlock"), "certify"]
    command += _arguments(tmp_path, baseline=demo_model, subject=demo_model, preset=preset)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ}) as process:
        _wait_for(process, tmp_path, moment)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    left = _files(tmp_path)
    assert not (tmp_path / "cert").exists()
    assert not [name for name in left if ".part" in name or ".staging" in name or Path(name).name.startswith(".")]
    for name in left:
        if name.endswith(".json"):
            json.loads((tmp_path / name).read_text(encoding="utf-8"))


def _wait_for(process: subprocess.Popen[str], folder: Path, moment: str) -> None:
    """Return a moment after the command has begun to work, or as soon as it has written `moment`."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if moment == "start":
            time.sleep(1.5)  # imports alone take longer than the signal handler's installation
            return
        if any(folder.glob(moment)):
            return
        time.sleep(0.005)
    raise AssertionError(f"the command ended with {process.returncode} before {moment}; expected it to be interrupted")


@pytest.mark.slow
def test_a_fail_ends_with_the_command_that_finds_the_tensors_and_explain_tells_what_it_found(
    cli: Cli, demo_model: Path, wrecked: Path, preset: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "with a space"
    folder.mkdir()
    failed = cli("certify", *_arguments(folder, baseline=demo_model, subject=wrecked, preset=preset))
    assert failed.exit_code == 1, failed.output
    certificate = json.loads((folder / "cert" / "evaluation.cert.json").read_text(encoding="utf-8"))
    assert "2-bit rounding" in {row.get("operation", "")[:14] for row in certificate["weights"]["changes"]}
    line = next(line for line in failed.stdout.splitlines() if line.startswith("which tensor"))
    name, *pasted = shlex.split(line.removeprefix("which tensor"))
    assert name == "invarlock"
    found = cli(*pasted, "--windows", "4", "--budget", "5s")
    assert found.exit_code == 0, found.output
    told = cli("report", "explain", str(folder / "cert"))
    summary = json.loads((folder / "cert" / "bisect.json").read_text(encoding="utf-8"))["summary"]
    assert summary
    assert told.stdout.splitlines()[-len(summary) :] == [f"{'bisect':<14}{line}" for line in summary]
