"""`invarlock doctor`: lines or one JSON object, and an exit code that scripts can use."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path

import pytest

from invarlock.cli.certify import certify as certify_command
from invarlock.cli.doctor import doctor as doctor_command


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("INVARLOCK_"):
            monkeypatch.delenv(name)


def test_errors_fail(cli, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("modle: {id: x}\n")
    result = cli("doctor", "--config", str(path))
    assert result.exit_code == 1
    first = result.stdout.splitlines()[0]
    assert first.startswith("ERROR: [INVARLOCK:D020] config.yaml:1: unknown key 'modle' (did you mean 'model'?)")
    assert result.stdout.splitlines()[-1].startswith("1 error, ")


@pytest.mark.parametrize(("arguments", "code"), [([], 0), (["--strict"], 1)])
def test_warnings_fail_only_when_strict(cli, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int) -> None:
    monkeypatch.setenv("INVARLOCK_ALOW_NETWORK", "1")
    assert cli("doctor", *arguments).exit_code == code


def test_json_is_one_object_on_one_line(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVARLOCK_CI_FINAL", "x")
    result = cli("doctor", "--json")
    assert result.stdout.count("\n") == 1
    envelope = json.loads(result.stdout)
    assert (envelope["format_version"], envelope["component"]) == ("doctor-v1", "doctor")
    assert envelope["summary"]["error"] == 1
    assert envelope["resolution"]["exit_code"] == result.exit_code == 1
    assert envelope["findings"][0] == {
        "code": "D006",
        "level": "ERROR",
        "message": "environment variable INVARLOCK_CI_FINAL is 'x'; expected a whole number",
    }


def test_it_works_without_torch(script) -> None:
    done = script("doctor", INVARLOCK_LIGHT_IMPORT="1")
    assert done.returncode == 0
    assert "NOTE" in done.stdout


def test_an_unknown_profile_is_wrong_usage(cli) -> None:
    assert cli("doctor", "--profile", "nightly").exit_code == 2


@pytest.mark.slow
def test_the_command_line_of_certify_is_taken_as_it_is(cli, demo_model: Path, tmp_path: Path) -> None:
    certify = inspect.signature(certify_command).parameters
    assert set(certify) <= set(inspect.signature(doctor_command).parameters)
    given = ["--baseline", str(demo_model), "--edited", str(tmp_path / "none"), "--profile", "dev", "--no-early-stop"]
    result = cli("doctor", *given, "--cert-out", str(tmp_path / "c"), "--out", str(tmp_path / "r"), "--json")
    found = json.loads(result.stdout)["findings"]
    assert result.exit_code == 1 and result.stdout.count("\n") == 1
    assert [item["message"].split(":")[0] for item in found if item["code"] == "D040"] == [
        f"the subject {tmp_path / 'none'} cannot be used"
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [["--intent", "destroy"], ["--preset", "casual"], ["--engine", "x=y"]])
def test_what_certify_would_refuse_is_an_error(cli, demo_model: Path, option: list[str]) -> None:
    result = cli("doctor", "--baseline", str(demo_model), "--subject", str(demo_model), *option)
    assert result.exit_code == 1 and result.stdout.startswith("ERROR: [INVARLOCK:D020]")
