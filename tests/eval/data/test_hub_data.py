"""Data sets read by the `datasets` library, from local folders: nothing here touches the network."""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
import pytest

from invarlock.core.exceptions import ConfigError, DataError, DependencyError, NetworkError
from invarlock.eval.data import Wikitext2Provider, get_provider

ROWS = {"body": ["first text", "second text", "third text"], "pair": [{"en": f"s{i}", "de": f"t{i}"} for i in range(3)]}
# The layout of wikitext-2-raw-v1: a row a line, titles between blank rows, sections with two signs and more.
WIKITEXT = [
    "", " = Robert <unk> = \n", "", " Robert is an actor . \n", "", " = = Career = = \n", "", " He had a role . \n",
    " He had x = 3 = y . \n", "", " = Du Fu = \n", "", " Du Fu was a poet . \n",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("INVARLOCK_ALLOW_NETWORK", raising=False)


@pytest.fixture(params=["parquet", "jsonl", "saved_dict"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    rows = datasets.Dataset.from_dict(ROWS)
    path = tmp_path / "corpus"
    path.mkdir()
    if request.param == "parquet":
        rows.to_parquet(path / "test.parquet")
    elif request.param == "jsonl":
        rows.to_json(path / "test.jsonl")
    else:
        datasets.DatasetDict({"test": rows}).save_to_disk(path)
    return str(path)


@pytest.mark.slow
def test_a_local_folder_is_read_whatever_its_format(folder: str) -> None:
    provider = get_provider("hf_text", dataset_name=folder, text_field="body", split="test")
    assert provider.documents() == [(f"corpus:test:{i}", text) for i, text in enumerate(ROWS["body"])]


def test_a_set_saved_without_splits_has_none_to_choose(tmp_path: Path) -> None:
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "corpus")
    options = {"dataset_name": str(tmp_path / "corpus"), "text_field": "body"}
    whole = get_provider("hf_text", **options)
    assert whole.documents() == [(f"corpus:data:{i}", text) for i, text in enumerate(ROWS["body"])]
    with pytest.raises(DataError, match="without splits"):
        get_provider("hf_text", split="test", **options).documents()


def test_pairs_may_be_nested(folder: str) -> None:
    options = {"dataset_name": folder, "src_field": "pair.en", "tgt_field": "pair.de", "split": "test"}
    pairs = get_provider({"kind": "hf_seq2seq", **options}).pairs()
    assert [(pair.source, pair.target) for pair in pairs] == [("s0", "t0"), ("s1", "t1"), ("s2", "t2")]


@pytest.mark.parametrize(("split", "rows"), [("test[:2]", [0, 1]), ("test[1:]", [1, 2]), ("test[:50%]", [0])])
def test_a_part_of_a_split_can_be_asked_for(tmp_path: Path, split: str, rows: list[int]) -> None:
    datasets.Dataset.from_dict(ROWS).to_parquet(tmp_path / "test.parquet")
    documents = get_provider("hf_text", dataset_name=str(tmp_path), text_field="body", split=split).documents()
    assert [document.text for document in documents] == [ROWS["body"][i] for i in rows]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "validation"}, "has no split 'validation': got test"),
        ({"split": "test[a]"}, r"got split 'test\[a\]'"),
        ({}, "has no field 'text': got fields 'body', 'pair'"),
        ({"text_field": "pair"}, "row 0 of .* field 'pair' is dict, expected text"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(tmp_path: Path, options: dict[str, str], message: str) -> None:
    datasets.Dataset.from_dict(ROWS).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(DataError, match=message):
        get_provider("hf_text", dataset_name=str(tmp_path), **options).documents()


def test_an_unreadable_folder_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="cannot read the data set"):
        get_provider("hf_text", dataset_name=str(tmp_path)).documents()
    with pytest.raises(ConfigError, match="needs 'dataset_name'"):
        get_provider("hf_text").documents()


@pytest.mark.parametrize(
    "provider", [get_provider("hf_text", dataset_name="someone/something"), get_provider("wikitext2")]
)
def test_uncached_data_name_the_variable_that_allows_the_network(provider) -> None:
    with pytest.raises(NetworkError, match="INVARLOCK_ALLOW_NETWORK=1") as caught:
        provider.documents()
    assert "\n" not in str(caught.value)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError, match=r'pip install "invarlock\[eval\]"'):
        get_provider("wikitext2").documents()


def test_wikitext_rows_become_articles(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": WIKITEXT}).to_parquet(tmp_path / "validation.parquet")
    documents = Wikitext2Provider(dataset_name=str(tmp_path)).documents()
    assert [document.document_id for document in documents] == ["validation:0:Robert <unk>", "validation:1:Du Fu"]
    assert documents[0].text.endswith("He had x = 3 = y .")
    assert " = = Career = = " in documents[0].text
    assert documents[1].text.startswith("= Du Fu =")


def test_wikitext_is_cached_only_when_its_table_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert not Wikitext2Provider.is_cached()
    folder = tmp_path / "datasets" / "Salesforce___wikitext" / "wikitext-2-raw-v1" / "0.0.0" / "abc"
    folder.mkdir(parents=True)
    assert not Wikitext2Provider.is_cached()
    (folder / "wikitext-validation.arrow").touch()
    assert Wikitext2Provider.is_cached()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("readme.md", b"x", "holds no data file"),
        (
            "data/train.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "Git LFS pointer.*git lfs pull",
        ),
    ],
)
def test_a_folder_that_holds_no_rows_is_refused_before_it_is_searched(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        get_provider("hf_text", dataset_name=str(tmp_path)).documents()


def test_a_file_in_place_of_a_folder_is_answered_with_the_provider_that_reads_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="no such folder.*local_jsonl"):
        get_provider("hf_text", dataset_name=str(tmp_path / "a.jsonl")).documents()
