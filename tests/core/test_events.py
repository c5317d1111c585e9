"""The event log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from invarlock.core.events import EventLog, redact


def test_events_are_one_json_object_a_line_as_they_happen(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "events.jsonl"
    log = EventLog(path, run_id="r1")
    log.log("prepare", "start", size=3, ratio=np.float64(0.5), bad=float("nan"))
    lines = path.read_text().splitlines()  # before close: an aborted run keeps its log
    log.close()
    entry = json.loads(lines[0], parse_constant=pytest.fail)
    assert entry.pop("ts") > 0
    assert entry == {"run_id": "r1", "phase": "prepare", "event": "start", "size": 3, "ratio": 0.5, "bad": None}


def test_a_second_run_appends(tmp_path: Path) -> None:
    for run_id in ("a", "b"):
        log = EventLog(tmp_path / "events.jsonl", run_id=run_id)
        log.log("run", "x")
        log.close()
    assert [json.loads(line)["run_id"] for line in (tmp_path / "events.jsonl").read_text().splitlines()] == ["a", "b"]


def test_without_a_path_events_are_kept_in_memory() -> None:
    log = EventLog()
    log.log("run", "x")
    log.close()
    log.log("run", "y")
    assert [event["event"] for event in log.events] == ["x", "y"]


@pytest.mark.parametrize(
    "value",
    [
        {"hf_token": "abc"},
        {"api_key": "abc"},
        {"API-KEY": "abc"},
        {"password": 12345},
        {"private_key": ["abc", "def"]},
        {"credentials": {"user": "abc", "pin": "def"}},
        {"nested": [{"client_secret": "abc"}]},
        {"message": "used hf_abcdefghijkl to log in"},
        {"message": "header Authorization: Bearer abcdef.ghi"},
        {"message": "sk-abcdefgh1234 is mine"},
        {"message": "github_pat_abcdefgh12"},
        {"message": "ghp_abcdefgh12"},
        {"url": "https://abc:def@example.org/x"},
    ],
)
def test_secrets_are_redacted_by_key_and_by_shape(value: dict[str, Any]) -> None:
    shown = json.dumps(redact(value))
    assert "[redacted]" in shown
    assert not any(part in shown.replace("api", "") for part in ("abc", "def", "12345"))


@pytest.mark.parametrize(
    "value",
    [{"tokens": 12}, {"message": "the tokenizer differs"}, {"path": "a/b"}, {"passed": True}, {"hub_token": None}],
)
def test_what_is_no_secret_stays(value: dict[str, Any]) -> None:
    assert redact(value) == value
