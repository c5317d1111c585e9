"""Every environment variable that InvarLock reads, declared once. The reference page is generated from `SETTINGS`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from invarlock.core.exceptions import ConfigError

__all__ = ["SETTINGS", "Kind", "Setting", "Value", "environment_flags", "flag", "get"]

Kind = Literal["bool", "int", "float", "str"]
Value = bool | int | float | str | None
_TRUTH = {**dict.fromkeys(("1", "true", "yes", "on"), True), **dict.fromkeys(("0", "false", "no", "off", ""), False)}


@dataclass(frozen=True)
class Setting:
    """One environment variable: its type, the value when it is unset, and what it does."""

    name: str
    kind: Kind
    default: Value
    meaning: str
    choices: tuple[str, ...] = ()
    secret: bool = False  # its value is never recorded
    minimum: float | None = None
    maximum: float = 1e6

    def parse(self, text: str) -> Value:
        """Turn the variable's text into its value; raises ConfigError with what was expected."""
        text = text.strip()
        if self.kind == "bool":
            if text.lower() not in _TRUTH:
                raise self._wrong(text, "1 or 0")
            return _TRUTH[text.lower()]
        if self.choices and text not in self.choices:
            raise self._wrong(text, " or ".join(self.choices))
        if self.kind == "str":
            return text
        try:
            number = int(text) if self.kind == "int" else float(text)
        except ValueError:
            raise self._wrong(text, "a whole number" if self.kind == "int" else "a number") from None
        if not math.isfinite(number):
            raise self._wrong(text, "a number that is finite")
        if self.minimum is not None and number < self.minimum:
            raise self._wrong(text, f"{self.minimum:g} or more")
        if number > self.maximum:
            raise self._wrong(text, f"{self.maximum:,.0f} or less")
        return number

    def _wrong(self, text: str, expected: str) -> ConfigError:
        return ConfigError(f"environment variable {self.name} is {text!r}; expected {expected}")


