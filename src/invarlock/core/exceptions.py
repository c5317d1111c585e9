"""Every error that InvarLock raises on purpose, its code and its exit code.

    InvarlockError
    ├── ConfigError           a setting, flag or file of settings is wrong            exit 2
    ├── DependencyError       an optional extra is missing           DEPENDENCY-MISSING  exit 5
    ├── ModelLoadError        a checkpoint cannot be read                               exit 5
    │   └── CheckpointDamagedError   it reads, but its tensors are damaged; names them
    ├── AdapterError          an adapter cannot do what it was asked
    ├── EditError             an edit cannot be applied
    ├── GuardError            a guard broke its contract or raised
    ├── DataError             evaluation text is missing, malformed or too little
    │   └── TooLittleTextError    there is text, but not enough; `fits` says what would do
    ├── PairingError          the two sides were not measured on the same windows   Ennn  exit 3
    ├── CertificateError      a certificate does not follow the schema, or cannot be made  exit 2
    ├── NetworkError          the network was needed and is not allowed
    ├── RankError             a process that measures together with this one is gone
    ├── EngineError           a served engine does not answer, or not what it was asked
    └── RunInterruptedError        the run was stopped before it ended                exit 130

A message is one line: what was got, what was expected, what to do. `CODES` says what each code means and with which
exit code a command ends; 5 where nothing else is said. 1 is a verdict, never an error.
Only the command line turns errors into exit codes.
"""

from __future__ import annotations

from enum import StrEnum

__all__ = [
    "CODES",
    "EXIT_CODES",
    "AdapterError",
    "CertificateError",
    "CheckpointDamagedError",
    "ConfigError",
    "DataError",
    "DependencyError",
    "EditError",
    "EngineError",
    "GuardError",
    "InvarlockError",
    "ModelLoadError",
    "NetworkError",
    "PairingCode",
    "PairingError",
    "RankError",
    "RunInterruptedError",
    "TooLittleTextError",
]

#: what the exit code of a command means
EXIT_CODES: dict[int, str] = {
    0: "pass",
    1: "FAIL: the subject must not ship, an edit was taken back, a certificate does not hold, two checkpoints differ, no "
    "repair passes, or doctor found an error",
    2: "wrong usage, configuration or schema; of diff, any trouble",
    3: "hard stop in ci and release: the two sides cannot be compared",
    4: "inconclusive",
    5: "any other error: something could not be read or run",
    130: "interrupted",
}


class PairingCode(StrEnum):
    """Why two sides cannot be compared. Such an error ends a command with 3, or with 5 under the profile `dev`."""

    SCHEDULE = "E001"
    TOKENIZER = "E002"
    MASKS = "E003"
    PROVIDER = "E004"
    WINDOWS = "E006"


