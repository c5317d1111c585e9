"""What the terminal shows: results on stdout, everything else on stderr, decoration only where a person looks."""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from invarlock.core import settings

__all__ = [
    "Tick",
    "emit_json",
    "is_terminal",
    "note",
    "progress",
    "say",
    "setup_logging",
    "show",
]

#: what long work calls to show how far it is: what it does, how much is done, how much there is
Tick = Callable[[str, int, int], None]


def is_terminal(stream: TextIO) -> bool:
    """Return whether a person looks at the stream, so that colour and movement help."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def say(text: str = "") -> None:
    """Write one line to stdout as it is."""
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """Write one line to stderr; INVARLOCK_MINIMAL silences it."""
    if not settings.flag("INVARLOCK_MINIMAL"):
        sys.stderr.write(text + "\n")


def emit_json(**fields: object) -> None:
    """Write exactly one JSON object on one line to stdout; `data/envelopes.schema.json` says what each holds."""
    say(json.dumps(fields, allow_nan=False))


def show(
    form: str,
    fields: Mapping[str, object],
    lines: Sequence[str],
    places: Mapping[str, Path | None],
    *,
    notes: Iterable[str],
    timings: Mapping[str, float],
    measured: tuple[tuple[str, ...], int],
    code: int,
    json: bool,
    timing: bool,
    telemetry: bool = False,
) -> int:
    """Say how a command that measured models ended, and return its exit `code`.

    With `json` that is the envelope `form` with its `fields`; else `lines` (the first alone under INVARLOCK_MINIMAL) and
    the `places` of what was written. `measured` names the steps that scored windows, and the tokens in all.
    """
    for text in notes:
        note(f"NOTE: {text}")
    if telemetry or settings.flag("INVARLOCK_TELEMETRY"):
        _show_telemetry(timings, *measured)
    if json:
        emit_json(format_version=form, **fields, timings=timings, exit_code=code)
        return code
    for line in lines[:1] if settings.flag("INVARLOCK_MINIMAL") else lines:
        say(line)
    for label, path in places.items():
        if path is not None:
            say(f"{label:<13}{path}")
    for name, seconds in timings.items() if timing else ():
        say(f"  {name:<16} {seconds:8.2f} s")
    return code


def _show_telemetry(timings: Mapping[str, float], measuring: Iterable[str], tokens: int) -> None:
    """Write one line to stderr: time in all, the largest memory this process had, and scored tokens a second."""
    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    seconds = sum(timings.get(name, 0.0) for name in measuring)
    speed = f"{tokens / seconds:.0f} tokens/s" if tokens and seconds else "no tokens measured"
    steps = ", ".join(f"{name} {value:.2f} s" for name, value in timings.items())
    sys.stderr.write(f"TELEMETRY: {sum(timings.values()):.2f} s in all ({steps}); memory {memory:.0f} MB; {speed}\n")


@contextmanager
def progress() -> Iterator[Tick]:
    """Give a function to call as work proceeds; it draws bars on stderr where that is a terminal, else does nothing.

    Work under the same description moves one bar; a new description starts a new one.
    """
    if not is_terminal(sys.stderr) or settings.flag("INVARLOCK_MINIMAL"):
        yield lambda description, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def tick(description: str, done: int, total: int) -> None:
            if description not in tasks:
                tasks[description] = bars.add_task(description, total=total)
            bars.update(tasks[description], completed=done, total=total)

        yield tick


def setup_logging() -> None:
    """Send the library's log to stderr: warnings, or everything under INVARLOCK_DEBUG_TRACE. May be called again."""
    logger = logging.getLogger("invarlock")
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    if is_terminal(sys.stderr):
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_time=False, show_path=False)
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if settings.flag("INVARLOCK_DEBUG_TRACE") else logging.WARNING)
    logger.propagate = False
