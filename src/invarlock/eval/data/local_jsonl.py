"""Text and pairs from JSON-lines files on disk; a plain .txt file counts as one document."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from invarlock.core.exceptions import ConfigError, DataError
from invarlock.core.reading import lines_of, open_regular, parse_json
from invarlock.eval.data.base import FieldPairsProvider, FieldsProvider, FieldTextProvider

__all__ = ["LocalJsonlPairsProvider", "LocalJsonlProvider"]


@dataclass(frozen=True)
class _LocalFiles(FieldsProvider):
    """`file`, `path` and `data_files` mean the same: a path, a list of paths, or a pattern with `*`. A folder stands for
    the .jsonl files in it, or, where there are none, for its .txt files.

    Files have no splits: one that is asked for is refused.
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
        found: dict[Path, None] = {}
        for pattern in [os.fspath(value) for value in patterns]:
            path = Path(pattern)
            here = _inside(path) if os.path.isdir(path) else [path] if os.path.exists(path) else _matching(pattern)
            if not (paths := sorted(here)):
                raise DataError(f"no data file at '{pattern}': got nothing there, expected a .jsonl or .txt file")
            found |= dict.fromkeys(paths)
        if len({path.name for path in found}) == len(found):
            return {path.name: path for path in found}
        common = Path(os.path.commonpath([path.absolute() for path in found]))
        return {path.absolute().relative_to(common).as_posix(): path for path in found}

    def _whole(self, split: str | None) -> dict[str, Path]:
        if split or self.split:
            raise ConfigError(f"dataset.split is {split or self.split!r}, and files have no splits; leave it out")
        return self._files()

    def look(self, split: str | None = None) -> None:
        """Raise what `texts` would for the first line of each file."""
        for name, path in self._whole(split).items():
            lines = _lines(name, path) if path.suffix == ".txt" else _records(name, path, self.fields)
            next(iter(lines), None)

    def texts(self, split: str | None, *names: str) -> Iterator[Sequence[str]]:
        for name, path in self._whole(split).items():
            if path.suffix == ".txt" and len(names) == 1:
                yield name, "".join(_text(name, *line) for line in _lines(name, path))
            else:
                yield from _records(name, path, names)


@dataclass(frozen=True)
class LocalJsonlProvider(FieldTextProvider, _LocalFiles):
    """One line is one document, its text under `text_field`."""

    name: ClassVar[str] = "local_jsonl"


@dataclass(frozen=True)
class LocalJsonlPairsProvider(FieldPairsProvider, _LocalFiles):
    """One line is one pair, under `src_field` and `tgt_field`."""

    name: ClassVar[str] = "local_jsonl_pairs"


def _inside(folder: Path) -> list[Path]:
    return list(folder.glob("*.jsonl")) or list(folder.glob("*.txt"))


def _matching(pattern: str) -> list[Path]:
    try:
        return [Path(found) for found in glob.glob(pattern)]
    except (OSError, ValueError):  # no name of a file
        return []


#: how files begin that are something else, what they are, and what to do
_OTHERS = (
    (b"\x1f\x8b", "gzip", "unpack it first: gunzip -k FILE"),
    (b"PK\x03\x04", "a zip archive", "unpack it first"),
    (b"PAR1", "parquet", "read it with {kind: hf_text, dataset_name: FOLDER}, the folder that it lies in"),
    (b"[", "one JSON array", "write one object a line: jq -c '.[]' FILE > FILE.jsonl"),
)
_CHAT = ("messages", "conversations")


def _refuse_others(name: str, number: int, line: bytes) -> None:
    """Refuse a file that is of another kind than its first line should be. Raises DataError with what to do."""
    for start, what, advice in _OTHERS if number == 1 else ():
        if line.lstrip().startswith(start):
            raise DataError(f"{name} is {what}; expected one JSON object a line: {advice}")
    if number == 1 and Path(name).suffix in (".csv", ".tsv"):
        raise DataError(
            f"{name} is a table; expected one JSON object a line: "
            'python -c \'import pandas as p, sys; p.read_csv(sys.argv[1]).to_json(sys.argv[2], orient="records", '
            "lines=True)' FILE FILE.jsonl"
        )


def _lines(name: str, path: Path) -> Iterator[tuple[int, bytes]]:
    with open_regular(path, "a .jsonl or .txt file", DataError) as stream:
        for number, line in lines_of(stream, name, DataError):
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _text(name: str, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} line {number} is not UTF-8 (byte 0x{line[error.start]:02x}): convert it to UTF-8"
        ) from error


def _records(name: str, path: Path, fields: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield `name:line` and the texts under `fields` of every line that is not blank."""
    for number, line in _lines(name, path):
        if not line.strip():
            continue
        _refuse_others(name, number, line)
        record = parse_json(line, "line", f"{name} line {number}", "one object a line", DataError)
        if not isinstance(record, dict):
            raise DataError(f"{name} line {number}: got a JSON {type(record).__name__}, expected an object")
        for field in fields:
            if field not in record and (chat := next((key for key in _CHAT if key in record), None)):
                raise DataError(
                    f"{name} line {number} is a chat ('{chat}'), not a text: write each with the model's chat template "
                    f"into a field '{field}' first (tokenizer.apply_chat_template(..., tokenize=False))"
                )
            if field not in record:
                raise DataError(
                    f"{name} line {number} has no field '{field}': got fields {', '.join(map(repr, record)) or 'none'}; "
                    "name the one to read"
                )
            if not isinstance(value := record[field], str):
                raise DataError(f"{name} line {number}: field '{field}' is {type(value).__name__}, expected text")
        yield [f"{name}:{number}", *(record[field] for field in fields)]
