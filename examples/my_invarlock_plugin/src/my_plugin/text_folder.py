"""A data provider: the text files of a folder, one document each."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from invarlock.core.exceptions import DataError
from invarlock.eval.data import Document, TextProvider


@dataclass(frozen=True)
class TextFolder(TextProvider):
    """Every file below `folder` whose name matches `pattern`."""

    name: ClassVar[str] = "text_folder"

    folder: str = "."
    pattern: str = "*.txt"

    def documents(self, split: str | None = None) -> list[Document]:
        root = Path(self.folder)
        paths = sorted(root.rglob(self.pattern))
        if not paths:
            raise DataError(f"no file in {root} matches {self.pattern!r}: name another folder or pattern")
        return [Document(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")) for path in paths]
