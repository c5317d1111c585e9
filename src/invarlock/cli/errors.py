"""The one place where exceptions become a line on stderr and an exit code; `core.exceptions` holds the table of both."""

from __future__ import annotations

import re
import sys
import traceback

import typer

from invarlock.cli.console import clear_line, emit_json, inert, tell
from invarlock.core import settings
from invarlock.core.exceptions import CODES, ConfigError, DependencyError, InvarlockError, PairingCode, PairingError

__all__ = ["INTERRUPTED", "OTHER", "VERDICT_CODES", "exit_code", "report_error"]

#: exit code of a verdict
VERDICT_CODES = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 4}
INTERRUPTED = CODES["INTERRUPTED"][0]
OTHER = CODES["INVARLOCK"][0]

# typer may carry click within itself, so its classes are reached through the one that it exports
_UsageError, _ClickException = typer.BadParameter.__mro__[1:3]
_LONGEST = 1200  # characters of a line
#: the extra that brings an optional module, for imports that nothing checked beforehand
_EXTRAS = {
    "torch": "hf",
    "transformers": "adapters",
    "accelerate": "adapters",
    "tokenizers": "adapters",
    "datasets": "eval",
    "onnxruntime": "onnx",
    "onnx": "onnx",
    "bitsandbytes": "gpu",
    "compressed_tensors": "native",
    "torchao": "native",
    "gguf": "gguf",
}


def exit_code(error: BaseException, profile: str | None) -> int:
    """Return the exit code that an exception stands for. Pairing errors are a hard stop in the ci and release profiles."""
    if isinstance(error, PairingError) and not (profile or "ci").startswith(("ci", "release")):
        return OTHER
    own = [kind.code for kind in type(error).__mro__ if issubclass(kind, InvarlockError)]
    return next((CODES[code][0] for code in (_code(error), *own) if code in CODES), OTHER)


def _code(error: BaseException) -> str:
    if isinstance(error, InvarlockError):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        return "INTERRUPTED"
    known = ((_ClickException, "USAGE"), (MemoryError, "MEMORY"), (OSError, "FILE"))
    return next((code for kind, code in known if isinstance(error, kind)), type(error).__name__)


def report_error(error: BaseException, profile: str | None = None, *, json: bool = False) -> int:
    """Write one line about `error` to stderr, under INVARLOCK_DEBUG_TRACE its traceback too; return the exit code.

    With `json` the envelope `error-v1` goes to stdout as well, so that a script finds one object on every path.
    """
    code = exit_code(error, profile)
    if _wants_traceback():
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, ModuleNotFoundError) and (missing := str(error.name).partition(".")[0]) in _EXTRAS:
        error = DependencyError(missing, _EXTRAS[missing])
    line = _short(inert(_line(error)))
    clear_line()
    if json:
        message = re.sub(r"^(ERROR \[.*?\]|[A-Z-]+:) ", "", line)
        emit_json(format_version="error-v1", kind="error", code=_code(error), message=message, exit_code=code)
    tell(line)
    return code


def _wants_traceback() -> bool:
    try:
        return settings.flag("INVARLOCK_DEBUG_TRACE")
    except ConfigError:  # the variable itself is malformed; the error being reported may well say so
        return False


def _short(line: str) -> str:
    """Keep the beginning and the end of a line with a name of thousands of characters in it."""
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 300]} … {line[-280:]}"


def _line(error: BaseException) -> str:
    text, code = " ".join(str(error).split()), _code(error)
    if isinstance(error, DependencyError):
        return f"{code}: {text}"
    if code == "INTERRUPTED":
        return text or "interrupted; no certificate was written"
    if code == "USAGE":
        text = _usage(error)
    elif isinstance(error, OSError):
        text = _of_system(error)
    elif isinstance(error, MemoryError):
        text = "there is not enough memory; free some, or measure with smaller models: see `invarlock doctor --subject ...`"
    elif not isinstance(error, InvarlockError):
        text += "; set INVARLOCK_DEBUG_TRACE=1 for the traceback"
    return f"ERROR [{'INVARLOCK:' if code in list(PairingCode) else ''}{code}] {text}"


def _of_system(error: OSError) -> str:
    place = "a file or folder" if error.filename is None else " ".join(str(error.filename).split())
    why = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return f"{place}: {why}; expected a place that can be read and written: make it so, or name another"


def _usage(error: BaseException) -> str:
    message = " ".join(str(getattr(error, "format_message", lambda: error)()).split()).rstrip(".")
    message = message.replace(": Value error, ", ": ")
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", "invarlock")
    return f"{message}; see `{path} --help`"