SETTINGS: tuple[Setting, ...] = (
    Setting("INVARLOCK_ALLOW_NETWORK", "bool", False, "Allow network access, to download models and data sets."),
    Setting("INVARLOCK_TRUST_REMOTE_CODE", "bool", False, "Allow model code that ships with a checkpoint to run."),
    Setting("INVARLOCK_EVAL_DEVICE", "str", None, "Measure on this device whatever the configuration says."),
    Setting("INVARLOCK_EVAL_STRICT", "bool", True, "A failing evaluation fails the run; 0 records it as a warning."),
    Setting("INVARLOCK_STORE_EVAL_WINDOWS", "bool", True, "Keep the evaluation windows in reports; 0 leaves them out."),
    Setting("INVARLOCK_ALLOW_CALIBRATION_MATERIALIZE", "bool", False,
            "Turn calibration data that is an iterator into a list instead of refusing it."),
    Setting("INVARLOCK_BOOTSTRAP_BCA", "bool", True,
            "Kept from the first derivation, whose intervals are BCa; no interval of a new certificate follows from it."),
    Setting("INVARLOCK_TINY_RELAX", "bool", False, "Lower the sample floors, in the dev profile only; recorded."),
    Setting("INVARLOCK_CI_PREVIEW", "int", None, "Number of preview windows in the ci profiles.", minimum=1),
    Setting("INVARLOCK_CI_FINAL", "int", None, "Number of final windows in the ci profiles.", minimum=1),
    Setting("INVARLOCK_CAPACITY_FAST", "bool", False,
            "Stop reading text as soon as it gives enough windows, even if they come from fewer documents."),
    Setting("INVARLOCK_DEDUP_TEXTS", "bool", False, "Drop exact duplicates among the documents."),
    Setting("INVARLOCK_OMP_THREADS", "int", None, "Number of CPU threads to compute with.", minimum=1, maximum=4096),
    Setting("INVARLOCK_DEBUG_TRACE", "bool", False, "Show tracebacks and debug logs."),
    Setting("INVARLOCK_LIGHT_IMPORT", "bool", False, "Refuse to import torch; for tools that only read reports."),
    Setting("INVARLOCK_SNAPSHOT_MODE", "str", None, "How snapshots are kept.", choices=("auto", "bytes", "chunked")),
    Setting("INVARLOCK_SNAPSHOT_AUTO_RAM_FRACTION", "float", 0.4, "Largest share of free memory a snapshot may take.",
            minimum=0),
    Setting("INVARLOCK_SNAPSHOT_THRESHOLD_MB", "float", 768.0, "Snapshots above this size go to disk.", minimum=0),
    Setting("INVARLOCK_EXPORT_MODEL", "bool", False, "Save the edited model after a successful run."),
    Setting("INVARLOCK_EXPORT_DIR", "str", None, "Where to save the edited model; default: `model` in the run's folder."),
    Setting("INVARLOCK_GUARD_PREPARE_STRICT", "bool", True, "A guard that raises in prepare fails the run."),
    Setting("INVARLOCK_ASSERT_GUARDS", "bool", False, "Raise when a guard returns keys or types outside its contract."),
    Setting("INVARLOCK_EVIDENCE_DEBUG", "bool", False, "Write the guards' full measurements beside the report."),
    Setting("INVARLOCK_SKIP_OVERHEAD_CHECK", "bool", False, "Do not measure guard overhead; recorded."),
    Setting("INVARLOCK_PM_ACCEPTANCE_MIN", "float", None, "Lowest acceptable primary-metric ratio; recorded.", minimum=0),
    Setting("INVARLOCK_PM_ACCEPTANCE_MAX", "float", None, "Highest acceptable primary-metric ratio; recorded.", minimum=0),
    Setting("INVARLOCK_CONFIG_ROOT", "str", None, "Folder whose runtime/ holds tiers.yaml and profiles/."),
    Setting("INVARLOCK_ALLOW_CONFIG_INCLUDE_OUTSIDE", "bool", False, "Let !include read outside the config's folder."),
    Setting("INVARLOCK_TELEMETRY", "bool", False, "Print one line of timings and memory after a run."),
    Setting("INVARLOCK_DISABLE_PLUGIN_DISCOVERY", "bool", False, "Ignore installed plugins; built-ins only."),
    Setting("INVARLOCK_MINIMAL", "bool", False, "Print the verdict and paths only."),
    Setting("INVARLOCK_PLUGINS_DRY_RUN", "bool", False, "`plugins install/uninstall --apply` only print the command."),
    Setting("INVARLOCK_READ_LIMITS", "float", 1.0,
            "Multiply the limits on the size of files that are read, for a large file that is sound.", minimum=0),
    Setting("INVARLOCK_ENGINE_KEY", "str", None, "Key of a served engine, sent to it alone.", secret=True),
    Setting("INVARLOCK_ENGINE_TIMEOUT", "float", 120.0, "Seconds to wait for one answer of a served engine.", minimum=0.1),
    Setting("INVARLOCK_RANK_TIMEOUT", "float", 600.0, "Seconds that a rank waits for the others.", minimum=1),
    Setting("INVARLOCK_CACHE", "str", None,
            "Folder of measured baselines and parsed texts to find again; default: in the user's cache; `off`: none."),
    Setting("HF_DATASETS_OFFLINE", "bool", False, "Hugging Face's own switch: data sets from the cache only."),
    Setting("HF_HOME", "str", None, "Hugging Face's cache folder."),
)  # fmt: skip

_BY_NAME = {setting.name: setting for setting in SETTINGS}


def get(name: str) -> Any:
    """Return the value of the declared variable `name`, or its default where it is unset. Raises KeyError if undeclared."""
    setting = _BY_NAME[name]
    text = os.environ.get(name)
    return setting.default if text is None else setting.parse(text)


def flag(name: str) -> bool:
    """Return a boolean variable."""
    return bool(get(name))


def environment_flags(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the declared variables that are set, as text, for the record of a run."""
    environ = os.environ if environ is None else environ
    found = [setting for setting in SETTINGS if setting.name in environ]
    return {setting.name: "set" if setting.secret else environ[setting.name] for setting in found}
