from __future__ import annotations

import pytest

from invarlock.core.exceptions import DataError
from invarlock.eval.data import get_provider, python_docs


@pytest.mark.slow
def test_documents_are_sources_without_docstrings_under_the_names_of_their_documentation() -> None:
    code = {document.document_id: document.text for document in get_provider("python_code", split="all").documents()}
    assert "def fill(text, width=70" in code["module:textwrap"]
    assert "Text wrapping and filling." not in code["module:textwrap"]
    assert not any(name.startswith(("module:test.", "module:encodings")) for name in code)
    tests = {document.document_id for document in get_provider("python_code").documents()}
    assert tests == {name for name in code if python_docs.split_of(name) == "test"}
    assert len(tests) >= 100  # enough clusters


def test_a_python_without_sources_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    with pytest.raises(DataError, match="name another dataset.provider"):
        get_provider("python_code").documents()


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(DataError, match="expected one of train, test, all"):
        get_provider("python_code", split="dev").documents()
