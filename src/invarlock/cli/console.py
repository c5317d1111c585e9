"""What the terminal shows: results on stdout, everything else on stderr, decoration only where a person looks."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from invarlock.core import settings
from invarlock.core.exceptions import InvarlockError
from invarlock.core.files import size_of
from invarlock.core.ranks import follows

__all__ = [
    "Tick",
    "clear_line",
    "coloured",
    "emit_json",
    "inert",
    "is_terminal",
    "mend_streams",
    "note",
    "progress",
    "quiet_pipe",
    "say",
    "setup_logging",
    "show",
    "tell",
    "width",
]

_PLAIN_SECONDS = 15.0  # between two lines where no terminal shows a bar
#: what long work calls to show how far it is: what it does, how much is done, how much there is
Tick = Callable[[str, int, int], None]


def is_terminal(stream: TextIO) -> bool:
    """Return whether a person looks at the stream, so that colour and movement help."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def inert(text: str) -> str:
    """Return text whose control and direction characters show as escapes, so that no name of a file acts on a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t\xa0" else json.dumps(c)[1:-1] for c in text)


def say(text: str = "", *, colour: bool = False) -> None:
    """Write one line to stdout, with `colour` its first word in its own. Where the reader has gone (`| head`) the rest is
    dropped and the work goes on."""
    with quiet_pipe():
        sys.stdout.write((coloured(inert(text)) if colour else inert(text)) + "\n")


#: how the word that a line begins with looks on a terminal
_COLOURS = {"PASS": 32, "SUCCESS": 32, "INTACT": 32, "FAIL": 31, "FAILED": 31, "ALTERED": 31, "ROLLBACK": 31,
            "INVALID": 31, "MISMATCH": 33, "INCONCLUSIVE": 33, "warning": 33, "next": 36}  # fmt: skip


def coloured(line: str) -> str:
    """Return the line with its first word in its colour, where stdout is a terminal and NO_COLOR is not set."""
    word = line.partition(" ")[0]
    if word not in _COLOURS or os.environ.get("NO_COLOR") or not is_terminal(sys.stdout):
        return line
    return f"\x1b[1;{_COLOURS[word]}m{word}\x1b[0m{line.removeprefix(word)}"


def width() -> int:
    """Return how wide text may be on stdout: the terminal's width within limits that read well, 80 elsewhere."""
    return max(40, min(120, shutil.get_terminal_size((80, 24)).columns))


@contextmanager
def quiet_pipe() -> Iterator[None]:
    """Send stdout to nowhere once its reader has gone, so that a command still ends with its own exit code. Where it takes
    no more for another reason (a full disk), what it should have shown is lost, and that is an error."""
    try:
        yield
    except OSError as error:
        # what is still buffered must not raise again when the interpreter exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            where = f"standard output takes no more ({error.strerror})"
            raise InvarlockError(f"{where}; expected room for the result: send it elsewhere", code="FILE") from None


def tell(text: str) -> None:
    """Write one line to stderr. Where that takes no more, nobody can be told, and the work goes on."""
    with contextlib.suppress(OSError):
        sys.stderr.write(inert(text) + "\n")
        sys.stderr.flush()


