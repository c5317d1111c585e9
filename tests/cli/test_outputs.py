"""Where certificates go: one folder a subject, never two runs in one, and no stale verdict after an error."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest

from certification import CertifyOutcome
from invarlock.core.exceptions import ConfigError
from invarlock.reporting.bundle import CERTIFICATE, EARLIER, claimed, folder_for, write_bundle

from .conftest import Cli


@pytest.mark.parametrize(
    ("subject", "label", "folder"),
    [
        ("./edited", None, "reports/edited"),
        ("/models/llama-8b-int4/", None, "reports/llama-8b-int4"),
        ("org/name", None, "reports/name"),
        ("./original", "rtn8", "reports/original-rtn8"),
        ("./original", "a/b", "reports/original-a-b"),
    ],
)
def test_the_default_folder_has_the_subjects_name(subject: str, label: str | None, folder: str) -> None:
    assert folder_for(subject, label) == Path(folder)


def test_this_folder_has_a_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert folder_for(".") == folder_for("../" + tmp_path.name) == Path("reports") / tmp_path.name


def test_an_earlier_certificate_is_out_of_its_place_when_the_next_run_ends_in_an_error(
    cli: Cli, passed: CertifyOutcome, demo_model: Path, tmp_path: Path
) -> None:
    write_bundle(passed.certificate, tmp_path / "cert")
    asked = ["--subject", str(demo_model), "--cert-out", str(tmp_path / "cert"), "--out", str(tmp_path / "runs")]
    result = cli("certify", "--baseline", str(tmp_path / "nowhere"), *asked)
    assert result.exit_code == 5
    assert [path.name for path in (tmp_path / "cert").iterdir()] == [EARLIER]
    (kept,) = (tmp_path / "cert" / EARLIER).iterdir()
    assert json.loads((kept / CERTIFICATE).read_text(encoding="utf-8")) == passed.certificate
    assert cli("verify", str(tmp_path / "cert")).exit_code == 2


def test_two_runs_cannot_share_a_folder(cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cert"
    with claimed(folder):
        result = cli("certify", "--baseline", "b", "--subject", str(demo_model), "--cert-out", str(folder))
        assert result.exit_code == 2 and result.stderr.startswith("ERROR [FOLDER-IN-USE] another run")
    assert not folder.exists()


def test_a_lock_that_a_killed_run_left_holds_nobody(tmp_path: Path) -> None:
    (tmp_path / ".invarlock.lock").touch()
    with claimed(tmp_path) as moved, pytest.raises(ConfigError, match="another run"), claimed(tmp_path):
        pass
    assert moved is None and not list(tmp_path.iterdir())
    handle = os.open(tmp_path / ".invarlock.lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    os.close(handle)  # as when its process dies
    with claimed(tmp_path):
        pass


@pytest.mark.parametrize("flag", ["--cert-out", "--out"])
def test_an_output_that_cannot_be_written_is_found_first(cli: Cli, demo_model: Path, tmp_path: Path, flag: str) -> None:
    file = tmp_path / "file"
    file.touch()
    places = {"--cert-out": tmp_path / "cert", "--out": tmp_path / "runs", flag: file / "below"}
    flags = [text for name, path in places.items() for text in (name, str(path))]
    result = cli("certify", "--baseline", "/no/such", "--subject", str(demo_model), *flags)
    assert result.exit_code == 2 and "name another" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_stored_runs_are_freed_and_nothing_else_below_their_folder(cli: Cli, tmp_path: Path) -> None:
    runs = tmp_path / "my runs"
    for name in ("source/20260101T000000000000Z", "edited/20260101T000000000001Z", "edited/kept", ".partial"):
        (runs / name).mkdir(parents=True)
        (runs / name / "report.json").write_text("{}")
    (runs / "notes.txt").write_text("mine")
    result = cli("cache", "clear", "--runs", str(runs))
    assert (result.exit_code, result.stdout) == (0, f"removed 3 runs (6 bytes) from {runs}\n")
    assert {str(path.relative_to(runs)) for path in runs.rglob("*")} == {
        "notes.txt",
        "edited",
        "edited/kept",
        "edited/kept/report.json",
    }
    assert json.loads(cli("cache", "clear", "--runs", str(tmp_path / "none"), "--json").stdout)["removed"] == 0


def test_a_repair_that_is_there_already_is_found_before_anything_is_searched(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mended").mkdir()
    (tmp_path / "mended" / "config.json").touch()
    places = ["--out", str(tmp_path / "found"), "--repair", str(tmp_path / "mended")]
    result = cli("bisect", "--baseline", str(tmp_path / "nowhere"), "--subject", "b", *places)
    assert "mended is there already" in result.stderr, result.output
