"""Starting, helping, failing: what every command has in common."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest

from invarlock.cli import app as app_module
from invarlock.cli.app import COMMANDS

HEAVY = {"torch", "transformers", "datasets", "scipy", "matplotlib", "numpy", "pandas", "jinja2"}


def _imported(*arguments: str) -> set[str]:
    """The top-level packages that a command imports, from `-X importtime`."""
    command = [sys.executable, "-X", "importtime", "-m", "invarlock", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}


@pytest.mark.slow
@pytest.mark.parametrize(("argument", "too_much"), [("--help", HEAVY | {"pydantic"}), ("version", HEAVY)])
def test_starting_imports_nothing_heavy(argument: str, too_much: set[str]) -> None:
    assert not _imported(argument) & too_much


@pytest.mark.slow
def test_listing_plugins_imports_no_backend() -> None:
    assert not _imported("plugins") & {"torch", "transformers", "datasets", "scipy", "matplotlib"}


def test_help_fits_80_columns_and_names_every_command(script) -> None:
    shown = script("--help", COLUMNS="80").stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert [line.split()[0] for line in shown.partition("Commands:\n")[2].splitlines()] == list(COMMANDS)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_of_every_command_is_plain_and_fits(script, name: str) -> None:
    done = script(name, "--help", COLUMNS="80")
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert not set(done.stdout) & set("╭╰│─\x1b")


def test_bare_command_shows_help(script) -> None:
    done = script()
    assert (done.returncode, done.stdout.startswith("Usage: invarlock")) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["verson"], "ERROR [USAGE] no such command 'verson' (did you mean 'version'?); see `"),
        (["version", "--jsn"], "ERROR [USAGE] No such option: --jsn"),
        (["--nope"], "ERROR [USAGE] No such option: --nope"),
        (["plugins", "list", "nope"], "ERROR [USAGE] Invalid value for 'category': 'nope' is not one of"),
    ],
)
def test_wrong_usage_is_one_line_and_exits_2(cli, arguments: list[str], expected: str) -> None:
    result = cli(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(expected)
    assert result.stderr.count("\n") == 1


def test_malformed_variable_is_one_line_and_exits_2(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVARLOCK_DEBUG_TRACE", "perhaps")
    result = cli("version")
    assert result.exit_code == 2
    assert result.stderr == (
        "ERROR [CONFIG] environment variable INVARLOCK_DEBUG_TRACE is 'perhaps'; expected 1 or 0\n"
    )


def test_version_as_text_and_json(cli) -> None:
    from invarlock import __version__

    assert cli("version").stdout == f"invarlock {__version__} (certificate schema v1)\n"
    shown = cli("version", "--json").stdout
    assert shown.count("\n") == 1
    assert json.loads(shown) == {
        "version": __version__,
        "schema_version": "v1",
        "python": ".".join(map(str, sys.version_info[:3])),
    }


def test_version_names_the_schema_of_the_certificate_models(cli) -> None:
    schema = pytest.importorskip("invarlock.certificate.schema")
    declared = typing.get_args(schema.Certificate.model_fields["schema_version"].annotation)
    assert json.loads(cli("version", "--json").stdout)["schema_version"] in declared


@pytest.mark.slow
def test_network_is_closed_while_a_command_runs(tmp_path: Path) -> None:
    program = (
        "import socket, sys\n"
        "from invarlock.cli.app import app\n"
        "app(['version'], standalone_mode=False)\n"
        "socket.create_connection(('192.0.2.1', 80), timeout=1)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "the network is off; set INVARLOCK_ALLOW_NETWORK=1 to allow it" in done.stderr


@pytest.mark.slow
def test_light_import_refuses_torch() -> None:
    program = "from invarlock.cli.app import app\napp(['version'], standalone_mode=False)\nimport torch\n"
    environment = {**os.environ, "INVARLOCK_LIGHT_IMPORT": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError" in done.stderr


@pytest.mark.slow
def test_closed_pipe_ends_quietly() -> None:
    shell = f"{sys.executable} -m invarlock plugins list --json --show-unsupported | true"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_cleans_up_and_exits_130(tmp_path: Path, number: int) -> None:
    marker = tmp_path / "marker"
    program = (
        "import sys, time\n"
        "from invarlock.cli import app as a\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "a.COMMANDS['wait'] = a.Command('waiting:wait', 'Wait.')\n"
        "sys.argv = ['invarlock', 'wait']\n"
        "a.main()\n"
    )
    (tmp_path / "waiting.py").write_text(
        "import pathlib, time\n"
        "def wait() -> None:\n"
        f"    marker = pathlib.Path({str(marker)!r})\n"
        "    try:\n"
        "        marker.touch()\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        marker.unlink()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.strip().endswith("no certificate was written")
    assert stderr.count("\n") == 1
    assert not marker.exists()


def test_a_command_may_return_its_exit_code(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(app_module.COMMANDS, "four", app_module.Command(f"{__name__}:_four", "Four."))
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    assert cli("four").exit_code == 4


def _four() -> int:
    """Four."""
    return 4
