"""Streams that are closed or full, users without a home, folders without room: a typed line and an honest exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from invarlock.cli.console import inert
from invarlock.cli.errors import report_error
from invarlock.core import files

from .conftest import Cli

INVARLOCK = str(Path(sys.executable).parent / "invarlock")
FROZEN = Path(__file__).parents[1] / "assets/certificates/pass_8bit.json"


def _shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", f"{INVARLOCK} {command}"], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "code", "error"),
    [
        ("version >&-", 0, ""),
        ("version 2>&-", 0, ""),
        ("verify nowhere >&- 2>&-", 2, ""),
        ("verify nowhere 2>/dev/full", 2, ""),
        ("version >/dev/full", 5, "ERROR [FILE] standard output takes no more"),
        ("doctor --json >/dev/full", 5, "ERROR [FILE] standard output takes no more"),
    ],
)
def test_a_stream_that_is_closed_or_full_does_not_change_the_verdict(command: str, code: int, error: str) -> None:
    done = _shell(command)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(error) and done.stderr.count("\n") == bool(error)


@pytest.mark.slow
def test_names_do_not_act_on_a_terminal(cli: Cli, tmp_path: Path) -> None:
    odd = tmp_path / "a\x1b[31m\u202ered"
    odd.write_text(FROZEN.read_text(encoding="utf-8"), encoding="utf-8")
    for result in (cli("verify", str(odd)), cli("report", "validate", str(odd)), cli("verify", f"{odd}-not")):
        assert "\x1b" not in result.output and "\u202e" not in result.output
        assert r"a\u001b[31m\u202ered" in result.output
    assert inert("wörter 日本 \t\n") == "wörter 日本 \t\n"


def test_a_name_of_thousands_of_characters_leaves_a_line_that_can_be_read(cli: Cli) -> None:
    result = cli("verify", "x" * 5000, "--json")
    assert len(result.stderr) < 1300 and result.stderr.count("\n") == 1 and json.loads(result.stdout)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "/x"), "ERROR [FILE] /x: Permission denied; expected a place that"),
        (OSError(28, "No space left on device"), "ERROR [FILE] a file or folder: No space left on device"),
        (MemoryError(), "ERROR [MEMORY] there is not enough memory"),
    ],
)
def test_what_the_system_refuses_is_typed(capsys, error: BaseException, line: str) -> None:
    assert report_error(error) == 5
    assert capsys.readouterr().err.startswith(line)


def test_a_user_without_a_home_has_the_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(files.os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    assert files.home() == tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["init", "-o", "{file}/x.yaml"],
        ["report", "html", "{cert}", "-o", "{file}/x.html"],
        ["report", "html", "{cert}", "-o", "{folder}"],
        ["report", "--compare", "{cert}", "-o", "{file}/x"],
        ["diff", "a", "b", "--html", "{file}/x.html"],
        ["bisect", "--baseline", "a", "--subject", "b", "--out", "{file}/x"],
        ["bisect", "--baseline", "a", "--subject", "b", "--out", "{folder}", "--repair", "{file}/x"],
        ["sensitivity", "--model", "a", "--html", "{file}/x.html"],
        ["calibrate", "null-sweep", "-c", "a.yaml", "--out", "{file}/x"],
        ["baseline", "make", "a", "-o", "{file}/x"],
        ["demo", "--out", "{file}/x"],
    ],
)
def test_a_place_that_cannot_be_written_is_found_first_and_ends_with_2(
    cli: Cli, tmp_path: Path, command: list[str]
) -> None:
    places = {"file": tmp_path / "file", "folder": tmp_path / "folder", "cert": FROZEN}
    places["file"].touch()
    places["folder"].mkdir()
    result = cli(*(part.format(**places) for part in command))
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert "cannot be written" in result.stderr and "name another" in result.stderr


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_is_named(cli: Cli, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    assert "Permission denied" in cli("init", "-o", str(tmp_path / "x.yaml")).stderr
