"""Every command through the installed script: its help, one success, one failure; and the form of what `--json` prints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from certification import CertifyOutcome
from invarlock.certificate.schema import json_schema
from invarlock.cli.app import COMMANDS
from invarlock.reporting.bundle import write_bundle
from runs import Configure

from .conftest import Script


@dataclass(frozen=True)
class Case:
    """What a command is given in a success and in a failure; `code` is the failure's exit code."""

    success: list[str]
    failure: list[str]
    code: int
    envelope: str | None = None


@pytest.fixture
def cases(
    passed: CertifyOutcome, configure: Configure, demo_model: Path, text_file: Path, tmp_path: Path
) -> dict[str, Case]:
    certificate = tmp_path / "certified"
    write_bundle(passed.certificate, certificate)
    config = str(configure("contract"))
    preset = tmp_path / "preset.yaml"
    data = {"provider": {"kind": "local_jsonl", "file": str(text_file)}, "seq_len": 32}
    preset.write_text(json.dumps({"dataset": data}), encoding="utf-8")
    certify = ["certify", "--subject", str(demo_model), "--profile", "dev", "--preset", str(preset)]
    certify += ["--out", str(tmp_path / "runs"), "--cert-out", str(tmp_path / "cert")]
    run = ["run", "-c", config, "--out", str(tmp_path / "made"), "--profile", "dev"]
    sweep = ["calibrate", "null-sweep", "--seeds", "2", "--out", str(tmp_path / "sweep")]
    pack = ["baseline", "make", "--profile", "dev", "--preset", str(preset)]
    missing = str(tmp_path / "missing")
    bisect = ["bisect", "--windows", "4", "--preset", str(preset), "--out", str(tmp_path / "found"), "--baseline"]
    sensitivity = ["sensitivity", "--windows", "4", "--preset", str(preset), "--plan", "bitwidth=4", "--model"]
    return {
        "certify": Case([*certify, "--baseline", str(demo_model)], [*certify, "--baseline", missing], 5, "certify-v1"),
        "run": Case(run, [*run, "--edit", "no_such_edit"], 2, "run-v1"),
        "verify": Case(["verify", str(certificate)], ["verify", missing], 2, "verify-v1"),
        "report": Case(["report", "explain", str(certificate)], ["report", "explain", missing], 2),
        "plugins": Case(["plugins", "list"], ["plugins", "guards", "--explain", "no_such_guard"], 2, "plugins-v1"),
        "calibrate": Case([*sweep, "-c", config], [*sweep, "-c", missing], 2, "calibration-v1"),
        "baseline": Case(
            [*pack, str(demo_model), "-o", str(tmp_path / "new.pack")],
            [*pack, missing, "-o", str(tmp_path / "no.pack")],
            5,
            "baseline-v1",
        ),
        "cache": Case(["cache", "list"], ["cache", "list", "--no-such-flag"], 2, "cache-v1"),
        "doctor": Case(["doctor"], ["doctor", "--config", missing], 1, "doctor-v1"),
        "diff": Case(["diff", str(demo_model), str(demo_model)], ["diff", str(demo_model), missing], 2, "diff-v1"),
        "bisect": Case(
            [*bisect, str(demo_model), "--subject", str(demo_model)],
            [*bisect, missing, "--subject", missing],
            5,
            "bisect-v1",
        ),
        "sensitivity": Case([*sensitivity, str(demo_model)], [*sensitivity, missing], 5, "sensitivity-v1"),
        "demo": Case(["demo", "--out", str(tmp_path / "demo")], ["demo", "--out", str(preset)], 2),
        "init": Case(["init", "-o", str(tmp_path / "new.yaml")], ["init", "-o", str(preset)], 2),
        "version": Case(["version"], ["version", "--no-such-flag"], 2, "version"),
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_plain_and_fits_80_columns(script: Script, command: str) -> None:
    shown = script(command, "--help", COLUMNS="80", NO_COLOR="1")
    assert shown.returncode == 0 and f"invarlock {command}" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert "\x1b" not in shown.stdout


#: commands that measure a model succeed once, with --json below; the demo, in `make demo` and in the tests of the first page
MEASURING = ("certify", "run", "calibrate", "bisect", "sensitivity", "baseline", "demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_success_exits_with_0_and_a_failure_is_one_line(script: Script, cases: dict[str, Case], command: str) -> None:
    case = cases[command]
    if command not in MEASURING:
        done = script(*case.success, COLUMNS="80")
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() and "\x1b" not in done.stdout + done.stderr
    failed = script(*case.failure)
    assert failed.returncode == case.code, failed.stderr
    said = failed.stderr.strip() or failed.stdout.strip()
    assert "Traceback" not in failed.stderr and said
    assert len(failed.stderr.strip().splitlines()) <= 1


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("report", "demo", "init")])
def test_json_is_one_line_and_follows_the_shipped_schema(script: Script, cases: dict[str, Case], command: str) -> None:
    case = cases[command]
    assert case.envelope is not None
    done = script(*case.success, "--json")
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr
    Draft202012Validator(_shipped()[case.envelope]).validate(json.loads(done.stdout))


@pytest.mark.slow
def test_every_envelope_takes_its_own_fields_and_no_others() -> None:
    for form, schema in _shipped().items():
        Draft202012Validator.check_schema(schema)
        assert list(Draft202012Validator(schema).iter_errors({}))
        assert schema["additionalProperties"] is False and schema["required"] == list(schema["properties"])
        assert "-" not in form or schema["properties"]["format_version"]["const"] == form


@pytest.mark.slow
def test_a_verdict_is_that_of_a_certificate() -> None:
    for form in ("certify-v1", "run-v1"):
        for part in ("Verdict", "Reason"):
            assert _shipped()[form]["$defs"][part] == json_schema()["$defs"][part]


def _shipped() -> dict[str, dict[str, Any]]:
    text = resources.files("invarlock.data").joinpath("envelopes.schema.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = json.loads(text)
    return found
