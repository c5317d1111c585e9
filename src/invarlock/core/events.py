"""The event log: one JSON object a line, secrets redacted, flushed line by line so that an aborted run keeps its log."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any, TextIO

from invarlock.core.files import plain

__all__ = ["EventLog", "redact"]

_SECRET_KEY = re.compile(
    r"token$|secret|passw(or)?d|passphrase|(api|access|private)[_-]?key|authorization|credential", re.IGNORECASE
)
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{8,}|gh[pousr]_[A-Za-z0-9]{8,}|github_pat_\w{8,}|AKIA[A-Z0-9]{12,})"
    r"|(?<=Bearer )\S+|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_HIDDEN = "[redacted]"


def redact(value: object, key: str = "") -> Any:
    """Return a JSON-ready copy of `value` without secrets: by key name, and by the shape of common access tokens."""
    value = plain(value)
    if value is not None and not isinstance(value, bool) and _SECRET_KEY.search(key):
        return _HIDDEN
    if isinstance(value, dict):
        return {k: redact(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [redact(item) for item in value]
    return _SECRET_VALUE.sub(_HIDDEN, value) if isinstance(value, str) else value


class EventLog:
    """Appends events to `path`; without a path it only keeps them. `events` holds them in order."""

    def __init__(self, path: Path | str | None = None, *, run_id: str = "") -> None:
        self.events: list[dict[str, Any]] = []
        self.run_id = run_id
        self._file: TextIO | None = None
        if path is not None:
            target = Path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            self._file = target.open("a", encoding="utf-8")

    def log(self, phase: str, event: str, **data: object) -> None:
        """Record that `event` happened in `phase`."""
        entry = {"ts": time.time(), "run_id": self.run_id, "phase": phase, "event": event, **redact(data)}
        self.events.append(entry)
        if self._file is not None:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file; logging afterwards only keeps events in memory."""
        if self._file is not None:
            self._file.close()
            self._file = None
