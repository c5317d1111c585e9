"""Record what the command prints into `docs/user-guide/terminal.md`: `python tools/sessions.py`.

Each session runs the installed command for real, on a terminal of 80 or 120 columns or without one. With `--check`
nothing is written: the sessions are recorded anew and must say what the page says. Figures, times and the moments at which
progress was drawn may differ from machine to machine; words, lines of other kinds, colours and exit codes may not.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path
from typing import NamedTuple

__all__ = ["PAGE", "SESSIONS", "main"]

PAGE = Path(__file__).resolve().parents[1] / "docs/user-guide/terminal.md"
_REGION = re.compile(r"(<!-- session: ([\w-]+) -->\n\n).*?(\n<!-- /session -->)", re.DOTALL)
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_FRAMES = re.compile(r"\r\x1b\[2?K|\x1b\[\?25[lh]")  # between these stands what is drawn over
_BAR = "━"
_QUICK = "dataset: {provider: python_docs, seq_len: 64}\n"
_SUBJECTS = """
import sys
from pathlib import Path

from invarlock.adapters import HF_Causal_Adapter
from invarlock.edits import RTNQuantEdit

adapter = HF_Causal_Adapter()
for bits in (8, 2):
    model = adapter.load_model(sys.argv[1], device="cpu")
    RTNQuantEdit(bitwidth=bits).apply(model, adapter)
    adapter.save(model, Path(f"demo-{bits}bit"))
    adapter.tokenizer(sys.argv[1]).save_pretrained(f"demo-{bits}bit")
"""


class Session(NamedTuple):
    """A command, how wide its terminal is (None: it has none), what its environment adds, and whether it shows colour."""

    command: str
    columns: int | None = None
    environment: tuple[tuple[str, str], ...] = ()
    coloured: bool = False


SESSIONS = {
    "pass-80": Session(
        "invarlock certify --baseline original --subject demo-8bit --preset quick.yaml --profile dev", 80, (), True
    ),
    "fail-120": Session(
        "invarlock certify --baseline original --subject demo-2bit --preset quick.yaml --profile dev", 120, (), True
    ),
    "no-colour": Session("invarlock verify reports/demo-2bit", 80, (("NO_COLOR", "1"),)),
    "error-80": Session("invarlock certify --baseline orginal --subject demo-8bit", 80),
    "ci": Session("invarlock certify --baseline original --subject demo-8bit --preset quick.yaml --profile dev"),
    "pipe": Session("invarlock report explain reports/demo-2bit | head -n 8"),
}  # fmt: skip


def _on_a_terminal(session: Session, folder: Path, environment: dict[str, str]) -> tuple[str, int]:
    """Run a command with all three streams on a terminal; return what it wrote there, escapes included, and its exit code."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, session.columns or 80, 0, 0))
    process = subprocess.Popen(
        shlex.split(session.command), cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux says so where all others have closed it
            break
        if not part:
            break
        written += part
    os.close(ours)
    return written.decode("utf-8").replace("\r\n", "\n"), process.wait()


def _record(session: Session, folder: Path) -> str:
    """Run a session; return what a reader is shown of it. Raises SystemExit where colour is not where it should be."""
    scripts = str(Path(sys.executable).parent)
    kept = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR", "CI")}
    environment = {
        **kept, "PATH": scripts + os.pathsep + os.environ["PATH"], "TERM": "xterm-256color", "INVARLOCK_CACHE": "off",
        **dict(session.environment),
    }  # fmt: skip
    if session.columns:
        raw, code = _on_a_terminal(session, folder, environment)
    else:
        command = ["bash", "-o", "pipefail", "-c", session.command]
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        raw, code = done.stdout, done.returncode
    if ("\x1b[1;3" in raw) != session.coloured or (session.columns is None and "\x1b" in raw):
        raise SystemExit(f"{session.command}: colour is {'missing' if session.coloured else 'there'}")
    shown = "\n".join([*_frames(raw), _settled(raw)]).strip("\n")
    return f"```text\n$ {session.command}\n{shown}\n$ echo $?\n{code}\n```\n"


def _frames(raw: str) -> list[str]:
    """Return the line of progress as it stood at the end of every step."""
    drawn = [_ESCAPES.sub("", part).strip("\r\n") for part in _FRAMES.split(raw)]
    last: dict[str, str] = {}
    for line in drawn:
        if _BAR in line and "\n" not in line:
            step = line.partition(_BAR)[0].strip("-\\|/╸╺ ")
            last[step] = "- " + line.strip("-\\|/ ")
    return list(last.values())


def _settled(raw: str) -> str:
    """Return what stays on the screen."""
    settled = re.sub(r"[^\n]*(?:\n\r\x1b\[1A|\r)\x1b\[2?K", "", raw).replace("\r", "")
    return "\n".join(line for line in _ESCAPES.sub("", settled).strip("\r\n").split("\n") if _BAR not in line)


def recorded() -> dict[str, str]:
    """Record every session in one working folder; return the block of each."""
    from importlib import resources

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "original").symlink_to(str(resources.files("invarlock.data").joinpath("demo_model")))
        (folder / "quick.yaml").write_text(_QUICK, encoding="utf-8")
        subprocess.run([sys.executable, "-c", _SUBJECTS, "original"], cwd=folder, check=True, capture_output=True)
        return {name: _record(session, folder) for name, session in SESSIONS.items()}


def _said(block: str) -> list[str]:
    """Return what two recordings must share: all words, without figures, line breaks and moments of progress."""
    lines = [
        line
        for line in block.splitlines()
        if _BAR not in line and not line.startswith(("certify: measuring", "certify: reading", "certify: looking"))
    ]
    text = re.sub(r"(, [\d,]+ tokens/s, about \d+ \w+ left)", "", "\n".join(lines))
    return re.sub(r"\d[\d.,]*(e-?\d+)?", "0", text).split()


def main() -> int:
    """Write the page, or with --check compare it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where a session says something else now"
    )
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    stored = {match[2]: match[0] for match in _REGION.finditer(page)}
    if stored.keys() != SESSIONS.keys():
        raise SystemExit(f"{PAGE.name} has the sessions {', '.join(stored)}; expected {', '.join(SESSIONS)}")
    made = recorded()
    if not check:
        PAGE.write_text(_REGION.sub(lambda match: match[1] + made[match[2]] + match[3], page), encoding="utf-8")
        return 0
    frame = "<!-- session: {0} -->\n\n{1}\n<!-- /session -->"
    stale = [name for name, block in made.items() if _said(stored[name]) != _said(frame.format(name, block))]
    for name in stale:
        print(f"session {name} says something else now: run python tools/sessions.py\n{made[name]}")
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
