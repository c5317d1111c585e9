"""The one place where exceptions become a line on stderr and an exit code.

0  pass        1  failure       2  wrong schema, configuration or usage
3  hard stop in ci and release  4  inconclusive           130  interrupted
"""

from __future__ import annotations

import re
import sys
import traceback

import typer

from invarlock.core import settings
from invarlock.core.exceptions import (
    CertificateError,
    ConfigError,
    DependencyError,
    InvarlockError,
    PairingError,
    RunInterruptedError,
)

__all__ = ["EXIT_CODES", "INTERRUPTED", "exit_code", "report_error"]

#: exit code of a verdict
EXIT_CODES = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 4}
INTERRUPTED = 130

# typer may carry click within itself, so its classes are reached through the one that it exports
_UsageError, _ClickException = typer.BadParameter.__mro__[1:3]
_CONTRACT_CODE = re.compile(r"E\d{3}$")
_HARD_STOP = ("ci", "release")
#: the extra that brings an optional module, for imports that nothing checked beforehand
_EXTRAS = {
    "torch": "hf",
    "transformers": "adapters",
    "accelerate": "adapters",
    "tokenizers": "adapters",
    "datasets": "eval",
    "onnxruntime": "onnx",
    "bitsandbytes": "gpu",
    "gptqmodel": "gptq",
    "compressed_tensors": "awq",
    "gguf": "gguf",
}


def exit_code(error: BaseException, profile: str | None) -> int:
    """Return the exit code that an exception stands for. Pairing errors are a hard stop in the ci and release profiles."""
    if isinstance(error, (KeyboardInterrupt, RunInterruptedError)):
        return INTERRUPTED
    if isinstance(error, (ConfigError, CertificateError, _ClickException)):
        return 2
    if isinstance(error, PairingError) and (profile or "ci").startswith(_HARD_STOP):
        return 3
    return 1


def report_error(error: BaseException, profile: str | None = None) -> int:
    """Write one line about `error` to stderr, under INVARLOCK_DEBUG_TRACE its traceback too; return the exit code."""
    code = exit_code(error, profile)
    if _wants_traceback():
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, ModuleNotFoundError) and (missing := str(error.name).partition(".")[0]) in _EXTRAS:
        error = DependencyError(missing, _EXTRAS[missing])
    sys.stderr.write(_line(error) + "\n")
    return code


def _wants_traceback() -> bool:
    try:
        return settings.flag("INVARLOCK_DEBUG_TRACE")
    except ConfigError:  # the variable itself is malformed; the error being reported may well say so
        return False


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, DependencyError):
        return f"DEPENDENCY-MISSING: {text}"
    if isinstance(error, (KeyboardInterrupt, RunInterruptedError)):
        return text or "interrupted; no certificate was written"
    if isinstance(error, InvarlockError):
        code = error.code or _default_code(error)
        label = f"[INVARLOCK:{code}]" if _CONTRACT_CODE.match(code) else f"[{code}]"
        return f"ERROR {label} {text}"
    if isinstance(error, _ClickException):
        return f"ERROR [USAGE] {_usage(error)}"
    return f"ERROR [{type(error).__name__}] {text}; set INVARLOCK_DEBUG_TRACE=1 for the traceback"


def _default_code(error: InvarlockError) -> str:
    """Return the class name as a label: ModelLoadError becomes MODEL-LOAD."""
    name = type(error).__name__.removesuffix("Error")
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).upper()


def _usage(error: BaseException) -> str:
    message = " ".join(str(getattr(error, "format_message", lambda: error)()).split()).rstrip(".")
    message = message.replace(": Value error, ", ": ")
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", "invarlock")
    return f"{message}; see `{path} --help`"
