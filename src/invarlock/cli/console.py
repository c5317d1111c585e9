"""What the terminal shows: results on stdout, everything else on stderr, decoration only where a person looks."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from invarlock.core import settings

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "Tick",
    "emit_json",
    "is_terminal",
    "note",
    "progress",
    "say",
    "setup_logging",
    "show_telemetry",
    "show_timings",
    "stdout_console",
]

#: what long work calls to show how far it is: what it does, how much is done, how much there is
Tick = Callable[[str, int, int], None]


def is_terminal(stream: TextIO) -> bool:
    """Return whether a person looks at the stream, so that colour and movement help."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def stdout_console() -> Console:
    """Return a rich console on stdout: styled on a terminal without NO_COLOR, plain and unwrapped otherwise."""
    from rich.console import Console

    plain = not is_terminal(sys.stdout)
    return Console(highlight=False, soft_wrap=plain, no_color=plain or "NO_COLOR" in os.environ)


def say(text: str = "") -> None:
    """Write one line to stdout as it is."""
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """Write one line to stderr; INVARLOCK_MINIMAL silences it."""
    if not settings.flag("INVARLOCK_MINIMAL"):
        sys.stderr.write(text + "\n")


def show_timings(timings: Mapping[str, float]) -> None:
    """Write how long each step took, in seconds."""
    for name, seconds in timings.items():
        say(f"  {name:<16} {seconds:8.2f} s")


def show_telemetry(timings: Mapping[str, float], measuring: Iterable[str], tokens: int) -> None:
    """Write one line to stderr: time in all, the largest memory this process had, and scored tokens a second.

    `measuring` names the steps in which the `tokens` were measured, in all.
    """
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    seconds = sum(timings.get(name, 0.0) for name in measuring)
    speed = f"{tokens / seconds:.0f} tokens/s" if tokens and seconds else "no tokens measured"
    steps = ", ".join(f"{name} {value:.2f} s" for name, value in timings.items())
    sys.stderr.write(f"TELEMETRY: {sum(timings.values()):.2f} s in all ({steps}); memory {memory:.0f} MB; {speed}\n")


def emit_json(value: Any) -> None:
    """Write exactly one JSON object on one line to stdout."""
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")


@contextmanager
def progress() -> Iterator[Tick]:
    """Give a function to call as work proceeds; it draws bars on stderr where that is a terminal, else does nothing.

    Work under the same description moves one bar; a new description starts a new one.
    """
    if not is_terminal(sys.stderr) or settings.flag("INVARLOCK_MINIMAL"):
        yield lambda description, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

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
