"""A run's folder: `report.json`, `events.jsonl` and what lies beside them. Shared by `certify` and `run`."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from invarlock.core import settings
from invarlock.core.exceptions import ConfigError
from invarlock.core.files import read_json, size_of, write_json
from invarlock.core.leftovers import owned_folder
from invarlock.evidence.pack import is_pack, read_pack

__all__ = [
    "EVIDENCE",
    "GUARD_MEASUREMENTS",
    "PARTIAL",
    "REPORT",
    "clear_runs",
    "find_report",
    "read_report",
    "require_free",
    "require_writable",
    "staged_folder",
    "write_report",
]

REPORT = "report.json"
EVIDENCE = "evidence.safetensors"
GUARD_MEASUREMENTS = "guard_measurements.json"
PARTIAL = ".partial"  # folder of what a run that breaks off need not measure again
_LONGEST = 200  # bytes of a folder's name; file systems take 255, and temporary names are longer
_STAMP = re.compile(r"\d{8}T\d{12}Z")  # the name of a run's folder, `Job.stamp`


def find_report(path: Path) -> Path:
    """Return the report.json that `path` names: the file, or the one in the folder or in its newest subfolder."""
    for found in (path, path / REPORT, *_newest(path)):
        if os.path.isfile(found):
            return found
    raise ConfigError(f"{path} has no report.json; expected a run folder or its report.json")


def _newest(path: Path) -> list[Path]:
    return sorted(path.glob(f"*/{REPORT}"), reverse=True) if os.path.isdir(path) else []


def read_report(path: Path) -> tuple[dict[str, Any], Path]:
    """Return the report that `path` names (a run's folder, its report.json, or a baseline pack), and where it lies."""
    if is_pack(path):
        pack = read_pack(path, ConfigError)
        report = pack.json(REPORT, str(path), ConfigError)
        return {**report, "meta": {**report.get("meta", {}), "pack": pack.address}}, path
    found = find_report(path)
    data = read_json(found, "a run's report.json")
    if not isinstance(data, dict):
        raise ConfigError(f"{found} holds {type(data).__name__}; expected a run's report.json")
    return data, found


def write_report(report: Mapping[str, Any], folder: Path) -> Path:
    """Write the report; with INVARLOCK_EVIDENCE_DEBUG also what the guards measured and found, in a file of its own."""
    if settings.flag("INVARLOCK_EVIDENCE_DEBUG"):
        evidence = report.get("evidence") or {}
        shown = {key: evidence.get(key) for key in ("guards", "sketches", "contracts")}
        write_json(folder / GUARD_MEASUREMENTS, {**shown, "results": report.get("guards")})
    write_json(folder / REPORT, report)
    return folder / REPORT


def require_writable(folder: Path, what: str = "runs", how: str = "output.dir or --out") -> None:
    """Raise ConfigError where `what` cannot be written below `folder`; tried before anything long is started."""
    above = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = f"{above} is {'not writable' if above.is_dir() else 'a file'}"
        raise ConfigError(f"{what} cannot be written to {folder}: {why}; name another folder with {how}")
    if len(os.fsencode(folder.name)) > _LONGEST:
        raise ConfigError(f"{what} cannot be written to {folder}: the name is too long; name another folder with {how}")


def clear_runs(folder: Path) -> tuple[int, int]:
    """Remove the runs below `folder`, and nothing else that lies there; return how many and their bytes."""
    found = [path.parent for path in folder.glob(f"*/*/{REPORT}") if _STAMP.fullmatch(path.parent.name)]
    found += [path for path in (folder / PARTIAL,) if path.is_dir()]
    size = sum(map(size_of, found))
    for path in found:
        shutil.rmtree(path)
        with contextlib.suppress(OSError):  # other runs lie beside it
            path.parent.rmdir()
    return len(found), size


def require_free(target: Path) -> None:
    """Raise ConfigError where `target` is there already and not an empty folder."""
    if os.path.exists(target) and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is there already; expected a new or empty folder: remove it or name another")


@contextlib.contextmanager
def staged_folder(target: Path, *, keep: bool = False) -> Iterator[Path]:
    """Yield a private folder that becomes `target` when the block ends, and is removed when it raises (unless `keep`).

    So `target` appears whole or not at all. Raises ConfigError where it is there already and not empty.
    """
    require_free(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with owned_folder(target.parent, f".{target.name}.", ".part") as staging:
        try:
            yield staging
            staging.chmod(0o755)
            os.replace(staging, target)
        except BaseException:
            if keep:  # under a name that is nobody's, so that no later run removes it
                os.replace(staging, target.with_name(f".{target.name}.kept.part"))
            shutil.rmtree(staging, ignore_errors=True)
            raise
