"""WikiText-2 (raw), articles as documents."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from invarlock.core.exceptions import DataError
from invarlock.core.files import home
from invarlock.eval.data.base import Document, TextProvider
from invarlock.eval.data.hf import load_split

__all__ = ["Wikitext2Provider"]

_HUB_ID, _CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"
_TITLE = re.compile(r" = (?!=)([^\n]*[^=\n]) = \n?")  # sections have ' = = ', articles a single sign


@dataclass(frozen=True)
class Wikitext2Provider(TextProvider):
    """The data set has one row a line; rows are put together into the articles that they came from.

    `split` is `validation` (the default), `test` or `train`. `dataset_name` may name a local copy.
    """

    name: ClassVar[str] = "wikitext2"

    dataset_name: str = _HUB_ID

    def documents(self, split: str | None = None) -> list[Document]:
        local = os.path.isdir(self.dataset_name)
        wanted = split or self.split or "validation"
        _, rows = load_split(self.dataset_name, None if local else _CONFIG, wanted)
        if "text" not in rows.column_names:
            raise DataError(f"the data set '{self.dataset_name}' has no field 'text': expected a copy of {_CONFIG}")
        return _articles(wanted, rows["text"])

    @staticmethod
    def is_cached() -> bool:
        """Whether the data set can be read without the network; looks at file names only and imports nothing."""
        own = Path(os.environ.get("HF_HOME") or home() / ".cache" / "huggingface")
        cache = Path(os.environ.get("HF_DATASETS_CACHE") or own / "datasets")
        folder = cache / "Salesforce___wikitext" / _CONFIG
        return os.path.isdir(folder) and any(folder.glob("*/*/*validation*.arrow"))


def _articles(split: str, rows: Iterable[str]) -> list[Document]:
    """Rows from one title to the next; a title stands alone between two blank rows."""
    lines = list(rows)
    documents: list[Document] = []
    title, start = "", 0
    for i in [*(i for i in range(len(lines)) if _is_title(lines, i)), len(lines)]:
        if text := "".join(lines[start:i]).strip():
            documents.append(Document(f"{split}:{len(documents)}:{title}", text))
        if i < len(lines) and (match := _TITLE.fullmatch(lines[i])):
            title, start = match.group(1), i
    return documents


def _is_title(lines: list[str], i: int) -> bool:
    beside = lines[max(i - 1, 0) : i] + lines[i + 1 : i + 2]
    return _TITLE.fullmatch(lines[i]) is not None and not any(line.strip() for line in beside)
