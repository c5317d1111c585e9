from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from invarlock.core.exceptions import ConfigError, DataError
from invarlock.eval.data import get_provider


def write(path: Path, *records: Any) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def test_each_line_is_a_document_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "first"}\n\n{"text": "third — \\u00fc", "x": 1}\n', "utf-8")
    assert get_provider("local_jsonl", file=str(path)).documents() == [
        ("texts.jsonl:1", "first"),
        ("texts.jsonl:3", "third — ü"),
    ]


def test_one_file_several_files_a_pattern_and_a_folder_are_all_read(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", {"body": "one"})
    b = write(tmp_path / "b.jsonl", {"body": "two"})
    expected = [("a.jsonl:1", "one"), ("b.jsonl:1", "two")]
    for options in ({"data_files": [str(a), b]}, {"file": str(tmp_path / "*.jsonl")}, {"path": tmp_path}):
        assert get_provider("local_jsonl", text_field="body", **options).documents() == expected
    assert get_provider("local_jsonl", text_field="body", path=a).documents() == expected[:1]


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = [write(tmp_path / folder / "data.jsonl", {"text": folder}) for folder in ("x", "y")]
    documents = get_provider("local_jsonl", data_files=paths).documents()
    assert documents == [("x/data.jsonl:1", "x"), ("y/data.jsonl:1", "y")]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "essay.txt").write_text("One.\n\nTwo.\n", "utf-8")
    assert get_provider("local_jsonl", file=tmp_path / "essay.txt").documents() == [("essay.txt", "One.\n\nTwo.\n")]


def test_pairs_are_read_by_their_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"en": "yes", "de": "ja"}, {"en": "no", "de": "nein"})
    pairs = get_provider("local_jsonl_pairs", file=path, src_field="en", tgt_field="de").pairs()
    assert [(pair.document_id, pair.source, pair.target) for pair in pairs] == [
        ("p.jsonl:1", "yes", "ja"),
        ("p.jsonl:2", "no", "nein"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "ok"}\n{"text": "cut o', r"bad.jsonl line 2 is not JSON \(Unterminated string .* at column 10\)"),
        (b'{"text": "ok"}\n["text"]\n', "bad.jsonl line 2: got a JSON list, expected an object"),
        (b'{"body": "x", "id": 1}\n', "line 1 has no field 'text': got fields 'body', 'id'"),
        (b"{}\n", "line 1 has no field 'text': got fields none"),
        (b'{"text": 5}\n', "line 1: field 'text' is int, expected text"),
        (b'{"text": "ok"}\n{"text": "caf\xe9"}\n', "bad.jsonl line 2 is not UTF-8 .byte 0xe9"),
    ],
)
def test_a_broken_file_is_named_with_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        get_provider("local_jsonl", file=path).documents()
    assert "\n" not in str(caught.value)


def test_missing_and_ambiguous_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data file at '.*none.jsonl'"):
        get_provider("local_jsonl", file=tmp_path / "none.jsonl").documents()
    with pytest.raises(DataError, match="got 0 of file, path and data_files"):
        get_provider("local_jsonl").documents()
    with pytest.raises(DataError, match="got 2 of file, path and data_files"):
        get_provider("local_jsonl", file="a", path="b").documents()


def test_an_empty_file_is_an_empty_data_set(tmp_path: Path, byte_tokenizer) -> None:
    with pytest.raises(DataError, match="is empty"):
        get_provider("local_jsonl", file=write(tmp_path / "empty.jsonl")).windows(
            byte_tokenizer, preview_n=1, final_n=1, seq_len=8
        )


def test_windows_from_a_file_carry_its_line_as_document(tmp_path: Path, byte_tokenizer) -> None:
    path = write(tmp_path / "t.jsonl", *({"text": f"line number {i} of the file"} for i in range(6)))
    preview, final = get_provider("local_jsonl", file=path).windows(byte_tokenizer, preview_n=3, final_n=3, seq_len=64)
    assert sorted(preview.document_ids + final.document_ids) == [f"t.jsonl:{i}" for i in range(1, 7)]


def test_a_split_that_files_do_not_have_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "one two three"}\n')
    with pytest.raises(ConfigError, match=r"dataset.split is 'test', and files have no splits"):
        get_provider("local_jsonl", file=str(path)).documents("test")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00rest\n", "is gzip.*gunzip"),
        ("a.parquet", b"PAR1rest\n", "is parquet.*hf_text"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer.*git lfs pull"),
        ("a.json", b'[{"text": "a"}]\n', "one JSON array.*one object a line"),
        ("a.csv", b"text,label\na,1\n", "is a table.*to_json"),
        ("chat.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n', "is a chat.*apply_chat_template"),
    ],
)
def test_a_file_of_another_kind_is_named_with_what_to_do(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        get_provider("local_jsonl", file=path).documents()


def test_a_folder_of_texts_is_one_document_a_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}\r\nof two lines", encoding="utf-8")
    found = get_provider("local_jsonl", file=tmp_path).documents()
    assert [(each.document_id, each.text[:6]) for each in found] == [("a.txt", "text a"), ("b.txt", "text b")]
    (tmp_path / "c.jsonl").write_text('{"text": "lines go before"}\n')
    assert [each.document_id for each in get_provider("local_jsonl", file=tmp_path).documents()] == ["c.jsonl:1"]
