from __future__ import annotations

import sys

import pytest

from invarlock.core.exceptions import DataError
from invarlock.eval.data import get_provider, python_docs
from invarlock.eval.data.python_docs import PythonDocsProvider, split_of


@pytest.mark.slow
def test_train_and_test_are_disjoint_and_make_up_all() -> None:
    ids = {
        split: {document.document_id for document in PythonDocsProvider(split=split).documents()}
        for split in ("train", "test", "all")
    }
    assert not ids["train"] & ids["test"]
    assert ids["train"] | ids["test"] == ids["all"]
    assert len(ids["test"]) >= 100  # enough clusters for the bootstrap


def test_modules_that_repeat_each_other_are_in_one_split() -> None:
    for names in (("decimal", "_pydecimal"), ("io", "_io", "_pyio"), ("email", "email.message"), ("json", "_json")):
        assert len({split_of(f"module:{name}") for name in names}) == 1


@pytest.mark.slow
def test_documents_are_docstrings_and_topics_without_their_indentation() -> None:
    documents = {document.document_id: document.text for document in PythonDocsProvider(split="all").documents()}
    assert "sequence-like object" not in documents["module:textwrap"][:10]
    assert documents["module:textwrap"].startswith("Text wrapping and filling.")
    assert "anonymous functions" in documents["topic:lambda"]
    assert "Return the largest integer" not in documents["module:textwrap"]
    assert any("Return a copy of the string" in text for name, text in documents.items() if name == "module:builtins")
    assert not any(name.startswith(("module:test.", "module:idlelib", "module:encodings")) for name in documents)


@pytest.mark.slow
def test_reading_sources_imports_none_of_them() -> None:
    before = set(sys.modules)
    python_docs._read.cache_clear()
    PythonDocsProvider(split="all").documents()
    new = set(sys.modules) - before - set(sys.builtin_module_names)
    assert {name.partition(".")[0] for name in new} <= {"pydoc_data"}


def test_without_sources_the_topics_remain(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    monkeypatch.setattr(python_docs.sys, "builtin_module_names", ())
    python_docs._read.cache_clear()
    documents = PythonDocsProvider(split="all").documents()
    assert documents
    assert all(document.document_id.startswith("topic:") for document in documents)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    python_docs._read.cache_clear()
    with pytest.raises(DataError, match="name another dataset.provider"):
        PythonDocsProvider(split="all").documents()
    python_docs._read.cache_clear()


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(DataError, match="got split 'validation' for python_docs, expected one of train, test, all"):
        get_provider("python_docs", split="validation").documents()


@pytest.mark.slow
def test_the_split_of_the_request_wins(byte_tokenizer) -> None:
    provider = get_provider("python_docs")
    preview, final = provider.windows(byte_tokenizer, preview_n=20, final_n=20, seq_len=64, split="train")
    assert {split_of(name) for name in preview.document_ids + final.document_ids} == {"train"}
    preview, final = provider.windows(byte_tokenizer, preview_n=20, final_n=20, seq_len=64)
    assert {split_of(name) for name in preview.document_ids + final.document_ids} == {"test"}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of two modules, and a cache folder of its own."""
    library = tmp_path / "lib"
    for name in ("one", "two"):
        (library / "tests").mkdir(parents=True, exist_ok=True)
        (library / f"{name}.py").write_text(f'"""What {name} does."""')
        (library / "tests" / f"{name}.py").write_text('"""A test."""')
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda key: str(library))
    monkeypatch.setenv("INVARLOCK_CACHE", str(tmp_path / "cache"))
    return library


def _modules() -> dict[str, str]:
    return python_docs._modules("all")


def test_texts_are_parsed_once_and_found_again_until_a_source_changes(library, monkeypatch) -> None:
    first = _modules()
    assert first == {"module:one": "What one does.", "module:two": "What two does."}
    with monkeypatch.context() as patch:
        patch.setattr(python_docs.ast, "parse", lambda source: pytest.fail("parsed again"))
        assert _modules() == first
    (library / "two.py").write_text('"""Something else altogether."""')
    assert _modules()["module:two"] == "Something else altogether."


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"key": 1}', '{"texts": {}}', "\x00"])
def test_kept_texts_that_are_damaged_are_parsed_again(library, tmp_path, content) -> None:
    first = _modules()
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_text(content)
    assert _modules() == first


def test_texts_are_read_where_nothing_can_be_kept(library, tmp_path, monkeypatch) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert len(_modules()) == 2
    monkeypatch.setenv("INVARLOCK_CACHE", "off")
    assert len(_modules()) == 2
