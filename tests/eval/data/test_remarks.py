"""What data hold that a reader should know: repeats count once, what is left out, cut off or mended is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from invarlock.eval.data import get_provider
from invarlock.evidence.windows import IGNORED

TEXT = "one two three four five six seven eight nine ten eleven twelve"


def words(text: list[str] | str | None = None, text_target: list[str] | None = None, **options: Any) -> dict[str, Any]:
    if isinstance(text, str):
        return {"input_ids": [len(word) for word in text.split()]}
    return {"input_ids": [[len(word) for word in each.split()] for each in (text or text_target or [])]}


def _file(folder: Path, *rows: dict[str, str]) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _texts(*texts: str) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


def test_copies_of_a_document_are_one_document_and_stand_in_one_part(tmp_path: Path) -> None:
    path = _file(tmp_path, *_texts(*[TEXT] * 6, *(f"{TEXT} {number * 'x'}" for number in range(1, 5))))
    provider = get_provider("local_jsonl", file=path)
    preview, final = provider.windows(words, preview_n=4, final_n=4, seq_len=16)
    assert set(preview.document_ids).isdisjoint(final.document_ids)
    assert {tuple(ids) for ids in preview.input_ids}.isdisjoint(map(tuple, final.input_ids))
    assert len({*preview.document_ids, *final.document_ids}) <= 5
    assert len({*preview.window_ids, *final.window_ids}) == 8
    assert provider.remarks == ("5 x text with the content of another: they count as one document",)


def test_texts_that_differ_in_blanks_are_copies(tmp_path: Path) -> None:
    copies = (TEXT, f"{TEXT}\n", f"  {TEXT}", TEXT.replace(" ", "  "))
    path = _file(tmp_path, *_texts(*copies, *(f"{TEXT} {number * 'x'}" for number in range(1, 5))))
    provider = get_provider("local_jsonl", file=path)
    preview, final = provider.windows(words, preview_n=4, final_n=4, seq_len=16)
    assert len({*preview.document_ids, *final.document_ids}) == 5
    assert provider.remarks == ("3 x text with the content of another: they count as one document",)


def test_empty_rows_and_half_pairs_are_said(tmp_path: Path) -> None:
    provider = get_provider("local_jsonl", file=_file(tmp_path, *_texts(TEXT, "", "  ", f"{TEXT} \ud83d")))
    preview, _ = provider.windows(words, preview_n=1, final_n=1, seq_len=16)
    assert len(preview) == 1
    assert any("half a surrogate pair" in line for line in provider.remarks)
    assert "2 x text without content left out" in provider.remarks


def test_pairs_for_a_model_that_continues_text_are_joined_with_the_source_unscored(tmp_path: Path) -> None:
    rows = [{"source": f"a bb ccc {'d' * number}", "target": "eeeee ffffff"} for number in range(1, 9)]
    provider = get_provider("local_jsonl_pairs", file=_file(tmp_path, *rows))
    preview, final = provider.windows(words, preview_n=2, final_n=2, seq_len=5, joined=True)
    for ids, labels in zip(
        preview.input_ids + final.input_ids, (preview.labels or []) + (final.labels or []), strict=True
    ):
        assert ids[-2:] == labels[-2:] == [5, 6]
        assert labels[:-2] == [IGNORED] * 3 and ids[:2] == [2, 3]
    assert [line.partition(" ")[2] for line in provider.remarks] == ["x pairs cut off at 5 tokens"]


@pytest.mark.parametrize("length", [4, 5, 6])
def test_pairs_that_are_cut_off_are_counted(tmp_path: Path, length: int) -> None:
    rows = [{"source": f"{'a ' * 5}", "target": f"b {number * 'c'}"} for number in range(1, 5)]
    provider = get_provider("local_jsonl_pairs", file=_file(tmp_path, *rows))
    provider.windows(words, preview_n=2, final_n=2, seq_len=length)
    assert bool(provider.remarks) is (length < 5)