#: code of an error -> exit code of the command that it ends, and what it means
CODES: dict[str, tuple[int, str]] = {
    "E001": (3, "The schedule differs or cannot be met: counts, lengths, metric, or too little text for the floor"),
    "E002": (3, "The tokenizers differ"),
    "E003": (3, "The same windows have other masks or another number of scored tokens"),
    "E004": (3, "A side has no digest of its data"),
    "E006": (3, "The window ids differ"),
    "PAIRING": (3, "The two sides were not measured on the same windows"),
    "USAGE": (2, "The command line is wrong"),
    "CONFIG": (2, "A setting, flag or file of settings is wrong"),
    "FOLDER-IN-USE": (2, "Another run is writing into the folder that was named for the certificate"),
    "CERTIFICATE": (2, "A certificate does not follow the schema, or cannot be made"),
    "DEPENDENCY-MISSING": (5, "An optional extra is missing"),
    "MODEL-LOAD": (5, "A checkpoint cannot be read"),
    "UNSUPPORTED-FORMAT": (5, "A checkpoint is stored in a form that is not read: neither damage nor a verdict"),
    "CHECKPOINT-DAMAGED": (5, "A checkpoint reads, but its tensors are damaged"),
    "ADAPTER": (5, "An adapter cannot do what it was asked"),
    "EDIT": (5, "An edit cannot be applied"),
    "GUARD": (5, "A guard broke its contract or raised"),
    "DATA": (5, "Evaluation text is missing or malformed"),
    "TOO-LITTLE-TEXT": (5, "There is text, but not enough"),
    "NETWORK": (5, "The network was needed and is not allowed"),
    "ENGINE-UNREACHABLE": (5, "A served engine does not answer"),
    "ENGINE-REFUSED": (5, "A served engine refuses the request, or its answer cannot be read"),
    "ENGINE-TRUNCATED": (5, "A served engine answers for fewer tokens than it was sent"),
    "ENGINE-TOKENS": (5, "A served engine answers for other tokens than it was sent: it adds, drops or changes some"),
    "ENGINE-VOCABULARY": (5, "The token ids of a served engine mean other tokens than the baseline's tokenizer says"),
    "ENGINE-UNNORMALISED": (5, "The probabilities that a served engine tells are none: they do not sum"),
    "ENGINE-SHIFTED": (5, "A served engine tells the distribution of another token than the one asked for: off by one"),
    "ENGINE-INCONSISTENT": (5, "A served engine's answer for a prompt is not what it says comes next"),
    "ENGINE-UNSTABLE": (5, "A served engine answers the same question differently"),
    "RANK-LOST": (5, "A process that measures together with this one is gone or does not answer"),
    "FILE": (5, "A file or folder cannot be read or written: the system says why"),
    "MEMORY": (5, "There is not enough memory"),
    "INTERRUPTED": (130, "The run was stopped before it ended"),
    "INVARLOCK": (5, "Any other error of ours"),
}


class InvarlockError(Exception):
    """Root of the tree; `code` is a key of `CODES`."""

    code: str = "INVARLOCK"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class ConfigError(InvarlockError):
    """A setting, flag or file of settings is wrong."""

    code = "CONFIG"


class DependencyError(InvarlockError):
    """An optional extra is missing; the message holds the exact install command."""

    code = "DEPENDENCY-MISSING"

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f'{what} needs the extra "{extra}", which is not installed: pip install "invarlock[{extra}]"')
        self.extra = extra


class ModelLoadError(InvarlockError):
    """A checkpoint cannot be read."""

    code = "MODEL-LOAD"


class CheckpointDamagedError(ModelLoadError):
    """A checkpoint reads but must not be used; `findings` names every tensor at fault."""

    code = "CHECKPOINT-DAMAGED"

    def __init__(self, message: str, findings: list[dict[str, object]]) -> None:
        super().__init__(message)
        self.findings = findings


class AdapterError(InvarlockError):
    """An adapter cannot do what it was asked."""

    code = "ADAPTER"


class EditError(InvarlockError):
    """An edit cannot be applied."""

    code = "EDIT"


class GuardError(InvarlockError):
    """A guard broke its contract or raised."""

    code = "GUARD"


class DataError(InvarlockError):
    """Evaluation text is missing, malformed or too little."""

    code = "DATA"


class TooLittleTextError(DataError):
    """There is text, but not enough for the windows asked for; `found` says how much, and `fits` are the (preview, final)
    counts that would do."""

    code = "TOO-LITTLE-TEXT"

    def __init__(self, found: str, advice: str, fits: tuple[int, int]) -> None:
        super().__init__(f"{found}: {advice}")
        self.found, self.fits = found, fits


class PairingError(InvarlockError):
    """The two sides were not measured on the same windows; `code` says how they differ."""

    code = "PAIRING"


class CertificateError(InvarlockError):
    """A certificate does not follow the schema, or cannot be made from what was given."""

    code = "CERTIFICATE"


class NetworkError(InvarlockError):
    """The network was needed and is not allowed."""

    code = "NETWORK"


class EngineError(InvarlockError):
    """A served engine does not answer, or not what it was asked; the code says which."""

    code = "ENGINE-REFUSED"


class RankError(InvarlockError):
    """A process that measures together with this one is gone or does not answer."""

    code = "RANK-LOST"


class RunInterruptedError(InvarlockError):
    """The run was stopped before it ended."""

    code = "INTERRUPTED"
