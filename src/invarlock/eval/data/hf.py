"""Text and pairs through the `datasets` library: a data set on the hub, in its cache, or a local folder.

Nothing is downloaded unless the network is allowed; local folders and data sets already in the cache need none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from invarlock.core.exceptions import ConfigError, DataError, DependencyError, NetworkError
from invarlock.core.files import first_line, only_a_path
from invarlock.core.network import network_allowed
from invarlock.core.reading import open_regular
from invarlock.eval.data.base import FieldPairsProvider, FieldsProvider, FieldTextProvider

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["HFSeq2SeqProvider", "HFTextProvider", "load_split"]

_ROWS = (".parquet", ".arrow", ".json", ".jsonl", ".csv", ".tsv", ".txt", ".gz", ".bz2", ".xz", ".zst", ".zip")
_MOST_ENTRIES = 10_000
_PREFERRED_SPLITS = ("validation", "test", "train")


@dataclass(frozen=True)
class _HubData(FieldsProvider):
    """`dataset_name` is a hub id or a local folder; without `split` the first of validation, test, train is read."""

    dataset_name: str | None = None
    config_name: str | None = None

    def texts(self, split: str | None, *names: str) -> Iterable[Sequence[str]]:
        if not self.dataset_name:
            raise ConfigError(f"dataset provider '{self.name}' needs 'dataset_name': give a hub id or a local folder")
        found, rows = load_split(self.dataset_name, self.config_name, split or self.split)
        name = f"{Path(self.dataset_name).name}:{found}"
        ids = (f"{name}:{i}" for i in range(len(rows)))
        return zip(ids, *(_column(rows, field, name) for field in names), strict=True)


@dataclass(frozen=True)
class HFTextProvider(FieldTextProvider, _HubData):
    """One row is one document, its text under `text_field`."""

    name: ClassVar[str] = "hf_text"


@dataclass(frozen=True)
class HFSeq2SeqProvider(FieldPairsProvider, _HubData):
    """One row is one pair. A dotted field reaches into a nested one, as in `translation.en`."""

    name: ClassVar[str] = "hf_seq2seq"


def load_split(dataset_name: str, config_name: str | None, split: str | None) -> tuple[str, Dataset]:
    """The split's name and its rows (a `datasets.Dataset`).

    Raises `DependencyError` without `datasets`, `NetworkError` for what is not cached while offline, `DataError` for
    what is not there.
    """
    try:
        import datasets
    except ImportError as error:
        raise DependencyError(f"reading the data set '{dataset_name}'", "eval") from error

    local = os.path.isdir(dataset_name)
    allowed = network_allowed()
    if not local and (only_a_path(dataset_name) or os.path.exists(dataset_name)):
        raise DataError(
            f"no such folder: '{dataset_name}'; expected a folder with a data set, or a hub id such as org/name; a file "
            "of text is read with {kind: local_jsonl, file: FILE}"
        )
    if local:
        _look_at(Path(dataset_name))
    try:
        if local and any((Path(dataset_name) / file).exists() for file in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(dataset_name)
        else:
            access = datasets.DownloadConfig(local_files_only=not allowed)
            loaded = datasets.load_dataset(dataset_name, config_name, download_config=access)
    except Exception as error:  # the library's errors have many roots; each is a data set that cannot be had
        reason = first_line(error)[:200]
        if not (local or allowed):
            raise NetworkError(
                f"the data set '{dataset_name}' is neither a local folder nor cached, and the network is not allowed: "
                f"set INVARLOCK_ALLOW_NETWORK=1 to download it ({reason})"
            ) from error
        raise DataError(f"cannot read the data set '{dataset_name}': {reason}") from error
    if isinstance(loaded, datasets.Dataset):  # saved by itself, without the name of a split
        if split not in (None, "data"):
            raise DataError(
                f"the data set '{dataset_name}' was saved without splits: got split '{split}'; leave it out"
            )
        return "data", loaded
    chosen = split or next((name for name in _PREFERRED_SPLITS if name in loaded), next(iter(loaded), ""))
    base, _, part = chosen.partition("[")
    if base not in loaded:
        there = ", ".join(map(str, loaded))
        raise DataError(f"the data set '{dataset_name}' has no split '{base}': got {there}; name one of them")
    return chosen, _slice(loaded[base], part, chosen)


def _look_at(folder: Path) -> None:
    """Refuse a folder without a data file near its top, which the library would search to its last leaf, and one whose data
    files are pipes or pointers of Git LFS."""
    entries = islice(chain.from_iterable(folder.glob(pattern) for pattern in ("*", "*/*", "*/*/*")), _MOST_ENTRIES)
    rows = [path for path in entries if path.suffix in _ROWS]
    if not rows:
        raise DataError(f"the folder '{folder}' holds no data file; expected one such as train.parquet or train.jsonl")
    for path in rows:
        with open_regular(path, "rows of a data set", DataError):
            pass


def _slice(rows: Dataset, part: str, split: str) -> Dataset:
    """Rows of `split[a:b]` or `split[:n%]`, the notation of the `datasets` library."""
    if not part:
        return rows
    match = re.fullmatch(r"(?:(\d+)(%?))?:(?:(\d+)(%?))?\]", part)
    if match is None:
        raise DataError(f"got split '{split}', expected a name, 'name[a:b]' or 'name[a%:b%]'")
    start, start_percent, end, end_percent = match.groups()
    first = int(start or 0) * len(rows) // 100 if start_percent else int(start or 0)
    last = len(rows) if end is None else int(end) * len(rows) // 100 if end_percent else int(end)
    return rows.select(range(min(first, len(rows)), min(last, len(rows))))


def _column(rows: Dataset, field: str, name: str) -> list[str]:
    head, _, inner = field.partition(".")
    if head not in rows.column_names:
        there = ", ".join(map(repr, rows.column_names))
        raise DataError(f"the data set {name} has no field '{field}': got fields {there}; name the one to read")
    values = list(rows[head])
    if inner:
        values = [value.get(inner) if isinstance(value, dict) else None for value in values]
    for number, value in enumerate(values):
        if not isinstance(value, str):
            raise DataError(f"row {number} of {name}: field '{field}' is {type(value).__name__}, expected text")
    return values
