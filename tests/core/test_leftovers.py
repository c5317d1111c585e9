"""What a killed process left is removed at the next start; what has an owner, or none of ours, is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from invarlock.core.files import write_together
from invarlock.core.leftovers import find_leftovers, owned_folder, sweep
from invarlock.flow import doctor
from invarlock.flow.run_folder import staged_folder

_KILLED = """
import os, signal, sys
from pathlib import Path
from invarlock.core import files
from invarlock.core.files import private_folder, write_together, write_whole
from invarlock.flow.run_folder import staged_folder
out = Path(sys.argv[1])
with private_folder(), staged_folder(out / "name" / "run") as staging:
    write_whole(staging / "report.json", "{}")
    files.os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
    write_together(out / "cert", {"a": "1"})
"""


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a process was killed in the middle of writing three things; its temporary folder is beside it."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(_KILLED), str(tmp_path / "runs")], check=False)
    assert done.returncode == -signal.SIGKILL
    return tmp_path


@pytest.mark.slow
def test_what_a_killed_run_left_is_listed_and_swept(killed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(killed)
    listed = [finding.message for finding in doctor._leftovers(doctor.Request())]
    assert len(listed) == 3
    assert all("was killed" in line for line in listed)
    assert len(sweep(killed / "runs")) == 3
    left = [path.name for path in killed.rglob("*") if path.is_file() or path.name.startswith((".", "invarlock-"))]
    assert left == []


def test_what_has_an_owner_is_left_alone(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "a" / "run") as staging:
        (staging / "x").write_text("x")
        assert find_leftovers(tmp_path) == []
    assert (tmp_path / "a" / "run" / "x").is_file()


def test_a_lock_that_is_held_is_an_owner_whatever_the_name_says(tmp_path: Path) -> None:
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    ).stdout
    with owned_folder(tmp_path, ".staging-") as folder:
        other = folder.rename(tmp_path / f".staging-{gone.strip()}-abc")  # as the process of another container looks
        assert find_leftovers(tmp_path) == []
    assert find_leftovers(tmp_path) == [other]


@pytest.mark.parametrize("name", [".hidden.4000000-abc", "invarlock-notes", ".x.part", ".run.kept.part", "4000000-abc"])
def test_files_of_others_are_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert sweep(tmp_path) == []
    assert os.listdir(tmp_path) == [name]


def test_a_run_that_is_stopped_keeps_its_folder_where_asked_and_no_later_run_removes_it(tmp_path: Path) -> None:
    with pytest.raises(KeyError), staged_folder(tmp_path / "run", keep=True) as staging:
        (staging / "x").write_text("x")
        raise KeyError
    assert sweep(tmp_path) == []
    assert [path.name for path in tmp_path.rglob("x")] == ["x"]


def test_several_files_leave_nothing_beside_them(tmp_path: Path) -> None:
    write_together(tmp_path, {"a": "1"})
    assert os.listdir(tmp_path) == ["a"]
