"""Text and pairs from JSON-lines files on disk; a plain .txt file counts as one document."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from invarlock.core.exceptions import DataError
from invarlock.eval.data.base import Document, Pair, PairProvider, Provider, TextProvider

__all__ = ["LocalJsonlPairsProvider", "LocalJsonlProvider"]


@dataclass(frozen=True)
class _LocalFiles(Provider):
    """`file`, `path` and `data_files` mean the same: a path, a list of paths, or a pattern with `*`.

    Files have no splits: `split` is accepted and has no effect.
    """

    file: str | os.PathLike[str] | list[str] | None = None
    path: str | os.PathLike[str] | list[str] | None = None
    data_files: str | os.PathLike[str] | list[str] | None = None

    def _files(self) -> dict[str, Path]:
        """Files by the shortest name that tells them apart: the name alone, or the path below their common folder."""
        given = [value for value in (self.file, self.path, self.data_files) if value]
        if len(given) != 1:
            raise DataError(f"got {len(given)} of file, path and data_files for '{self.name}', expected exactly one")
        patterns = given[0] if isinstance(given[0], list | tuple) else [given[0]]
        paths: list[Path] = []
        for pattern in [os.fspath(value) for value in patterns]:
            if Path(pattern).is_dir():
                found = sorted(Path(pattern).glob("*.jsonl"))
            else:
                found = [Path(pattern)] if Path(pattern).exists() else sorted(map(Path, glob.glob(pattern)))
            if not found:
                raise DataError(f"no data file at '{pattern}': got nothing there, expected a .jsonl or .txt file")
            paths += found
        paths = list(dict.fromkeys(paths))
        if len({path.name for path in paths}) == len(paths):
            return {path.name: path for path in paths}
        common = Path(os.path.commonpath([path.absolute() for path in paths]))
        return {path.absolute().relative_to(common).as_posix(): path for path in paths}


@dataclass(frozen=True)
class LocalJsonlProvider(_LocalFiles, TextProvider):
    """One line is one document, its text under `text_field`."""

    name: ClassVar[str] = "local_jsonl"

    text_field: str = "text"

    def documents(self, split: str | None = None) -> list[Document]:
        documents = []
        for name, path in self._files().items():
            if path.suffix == ".txt":
                documents.append(Document(name, "".join(text for _, text in _lines(name, path))))
                continue
            for number, record in _records(name, path):
                documents.append(Document(f"{name}:{number}", _field(record, self.text_field, name, number)))
        return documents


@dataclass(frozen=True)
class LocalJsonlPairsProvider(_LocalFiles, PairProvider):
    """One line is one pair, under `src_field` and `tgt_field`."""

    name: ClassVar[str] = "local_jsonl_pairs"

    src_field: str = "source"
    tgt_field: str = "target"

    def pairs(self, split: str | None = None) -> list[Pair]:
        pairs = []
        for name, path in self._files().items():
            for number, record in _records(name, path):
                source = _field(record, self.src_field, name, number)
                target = _field(record, self.tgt_field, name, number)
                pairs.append(Pair(f"{name}:{number}", f"{name}:{number}", source, target))
        return pairs


def _lines(name: str, path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8 (byte 0x{error.object[error.start]:02x} after line {number}): convert it to UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {name}: {error.strerror or error}") from error


def _records(name: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(name, path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{name} line {number} is not JSON ({error.msg} at column {error.colno}): expected one object a line"
            ) from error
        if not isinstance(record, dict):
            raise DataError(f"{name} line {number}: got a JSON {type(record).__name__}, expected an object")
        yield number, record


def _field(record: dict[str, Any], field: str, name: str, number: int) -> str:
    if field not in record:
        there = ", ".join(map(repr, record)) or "none"
        raise DataError(f"{name} line {number} has no field '{field}': got fields {there}; name the one to read")
    value = record[field]
    if not isinstance(value, str):
        raise DataError(f"{name} line {number}: field '{field}' is {type(value).__name__}, expected text")
    return value
