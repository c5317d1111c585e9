"""Files appear whole or not at all, and temporary folders go away."""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from invarlock.core import settings
from invarlock.core.exceptions import ConfigError, InvarlockError
from invarlock.core.leftovers import SNAPSHOTS, owned_folder, owned_name
from invarlock.core.reading import parse_json, read_regular

__all__ = [
    "cache_folder",
    "first_line",
    "home",
    "kept_folder",
    "only_a_path",
    "plain",
    "private_folder",
    "read_json",
    "size_of",
    "write_json",
    "write_together",
    "write_whole",
]

_kept = contextlib.ExitStack()  # of the folders that stand until the program ends
atexit.register(_kept.close)

_EXACT = 2**53  # from here on not every whole number is a float, and a float stays one


def plain(value: object) -> Any:
    """Return a JSON-ready copy of what a plugin or caller handed in. NaN and infinities become None, arrays and tensors
    lists, and objects without a text of their own the name of their type, so that two runs record the same.

    A number has one spelling (RFC 8785): a whole float is an integer, 1.0 is 1 and -0.0 is 0.
    """
    if isinstance(value, str):  # half a surrogate pair, as in a name that is not UTF-8, has no bytes to be written as
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode("utf-8")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):  # subclasses too: numpy's numbers, enumerations
        number = float(value) if isinstance(value, float) else int(value)
        whole = isinstance(number, float) and number.is_integer() and abs(number) < _EXACT
        return int(number) if whole else number if math.isfinite(number) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=str)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    text = str(value)
    return f"<{getattr(value, '__qualname__', type(value).__qualname__)}>" if " at 0x" in text else text


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def only_a_path(name: str) -> bool:
    """Say whether a name can only be a path: a hub id is `name` or `org/name`."""
    return os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1


def home() -> Path:
    """Return the user's folder; where nothing says which it is (no HOME, no entry for the user), the temporary one."""
    found = os.path.expanduser("~")
    return Path(tempfile.gettempdir() if found == "~" else found)


def cache_folder() -> Path | None:
    """Return the folder of what is kept from one command to the next, None where `INVARLOCK_CACHE=off`."""
    named = settings.get("INVARLOCK_CACHE")
    if named is not None:
        return None if str(named).strip().lower() in ("", "0", "off", "no", "false") else Path(str(named))
    if sys.platform == "darwin":
        return home() / "Library" / "Caches" / "invarlock"
    return Path(os.environ.get("XDG_CACHE_HOME") or home() / ".cache") / "invarlock"


def size_of(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `content` under a temporary name in the same folder, then rename it: readers see all of it or nothing.

    Raises ConfigError where nothing can be written there."""
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=owned_name(f".{path.name}."), suffix=".part")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); name another file") from None
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def write_together(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write several files so that none appears under its name before all are complete on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    with owned_folder(folder, ".staging-") as staging:
        try:
            for name, content in files.items():
                write_whole(staging / name, content)
            for name in files:
                os.replace(staging / name, folder / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def write_json(path: Path, value: object) -> None:
    """Write JSON, whole or not at all. NaN and infinities raise ValueError: what was not measured is null."""
    write_whole(path, json.dumps(value, allow_nan=False, ensure_ascii=False, indent=1) + "\n")


def read_json(path: Path, what: str, error: type[InvarlockError] = ConfigError, kind: str = "report") -> Any:
    """Read JSON; `error` names `what` and where it does not parse. `kind` (of `reading.LIMITS`) says how large it may be."""
    return parse_json(read_regular(path, kind, what, error), kind, str(path), what, error)


@contextlib.contextmanager
def private_folder(parent: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder that only this user can read (0700); removed at the end, whatever ends it."""
    with owned_folder(parent, SNAPSHOTS) as folder:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def kept_folder() -> Path:
    """Return a private folder that stands until the program ends; what a killed one leaves is swept by the next run."""
    return _kept.enter_context(private_folder())
