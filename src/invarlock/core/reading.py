"""Files that others wrote: regular files alone, held to a limit of size before they are parsed, to depth and digits then.

`LIMITS` names every limit. INVARLOCK_READ_LIMITS multiplies them all, for those who know that a larger file is sound.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from invarlock.core import settings
from invarlock.core.exceptions import ConfigError, InvarlockError

__all__ = ["LIMITS", "Limit", "check_size", "lines_of", "open_regular", "parse_json", "read_regular"]

_DEPTH = 100  # levels of lists and mappings within each other
_UNIQUE = ("report", "header")  # whose names stand once: which of two is meant would depend on the reader
_DIGITS = 100  # of a whole number; a tokenizer's "no limit" has 31
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
_POINTER = b"version https://git-lfs.github.com/spec/"
_MB = 1_000_000


class Limit(NamedTuple):
    """The largest file of a kind, in bytes, and how many values (tensors, lines) it may hold."""

    size: int
    values: int


#: kind of file -> how large it may be
LIMITS: dict[str, Limit] = {
    "resamples": Limit(0, 10_000_000),  # windows times replicates, of a certificate that is derived again
    "settings": Limit(256_000, 100_000),  # YAML, with all that it includes
    "report": Limit(64 * _MB, 2_000_000),  # certificates, reports
    "pack": Limit(1024 * _MB, 16),  # a measured side in one file, as it is and unpacked
    "checkpoint": Limit(32 * _MB, 1_000_000),  # config.json and what else lies beside weights
    "tokenizer": Limit(128 * _MB, 10_000_000),
    "header": Limit(32 * _MB, 2_000_000),  # of a safetensors file
    "data": Limit(256 * _MB, 1_000_000),  # one file of documents
    "line": Limit(2 * _MB, 1_000_000),  # one document of it: its tokens take hundreds of times as much
}


def check_size(kind: str, what: str, error: type[InvarlockError], *, size: int = 0, values: int = 0) -> None:
    """Raise `error` where `what` has more bytes or values than its kind may have."""
    factor = float(settings.get("INVARLOCK_READ_LIMITS"))
    limit = LIMITS[kind]
    found = ((size, limit.size, "bytes"), (values, limit.values, "values"))
    for got, most, unit in found:
        if got > most * factor:
            raise error(
                f"{what} has {got:,} {unit} or more; expected at most {most * factor:,.0f}: "
                "set INVARLOCK_READ_LIMITS=4 to read what is four times as large"
            )


@contextlib.contextmanager
def open_regular(path: Path, what: str, error: type[InvarlockError] = ConfigError) -> Iterator[BinaryIO]:
    """Open a regular file; `error` names `what` was expected where it is missing, a folder, a pipe, a device, or the pointer
    that Git LFS leaves in a file's place."""
    expected = f"expected {what}"
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer would wait for ever
    except FileNotFoundError:
        raise error(f"no such file: {path}; {expected}") from None
    except (OSError, ValueError) as problem:  # a circle of links, a name too long, a NUL in it
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{path} cannot be opened ({reason}); {expected}") from None
    with (
        os.fdopen(handle, "rb")
        if stat.S_ISREG(os.fstat(handle).st_mode)
        else _refused(handle, path, what, error) as file
    ):
        try:
            if file.read(len(_POINTER)) == _POINTER:
                raise error(f"{path} is a Git LFS pointer; {expected}: fetch the file itself with `git lfs pull`")
            file.seek(0)
            yield file
        except OSError as problem:
            raise error(f"{path} cannot be read ({problem.strerror or problem}); {expected}") from None


def _refused(handle: int, path: Path, what: str, error: type[InvarlockError]) -> BinaryIO:
    folder = stat.S_ISDIR(os.fstat(handle).st_mode)
    os.close(handle)
    kind = "a folder" if folder else "a pipe, a socket or a device, no regular file"
    raise error(f"{path} cannot be read: it is {kind}; expected {what}")


def read_regular(path: Path, kind: str, what: str, error: type[InvarlockError] = ConfigError) -> bytes:
    """Return the bytes of a regular file, whose size is held to the limit of its kind first."""
    with open_regular(path, what, error) as file:
        check_size(kind, str(path), error, size=os.fstat(file.fileno()).st_size)
        data = file.read(int(LIMITS[kind].size * float(settings.get("INVARLOCK_READ_LIMITS"))) + 1)
        check_size(kind, str(path), error, size=len(data))  # some files say that they are empty and are not
        return data


def parse_json(data: bytes, kind: str, where: str, what: str, error: type[InvarlockError] = ConfigError) -> Any:
    """Return the plain data of JSON in UTF-8. `error` says `where` it does not parse, nests deeper than 100 levels, or
    holds a number of more than 100 digits, half a surrogate pair, or more values than its kind may have."""
    check_size(kind, where, error, values=data.count(b",") + data.count(b"[") + data.count(b"{"))
    if data.startswith(b"\xef\xbb\xbf"):
        raise error(f"{where} begins with a byte order mark; expected {what} without one: save it as plain UTF-8")
    try:
        pairs = _unique if kind in _UNIQUE else None
        found = json.loads(data.decode("utf-8"), parse_int=_whole, object_pairs_hook=pairs)
        if _depth(found) > _DEPTH:
            raise RecursionError
        if kind != "line" and _HALF_PAIR.search(data):  # providers mend texts, and say so
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise error(f"{where} nests deeper than {_DEPTH} levels; expected {what}") from None
    except json.JSONDecodeError as problem:
        line = "" if kind == "line" else f"line {problem.lineno}: "
        raise error(f"{where} is not JSON ({line}{problem.msg} at column {problem.colno}): expected {what}") from None
    except UnicodeEncodeError:
        raise error(f"{where} holds half a surrogate pair (\\ud800 to \\udfff); expected {what}") from None
    except UnicodeDecodeError as problem:
        raise error(f"{where} is not UTF-8 (byte 0x{data[problem.start]:02x}): expected {what}") from None
    except ValueError as problem:
        raise error(f"{where}: {problem}; expected {what}") from None
    return found


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a number has {len(text):,} digits, and {_DIGITS} are read")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in found if names.count(name) > 1)!r} stands there twice")
    return found


def _depth(value: object) -> int:
    """Return how many lists and mappings stand within each other."""
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, (dict, list))]:
        level, depth = [inner for item in level for inner in _items(item)], depth + 1
    return depth


def _items(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def lines_of(file: BinaryIO, name: str, error: type[InvarlockError]) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line) of an open file of documents, one line at a time, each held to the limit of a line and
    the file to that of its size and its lines."""
    check_size("data", name, error, size=os.fstat(file.fileno()).st_size)
    longest = int(LIMITS["line"].size * float(settings.get("INVARLOCK_READ_LIMITS"))) + 1
    number = 0
    while line := file.readline(longest):
        number += 1
        check_size("line", f"{name} line {number}", error, size=len(line))
        check_size("data", name, error, values=number)
        yield number, line
