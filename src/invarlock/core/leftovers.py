"""What is being written or kept for a while has an owner; what a killed process left of it is found and removed.

The name says which process made it, and that process holds a lock on it until it is done: both end with the process,
however it ends. A name of a living process or a lock that is held (by a process of another container, say) is left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["SNAPSHOTS", "find_leftovers", "owned_folder", "owned_name", "sweep"]

SNAPSHOTS = "invarlock-"
_OWNED = re.compile(r"^(?:invarlock-|\.staging-|\..*\.(?=.*\.part$))(\d+)-\w+(?:\.part)?$")
_DEPTH = 4  # out/<name>/<run>/file


def owned_name(before: str) -> str:
    """Return the beginning of a temporary name that says whose it is."""
    return f"{before}{os.getpid()}-"


@contextlib.contextmanager
def owned_folder(parent: Path | None, before: str, after: str = "") -> Iterator[Path]:
    """Yield a new folder that only this user can read (0700), held by this process. The caller moves or removes it."""
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=owned_name(before), suffix=after))
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: the name alone tells
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        os.close(handle)


def find_leftovers(folder: Path, depth: int = _DEPTH) -> list[Path]:
    """Return the files and folders under `folder` (four levels deep) whose owner, one of this user's, is gone."""
    found: list[Path] = []
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return found
    for entry in entries:
        with contextlib.suppress(OSError):
            match = _OWNED.match(entry.name)
            if match and entry.stat(follow_symlinks=False).st_uid == os.getuid():
                found += [Path(entry.path)] if _is_gone(Path(entry.path), int(match[1])) else []
            elif depth > 1 and entry.is_dir(follow_symlinks=False):
                found += find_leftovers(Path(entry.path), depth - 1)
    return found


def _is_gone(path: Path, owner: int) -> bool:
    try:
        os.kill(owner, 0)
    except ProcessLookupError:
        pass
    except (PermissionError, OverflowError):
        return False
    else:
        return False
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def sweep(*folders: Path) -> list[Path]:
    """Remove what killed processes left in the temporary folder and under `folders`, and return it."""
    found = [path for path in find_leftovers(Path(tempfile.gettempdir()), depth=1) if path.name.startswith(SNAPSHOTS)]
    found += [path for folder in folders for path in find_leftovers(folder)]
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return found
