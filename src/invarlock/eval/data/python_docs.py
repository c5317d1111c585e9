"""Docstrings and help topics of the running interpreter: real English on every machine, without a download.

A document is one module's docstrings in the order of its source, or one help topic. Sources of the standard library
are parsed, never imported; of modules that have no source only those compiled into the interpreter are looked at.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import inspect
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from invarlock.core.exceptions import ConfigError, DataError, InvarlockError
from invarlock.core.files import cache_folder, read_json, write_whole
from invarlock.eval.data.base import Document, TextProvider

__all__ = ["TEXTS", "PythonDocsProvider", "chosen_split", "module_sources", "split_of"]

TEXTS = "-python-docs.json"  # how the names of the files end that hold parsed texts
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
    return (*ready, *(Document(name, text) for name, text in _modules(split).items() if text))


def _modules(split: str) -> dict[str, str]:
    """The docstrings of every module of a split: parsing takes seconds, so they are kept until a source changes."""
    sources, folder = dict(module_sources(split)), cache_folder()
    stats = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in sources.items()]
    parser = [work.__code__.co_code for work in (_docstrings, _walk)]
    key = hashlib.sha256(repr((sys.version, parser, stats)).encode()).hexdigest()
    kept = None if folder is None else folder / f"{split}{TEXTS}"
    with contextlib.suppress(InvarlockError, LookupError, TypeError):
        found = read_json(kept, "the kept texts") if kept and kept.exists() else {}
        if found["key"] == key:
            return dict(found["texts"])
    texts = {name: _docstrings(path) for name, path in sources.items()}
    if kept:
        # a folder that cannot be written to: the next command parses again
        with contextlib.suppress(ConfigError, OSError):
            write_whole(kept, json.dumps({"key": key, "texts": texts}))
    return texts


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
    for path in sorted(_files(root)):
        parts = path.relative_to(root).with_suffix("").parts
        if all(part.isidentifier() for part in parts):
            document = "module:" + ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if split in ("all", split_of(document)):
                yield document, path


def _files(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _LEFT_OUT]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


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
