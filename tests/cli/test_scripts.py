"""What a script relies on: one object on stdout under --json whatever happens, honest exit codes, early signals, pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from certification import CertifyOutcome
from invarlock.policy.presets import PRESETS
from invarlock.reporting.bundle import write_bundle

from .conftest import Cli

INVARLOCK = str(Path(sys.executable).parent / "invarlock")
SCHEMAS = json.loads(resources.files("invarlock.data").joinpath("envelopes.schema.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("arguments", "kind", "code", "exit_code"),
    [
        (["nothing", "--json"], "error", "USAGE", 2),
        (["certify", "--json"], "error", "USAGE", 2),
        (["certify", "--subject", "{model}", "--json", "--baseline", "/no/such"], "error", "MODEL-LOAD", 5),
        (["certify", "--subject", "{model}", "--json"], "error", "CONFIG", 2),
        (["run", "-c", "/no/such.yaml", "--json"], "error", "CONFIG", 2),
        (["doctor", "--profile", "nightly", "--json"], "error", "USAGE", 2),
        (["plugins", "guards", "--explain", "no_such", "--json"], "error", "CONFIG", 2),
    ],
)
def test_an_error_is_one_object_on_stdout_and_one_line_on_stderr(
    arguments: list[str], kind: str, code: str, exit_code: int, cli: Cli, demo_model: Path, tmp_path: Path
) -> None:
    given = [part.format(model=demo_model) for part in arguments]
    given += ["--cert-out", str(tmp_path / "cert")] if given[0] == "certify" else []
    result = cli(*given)
    shown = json.loads(result.stdout)
    Draft202012Validator(SCHEMAS["error-v1"]).validate(shown)
    assert (shown["kind"], shown["code"], shown["exit_code"], result.exit_code) == (kind, code, exit_code, exit_code)
    assert shown["message"] in result.stderr and result.stderr.count("\n") == result.stdout.count("\n") == 1


def test_a_verdict_says_that_it_is_one(cli: Cli, passed: CertifyOutcome, tmp_path: Path) -> None:
    write_bundle(passed.certificate, tmp_path)
    assert json.loads(cli("verify", str(tmp_path), "--json").stdout)["kind"] == "verdict"
    assert json.loads(cli("verify", str(tmp_path / "none"), "--json").stdout)["kind"] == "error"


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", [[], ["certify"], ["report", "explain"], ["calibrate", "null-sweep"]])
def test_help_has_its_short_form_everywhere(cli: Cli, command: list[str], flag: str) -> None:
    result = cli(*command, flag)
    assert result.exit_code == 0 and "-h, --help" in result.stdout


def test_the_version_is_a_flag_too(cli: Cli) -> None:
    from invarlock import __version__

    result = cli("--version")
    assert (result.exit_code, result.stdout) == (0, f"invarlock {__version__}\n")


@pytest.mark.slow
def test_a_shell_completes_commands_and_options() -> None:
    def complete(words: str) -> str:
        asked = {"_INVARLOCK_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = subprocess.run([INVARLOCK], env={**os.environ, **asked}, capture_output=True, text=True, check=False)
        return done.stdout

    assert complete("invarlock cer").split() == ["certify"]
    assert "--subject" in complete("invarlock certify --su").split()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("pass", 0), ("fail", 1)])
def test_a_pipe_that_closes_early_keeps_the_exit_code(
    name: str, code: int, passed: CertifyOutcome, failed: CertifyOutcome, tmp_path: Path
) -> None:
    write_bundle({"pass": passed, "fail": failed}[name].certificate, tmp_path)
    shell = f"set -o pipefail; {INVARLOCK} report explain {tmp_path} | true; {INVARLOCK} verify {tmp_path} | true"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.2, 0.5, 1.0, 2.0])
def test_ctrl_c_ends_with_130_and_a_line_whenever_it_comes(after: float, demo_model: Path, tmp_path: Path) -> None:
    arguments = ["certify", "--baseline", demo_model, "--subject", demo_model, "--cert-out", tmp_path / "c"]
    program = [INVARLOCK, *map(str, arguments), "--out", str(tmp_path / "runs")]
    with subprocess.Popen(program, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    if process.returncode == -signal.SIGINT:  # the interpreter had not come to us yet; a shell says 130 of this too
        assert "invarlock/" not in error.replace("bin/invarlock", ""), error
    else:
        assert (process.returncode, "Traceback" in error, "interrupted" in error) == (130, False, True), error
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("name", PRESETS)
def test_packaged_presets_go_by_their_name_and_init_writes_them(cli: Cli, name: str, tmp_path: Path) -> None:
    listed = cli("certify", "--preset", "list")
    assert listed.exit_code == 0 and [line.split()[0] for line in listed.stdout.splitlines()] == list(PRESETS)
    target = tmp_path / "mine.yaml"
    assert cli("init", name, "-o", str(target)).exit_code == 0
    assert target.read_text(encoding="utf-8").count("#") > 5
    again = cli("init", name, "-o", str(target))
    assert again.exit_code == 2 and "is there already" in again.stderr


def test_a_preset_that_is_neither_a_file_nor_packaged_is_named(cli: Cli, tmp_path: Path) -> None:
    result = cli(
        "certify", "--subject", "s", "--baseline", "b", "--preset", "casual", "--cert-out", str(tmp_path / "c")
    )
    assert result.exit_code == 2 and "did you mean 'causal'?" in result.stderr
