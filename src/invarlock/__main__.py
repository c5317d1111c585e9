"""`invarlock` and `python -m invarlock`: the first moments, before anything that takes time is imported.

Ctrl-C ends the process with 130 and one line from here on, and on a terminal the long commands say at once that they
have begun.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

__all__ = ["main"]

_LONG = {"certify", "run", "demo", "calibrate"}  # commands that first import torch


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\r\x1b[K" if os.isatty(2) else b"")
    os.write(2, b"interrupted; nothing was begun\n")
    os._exit(130)


def main() -> None:
    """Run the command line and exit the process."""
    signal.signal(signal.SIGINT, _leave)  # until the command's own, which cleans up
    asks = {"-h", "--help", "--json"} & set(sys.argv)
    if sys.argv[1:2] and sys.argv[1] in _LONG and not asks and os.isatty(2) and not os.environ.get("INVARLOCK_MINIMAL"):
        os.write(2, f"{sys.argv[1]}: starting ...".encode())  # no newline: what comes next takes its place
    from invarlock.cli.app import main as command_line

    command_line()


if __name__ == "__main__":
    main()
