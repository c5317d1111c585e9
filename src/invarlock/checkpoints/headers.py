"""The header of a safetensors file, held to the format before anything reads by it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard

from safetensors import safe_open

from invarlock.core.exceptions import ModelLoadError
from invarlock.core.reading import check_size, open_regular, parse_json

__all__ = ["check_header", "open_tensors", "read_header"]

_WHAT = "a safetensors file"


def open_tensors(path: Path) -> Any:
    """Open a safetensors file for torch, its header checked. Errors of `check_header`, SafetensorError and OSError."""
    check_header(path)
    return safe_open(path, framework="pt")


def read_header(path: Path) -> dict[str, Any]:
    """Return the entry of each tensor, by name; {} where the file is too short to have any.

    Raises ModelLoadError for a header that is larger than any checkpoint's, is not JSON, or names one tensor twice.
    """
    with open_regular(path, _WHAT, ModelLoadError) as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= os.fstat(file.fileno()).st_size - 8:
            return {}  # cut off: opening the file says so
        check_size("header", f"the header of {path}", ModelLoadError, size=size)
        text = file.read(size)
    found = parse_json(text, "header", f"the header of {path}", _WHAT, ModelLoadError)
    if not isinstance(found, dict):
        raise ModelLoadError(f"the header of {path} is a {type(found).__name__}; expected {_WHAT}")
    return {name: entry for name, entry in found.items() if name != "__metadata__"}


def check_header(path: Path) -> int:
    """Return how many tensors a file holds. Raises ModelLoadError where they overlap or an entry is malformed.

    A file that is opened for every tensor of it is checked once, as long as it stays as it is.
    """
    try:
        facts = os.stat(path)
    except OSError:
        return _checked(path)  # says what is wrong with the path
    return _checked(path, facts.st_ino, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=256)
def _checked(path: Path, *state: int) -> int:
    ranges = sorted((*_range(path, name, entry), name) for name, entry in read_header(path).items())
    end, before = 0, ""
    for start, stop, name in ranges:
        if start < end:
            raise ModelLoadError(f"{path}: the tensors {before!r} and {name!r} overlap in the file; write it again")
        end, before = stop, name
    return len(ranges)


def _range(path: Path, name: str, entry: object) -> tuple[int, int]:
    shape, ends = (entry.get(key) for key in ("shape", "data_offsets")) if isinstance(entry, Mapping) else (None, None)
    if _counts(shape) and _counts(ends) and len(ends) == 2 and ends[0] <= ends[1]:
        return ends[0], ends[1]
    raise ModelLoadError(f"{path}: the header's entry of {name!r} is malformed; expected shape and data_offsets")


def _counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**62 for number in value)
