"""Files appear whole or not at all; temporary folders go away; what plugins hand in becomes plain."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from invarlock.core import files
from invarlock.core.exceptions import ConfigError
from invarlock.core.files import plain, private_folder, read_json, write_json, write_together, write_whole


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "report.json"
    write_whole(target, "old")

    def broken(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        write_whole(target, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert target.read_text() == "old"


def test_several_files_appear_together_or_none(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_together(tmp_path, {"a.txt": "fine", "b.txt": 7})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []
    write_together(tmp_path, {"a.txt": "1", "b.bin": b"2"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.bin"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"ratio": float("nan")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xfe"])
def test_unreadable_json_names_the_file_and_what_was_expected(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"report\.json.*expected a run's report"):
        read_json(path, "a run's report")
    with pytest.raises(ConfigError, match="is a folder"):
        read_json(tmp_path, "a run's report")


@pytest.mark.parametrize("ending", [None, KeyboardInterrupt, RuntimeError])
def test_private_folders_are_for_the_user_alone_and_removed_whatever_ends_them(
    tmp_path: Path, ending: type[BaseException] | None
) -> None:
    def use() -> None:
        with private_folder(tmp_path) as folder:
            assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
            (folder / "x").write_text("x")
            if ending is not None:
                raise ending

    if ending is None:
        use()
    else:
        with pytest.raises(ending):
            use()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("inf"), None),
        (np.float64("nan"), None),
        (np.int32(4), 4),
        (np.array([[1.0, np.nan]]), [[1.0, None]]),
        ((1, {2}), [1, [2]]),
        ({1: True}, {"1": True}),
        (Path("a") / "b", "a/b"),
        (object(), "<object>"),
        (len, "<built-in function len>"),
    ],
)
def test_plain_values_are_json_and_the_same_in_every_run(value: Any, expected: Any) -> None:
    assert plain(value) == expected


def test_plain_names_functions_without_their_address() -> None:
    assert plain({"progress": test_json_has_no_nan}) == {"progress": "<test_json_has_no_nan>"}
