"""Source code of the running interpreter's standard library: the other kind of text that every machine has.

A document is one module's source without its docstrings, which are `python_docs`. It has the name that the module has
there, so that what a module says and what it does count as one document.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from invarlock.core.exceptions import DataError
from invarlock.eval.data.base import Document, TextProvider
from invarlock.eval.data.python_docs import chosen_split, module_sources

__all__ = ["PythonCodeProvider"]

#: text between triple quotes that stands alone: docstrings, found without parsing
_DOCSTRING = re.compile(r'^[ \t]*[rRuUbB]{0,2}("""|\'\'\')[\s\S]*?\1[ \t]*\n?', re.MULTILINE)
_LONGEST = 12_000  # characters of a module: more windows of one document say little more


@dataclass(frozen=True)
class PythonCodeProvider(TextProvider):
    """`split` is `test` (the default), `train` or `all`, module by module as in `python_docs`."""

    name: ClassVar[str] = "python_code"

    def documents(self, split: str | None = None) -> list[Document]:
        documents = [Document(name, _code(path)) for name, path in module_sources(chosen_split(self, split))]
        if not any(document.text.strip() for document in documents):
            raise DataError("this Python has no sources of its standard library: name another dataset.provider")
        return documents


@lru_cache(maxsize=4096)
def _code(path: Path) -> str:
    return _DOCSTRING.sub("", path.read_text(encoding="utf-8", errors="replace"))[:_LONGEST]
