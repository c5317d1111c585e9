"""The GitHub Action: its file is well formed, and its steps do what they say, run here with GitHub's files faked."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from .pages import ROOT

ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS = {step["name"]: step for step in ACTION["runs"]["steps"]}
EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")
#: stands for `invarlock`: notes its arguments, leaves what the test put aside, ends as the test says
FAKE = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$FAKE_ARGUMENTS"
while [ $# -gt 0 ]; do if [ "$1" = --cert-out ]; then cert=$2; fi; shift; done
if [ -n "$FAKE_CERTIFICATE" ]; then mkdir -p "$cert" && cp "$FAKE_CERTIFICATE"/* "$cert"; fi
echo 'ERROR [CONFIG] dataset.seq_len is 9000; expected at most 256' >&2
exit "$FAKE_CODE"
"""


@dataclass
class Job:
    """What a workflow keeps between steps."""

    folder: Path
    inputs: dict[str, str]
    outputs: dict[str, dict[str, str]]
    environment: dict[str, str]

    def value(self, text: str) -> str:
        """Fill in GitHub's expressions, as far as the action uses them."""
        known = {"github.action_path": str(ROOT), "runner.temp": str(self.folder)}

        def fill(match: re.Match[str]) -> str:
            name = match[1]
            if name.startswith("inputs."):
                return self.inputs[name.removeprefix("inputs.")]
            if name.startswith("steps."):
                _, step, _, key = name.split(".")
                return self.outputs[step].get(key, "")
            return known[name]

        return EXPRESSION.sub(fill, text)

    def run(self, name: str) -> subprocess.CompletedProcess[str]:
        step = STEPS[name]
        files = {variable: self.folder / variable for variable in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        files["GITHUB_OUTPUT"].write_text("")
        environment = {**os.environ, **self.environment, **{k: str(v) for k, v in files.items()}}
        environment |= {key: self.value(value) for key, value in step.get("env", {}).items()}
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=self.folder, env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        written = files["GITHUB_OUTPUT"].read_text().splitlines()
        self.outputs[step.get("id", name)] = dict(line.split("=", 1) for line in written)
        return done


Start = Callable[..., Job]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    def _start(code: int, certificate: dict[str, Any] | None, **inputs: str) -> Job:
        scripts, kept = tmp_path / "bin", tmp_path / "kept"
        scripts.mkdir()
        (scripts / "invarlock").write_text(FAKE)
        (scripts / "invarlock").chmod(0o755)
        (scripts / "python").symlink_to(sys.executable)
        if certificate is not None:
            kept.mkdir()
            (kept / "evaluation.cert.json").write_text(json.dumps(certificate))
            (kept / "evaluation_certificate.md").write_text("# InvarLock certificate\n")
        environment = {
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
            "FAKE_ARGUMENTS": str(tmp_path / "arguments"),
            "FAKE_CERTIFICATE": str(kept) if certificate is not None else "",
            "FAKE_CODE": str(code),
        }
        defaults = {name: str(spec.get("default", "")) for name, spec in ACTION["inputs"].items()}
        return Job(tmp_path, {**defaults, "baseline": "base", "subject": "edited", **inputs}, {}, environment)

    return _start


def certificate(status: str, *reasons: tuple[str, str, str | None], warned: str | None = None) -> dict[str, Any]:
    """The fields of a certificate that the action reads."""
    gates = [{"name": code.lower(), "decision": "fail", "reason": text} for code, text, _ in reasons]
    gates += [{"name": "sample_size", "decision": "pass", "reason": "enough"}]
    gates += [{"name": warned, "decision": "warn", "reason": "q95 0.72 exceeds 0.2"}] if warned else []
    return {
        "verdict": {
            "status": status,
            "reasons": [{"code": c, "message": m, "gate": c.lower(), "tensor": t} for c, m, t in reasons],
        },
        "gates": gates,
        "primary_metric": {"ratio_vs_baseline": 1.0},
    }


def whole(job: Job) -> tuple[list[str], int]:
    """Run the action's own steps after the installation; return the annotations and the last exit code."""
    assert job.run("Certify").returncode == 0
    told = job.run("Annotate and summarise")
    assert told.returncode == 0, told.stderr
    return told.stdout.splitlines(), job.run("Verdict").returncode


def test_the_file_is_a_composite_action_whose_scripts_hold_no_expression() -> None:
    assert ACTION["runs"]["using"] == "composite" and ACTION["inputs"]["subject"]["required"] is True
    for step in STEPS.values():
        assert ("uses" in step) != ("run" in step)
        if "run" in step:
            assert step["shell"] == "bash" and not EXPRESSION.search(step["run"]), "inputs would be run as code"
            subprocess.run(["bash", "-n"], input=step["run"], text=True, check=True)


def test_every_expression_names_something_that_exists() -> None:
    ids = {step["id"] for step in STEPS.values() if "id" in step}
    for name in EXPRESSION.findall((ROOT / "action.yml").read_text(encoding="utf-8")):
        for used in re.findall(r"inputs\.([\w-]+)", name):
            assert used in ACTION["inputs"]
        for used in re.findall(r"steps\.([\w-]+)", name):
            assert used in ids


@pytest.mark.slow
def test_pass_is_a_notice_and_exit_code_0(start: Start) -> None:
    job = start(0, certificate("PASS", warned="primary_metric_tail"))
    lines, code = whole(job)
    assert code == 0
    assert lines == [
        "::warning title=InvarLock%3A primary_metric_tail::q95 0.72 exceeds 0.2",
        "::notice title=InvarLock PASS::ratio to the baseline 1.0",
    ]
    assert job.outputs["report"]["verdict"] == "PASS"
    assert Path(job.outputs["report"]["certificate"]).is_file()
    assert (job.folder / "GITHUB_STEP_SUMMARY").read_text() == "# InvarLock certificate\n\n"


@pytest.mark.slow
def test_fail_annotates_each_reason_with_its_tensor_and_fails(start: Start) -> None:
    reasons = (("NON_FINITE", "3 values\nare NaN, 100%", "h.0.mlp"), ("DIVERGENCE_KL", "0.4 nats, limit 0.1", None))
    lines, code = whole(start(1, certificate("FAIL", *reasons)))
    assert code == 1
    assert lines == [
        "::error title=InvarLock FAIL%3A NON_FINITE::3 values%0Aare NaN, 100%25 (h.0.mlp)",
        "::error title=InvarLock FAIL%3A DIVERGENCE_KL::0.4 nats, limit 0.1",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("allowed", "expected"), [("false", 4), ("true", 0)])
def test_inconclusive_fails_unless_it_is_allowed(start: Start, allowed: str, expected: int) -> None:
    reasons = (("PRIMARY_METRIC", "the interval straddles the limit", None),)
    lines, code = whole(start(4, certificate("INCONCLUSIVE", *reasons), **{"allow-inconclusive": allowed}))
    assert code == expected
    assert lines == ["::warning title=InvarLock INCONCLUSIVE%3A PRIMARY_METRIC::the interval straddles the limit"]


@pytest.mark.slow
@pytest.mark.parametrize("code", [1, 2, 3])
def test_an_error_without_a_certificate_shows_its_line_and_fails(start: Start, code: int) -> None:
    job = start(code, None, **{"allow-inconclusive": "true"})
    lines, ended = whole(job)
    assert ended == code
    assert lines == [
        "::error title=InvarLock made no certificate::ERROR [CONFIG] dataset.seq_len is 9000; expected at most 256"
    ]
    assert job.outputs["report"] == {"verdict": "ERROR", "certificate": ""}


@pytest.mark.slow
def test_the_arguments_reach_the_command_unharmed(start: Start) -> None:
    job = start(
        0, certificate("PASS"), subject="a b; $(touch hacked)", preset="p.yaml", **{"extra-args": "--intent finetune"}
    )
    whole(job)
    arguments = (job.folder / "arguments").read_text().splitlines()
    assert arguments[:3] == ["certify", "--subject", "a b; $(touch hacked)"]
    assert arguments[-6:] == ["--baseline", "base", "--preset", "p.yaml", "--intent", "finetune"]
    assert not (job.folder / "hacked").exists()


@pytest.mark.slow
def test_without_a_baseline_none_is_passed(start: Start) -> None:
    job = start(0, certificate("PASS"), baseline="", **{"extra-args": "--baseline-report runs/source"})
    whole(job)
    arguments = (job.folder / "arguments").read_text().splitlines()
    assert "--baseline" not in arguments and arguments[-2:] == ["--baseline-report", "runs/source"]


@pytest.mark.parametrize(
    ("version", "wanted"), [("", f"invarlock[hf] @ file://{ROOT}"), ("1.0.0", "invarlock[hf]==1.0.0")]
)
def test_what_is_installed(start: Start, version: str, wanted: str) -> None:
    job = start(0, None, version=version)
    fake = job.folder / "bin" / "python"
    fake.unlink()
    fake.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > "{job.folder}/pip"\n')
    fake.chmod(0o755)
    assert job.run("Install").returncode == 0
    arguments = (job.folder / "pip").read_text().splitlines()
    assert arguments[:3] == ["-m", "pip", "install"] and arguments[-1] == wanted


def test_the_inputs_are_those_that_the_guide_lists() -> None:
    page = (ROOT / "docs" / "user-guide" / "ci.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)) == set(ACTION["inputs"])