def mend_streams() -> None:
    """Give a process that was started without stdout or stderr (`>&-`) one that leads nowhere; a terminal that lacks a
    character shows a question mark."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for as long as the process lives
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="replace")


def note(text: str) -> None:
    """Write one line to stderr; INVARLOCK_MINIMAL silences it."""
    if not settings.flag("INVARLOCK_MINIMAL") and not follows():
        tell(text)


def emit_json(**fields: object) -> None:
    """Write exactly one JSON object on one line to stdout; `data/envelopes.schema.json` says what each holds."""
    say(json.dumps(fields, allow_nan=False))


def show(
    form: str,
    fields: Mapping[str, object],
    lines: Sequence[str],
    places: Mapping[str, Path | None],
    *,
    runs: Path,
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
        emit_json(format_version=form, kind="verdict", **fields, timings=timings, exit_code=code)
        return code
    for line in lines[:1] if settings.flag("INVARLOCK_MINIMAL") else lines:
        say(line, colour=True)
    for label, path in places.items():
        if path is not None:
            say(f"{label:<13}{path}")
    if not settings.flag("INVARLOCK_MINIMAL") and runs.is_dir():
        free = shlex.join(("invarlock", "cache", "clear", "--runs", str(runs)))
        say(f"{'Runs':<13}{runs}, {size_of(runs) / 1e6:.1f} MB in all; to free it: {free}")
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
    tell(f"TELEMETRY: {sum(timings.values()):.2f} s in all ({steps}); memory {memory:.0f} MB; {speed}")


class _Way:
    """How far a command is, over all the passes in which it measures, and how long the rest will take.

    `tick` hears of one step after the other; those that measure count tokens. The rest is told from the tokens per second
    so far, and from how long the first model took to load.
    """

    def __init__(self, passes: int) -> None:
        self.passes, self.finished = passes, 0
        self.step, self.done, self.total = "starting", 0, 0
        self.tokens, self.measuring, self.loading = 0, 0.0, 0.0  # in all: tokens, seconds measuring, seconds of a load
        self.since = time.monotonic()

    def tick(self, step: str, done: int, total: int) -> bool:
        """Take note; return whether a step began."""
        now, began = time.monotonic(), step != self.step or done < self.done
        spent, before = now - self.since, 0 if began else self.done
        measured, self.since = self.step.startswith("measuring"), now
        if began and measured:
            self.finished = min(self.finished + 1, self.passes - 1)
        if self.step.startswith("loading"):
            self.loading = self.loading or spent
        if step.startswith("measuring"):
            self.tokens += done - before
            self.measuring += spent if measured or done else 0.0
            self.total = total
        self.step, self.done = step, done
        return began

    @property
    def share(self) -> float:
        """The share of all tokens that is measured, from 0 to 1."""
        here = self.done if self.step.startswith("measuring") else 0
        return min(1.0, (self.finished + here / max(1, self.total)) / self.passes) if self.total else 0.0

    def rest(self) -> str:
        """Say how fast it is and how long it will take still; nothing before that can be told."""
        if not self.tokens or self.measuring < 0.5:
            return ""
        speed = self.tokens / self.measuring
        left = (1 - self.share) * self.total * self.passes / speed + self.loading * (self.passes - 1 - self.finished)
        minutes, seconds = divmod(round(left), 60)
        told = f"{minutes} min" if minutes > 2 else f"{60 * minutes + seconds} s"
        return f"{speed:,.0f} tokens/s, about {told} left"


@contextmanager
def progress(command: str, passes: int = 1) -> Iterator[Tick]:
    """Give a function to call as work proceeds. `passes`: how many times every window is measured.

    On a terminal there is one line with a bar for the whole way; elsewhere a plain line where a model is loaded, and
    every quarter of a minute. INVARLOCK_MINIMAL silences both.
    """
    way, terminal = _Way(passes), is_terminal(sys.stderr)
    if settings.flag("INVARLOCK_MINIMAL") or follows():
        yield lambda step, done, total: None
    elif not terminal:
        last = time.monotonic()

        def show_step(step: str, done: int, total: int) -> None:
            nonlocal last
            began = way.tick(step, done, total) and step.startswith("loading")
            if began or time.monotonic() - last > _PLAIN_SECONDS:
                last = time.monotonic()
                share = f"{way.share:.0%} of all" if way.share else ""
                tell(f"{command}: {', '.join(filter(None, (step, share, way.rest())))}")

        yield show_step
    else:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        texts = ("{task.description}", "{task.percentage:.0f}%", "{task.fields[rest]}")
        what, share, rest = map(TextColumn, texts)
        columns = (SpinnerColumn("line"), what, BarColumn(None), share, rest)
        clear_line()
        with Progress(*columns, console=Console(stderr=True), transient=True, expand=True) as bars:
            task = bars.add_task("starting", total=1.0, rest="")

            def draw(step: str, done: int, total: int) -> None:
                way.tick(step, done, total)
                bars.update(task, description=step, completed=way.share, rest=way.rest())

            yield draw


def clear_line() -> None:
    """Take away a line on the terminal that says that a command is at work; what follows stands in its place."""
    if sys.stderr is not None and is_terminal(sys.stderr):
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


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
