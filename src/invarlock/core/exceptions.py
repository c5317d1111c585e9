"""Every error that InvarLock raises on purpose.

    InvarlockError
    ├── ConfigError           a setting, flag or file of settings is wrong            exit 2
    ├── DependencyError       an optional extra is missing           DEPENDENCY-MISSING  exit 1
    ├── ModelLoadError        a checkpoint cannot be read
    │   └── CheckpointDamagedError   it reads, but its tensors are damaged; names them
    ├── AdapterError          an adapter cannot do what it was asked
    ├── EditError             an edit cannot be applied
    ├── GuardError            a guard broke its contract or raised
    ├── DataError             evaluation text is missing, malformed or too little
    │   └── TooLittleTextError    there is text, but not enough; `fits` says what would do
    ├── PairingError          the two sides were not measured on the same windows   Ennn  exit 3
    ├── CertificateError      a certificate does not follow the schema, or cannot be made  exit 2
    ├── NetworkError          the network was needed and is not allowed
    └── RunInterruptedError        the run was stopped before it ended

A message is one line: what was got, what was expected, what to do. `code` is set where the contract gives one.
Only the command line turns errors into exit codes.
"""

from __future__ import annotations

__all__ = [
    "AdapterError",
    "CertificateError",
    "CheckpointDamagedError",
    "ConfigError",
    "DataError",
    "DependencyError",
    "EditError",
    "GuardError",
    "InvarlockError",
    "ModelLoadError",
    "NetworkError",
    "PairingError",
    "RunInterruptedError",
    "TooLittleTextError",
]


class InvarlockError(Exception):
    """Root of the tree; `code` is a stable label such as `E001` or `DEPENDENCY-MISSING`, or None."""

    code: str | None = None

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class ConfigError(InvarlockError):
    """A setting, flag or file of settings is wrong."""


class DependencyError(InvarlockError):
    """An optional extra is missing; the message holds the exact install command."""

    code = "DEPENDENCY-MISSING"

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f'{what} needs the extra "{extra}", which is not installed: pip install "invarlock[{extra}]"')
        self.extra = extra


class ModelLoadError(InvarlockError):
    """A checkpoint cannot be read."""


class CheckpointDamagedError(ModelLoadError):
    """A checkpoint reads but must not be used; `findings` names every tensor at fault."""

    def __init__(self, message: str, findings: list[dict[str, object]]) -> None:
        super().__init__(message)
        self.findings = findings


class AdapterError(InvarlockError):
    """An adapter cannot do what it was asked."""


class EditError(InvarlockError):
    """An edit cannot be applied."""


class GuardError(InvarlockError):
    """A guard broke its contract or raised."""


class DataError(InvarlockError):
    """Evaluation text is missing, malformed or too little."""


class TooLittleTextError(DataError):
    """There is text, but not enough for the windows asked for; `fits` are the (preview, final) counts that would do."""

    def __init__(self, message: str, fits: tuple[int, int]) -> None:
        super().__init__(message)
        self.fits = fits


class PairingError(InvarlockError):
    """The two sides were not measured on the same windows."""


class CertificateError(InvarlockError):
    """A certificate does not follow the schema, or cannot be made from what was given."""


class NetworkError(InvarlockError):
    """The network was needed and is not allowed."""


class RunInterruptedError(InvarlockError):
    """The run was stopped before it ended."""
