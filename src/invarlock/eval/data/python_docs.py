"""Docstrings and help topics of the running interpreter: real English on every machine, without a download.

A document is one module's docstrings in the order of its source, or one help topic. Sources of the standard library
are parsed, never imported; of modules that have no source only those compiled into the interpreter are looked at.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from invarlock.core.exceptions import DataError
from invarlock.eval.data.base import Document, TextProvider

__all__ = ["PythonDocsProvider", "chosen_split", "module_sources", "split_of"]

_TEST_SHARE = 0.4
_SPLITS = ("train", "test", "all")
# Tests are no documentation; codecs are a hundred generated files of one sentence, which would count as a hundred
# independent documents.
_LEFT_OUT = {"test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages"}


def split_of(document_id: str) -> str:
    """`train` or `test`, by the name alone, so that it is the same in every version of Python.

    A package goes to one side whole, and with it the modules that repeat its text (`decimal` and `_pydecimal`).
    """
    family = re.sub(r"^module:(?:_py|_)?(\w+).*$", r"module:\1", document_id)
    digest = hashlib.sha256(family.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < _TEST_SHARE * 2**64 else "train"


@dataclass(frozen=True)
class PythonDocsProvider(TextProvider):
    """`split` is `test` (the default), `train` (what the demo model was trained on) or `all`."""

    name: ClassVar[str] = "python_docs"

    def documents(self, split: str | None = None) -> list[Document]:
        documents = _read(chosen_split(self, split))
        if not documents:
            raise DataError(
                "the data set is empty: this Python has neither the sources of its standard library nor help topics: "
                "name another dataset.provider"
            )
        return list(documents)


def chosen_split(provider: TextProvider, split: str | None) -> str:
    """Return the split asked for, `test` where none was. Raises DataError for one that there is not."""
    wanted = split or provider.split or "test"
    if wanted not in _SPLITS:
        raise DataError(f"got split '{wanted}' for {provider.name}, expected one of {', '.join(_SPLITS)}")
    return wanted


@lru_cache(maxsize=len(_SPLITS))
def _read(split: str) -> tuple[Document, ...]:
    ready = [d for d in (*_topics(), *_builtin_modules()) if split in ("all", split_of(d.document_id))]
    read = (Document(document_id, _docstrings(path)) for document_id, path in module_sources(split))
    return (*ready, *(document for document in read if document.text))


def _topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package the topics apart
        return
    for name in sorted(topics):
        yield Document(f"topic:{name}", inspect.cleandoc(topics[name]))


def _builtin_modules() -> Iterator[Document]:
    """Documentation of modules written in C and compiled in; each text once, in order of name."""
    for name in sorted(sys.builtin_module_names):
        module = importlib.import_module(name)
        found: dict[str, None] = {}
        for holder in (module, *(value for _, value in sorted(vars(module).items()) if isinstance(value, type))):
            found |= dict.fromkeys(_members_docs(holder))
        if found:
            yield Document(f"module:{name}", "\n\n".join(found))


def _members_docs(holder: object) -> Iterator[str]:
    for value in (holder, *(value for _, value in sorted(vars(holder).items()))):
        text = getattr(value, "__doc__", None)
        # An instance repeats its class's documentation; only what documents itself counts.
        if isinstance(text, str) and (value is holder or callable(value)):
            yield inspect.cleandoc(text)


def module_sources(split: str) -> Iterator[tuple[str, Path]]:
    """Yield the document and the source file of every module of a split."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not _LEFT_OUT.intersection(parts[:-1]) and all(part.isidentifier() for part in parts):
            document = "module:" + ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if split in ("all", split_of(document)):
                yield document, path


def _docstrings(path: Path) -> str:
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return ""  # saves parsing large tables
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates and deliberately broken files are not documentation
        return ""
    return "\n\n".join(_walk(tree))


def _walk(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    if text := ast.get_docstring(node):
        yield text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk(child)
