from __future__ import annotations

import pytest

from invarlock.core.exceptions import ConfigError
from invarlock.eval.data import get_provider


def test_synthetic_text_never_changes() -> None:
    documents = get_provider("synthetic", count=3, sentences=2).documents()
    assert documents[0].document_id == "synthetic:test:0"
    assert documents[0].text == (
        "One engine again watches the early mirror. "
        "Every bridge that answers the river quickly finds some clever forest."
    )
    assert len({document.text for document in documents}) == 3
    assert get_provider("synthetic", count=3, sentences=2, split="train").documents()[0].text != documents[0].text


def test_reversed_pairs_are_reversed() -> None:
    pairs = get_provider("seq2seq", task="reverse", count=50).pairs()
    assert len({pair.pair_id for pair in pairs}) == 50
    assert all(pair.source.split()[::-1] == pair.target.split() for pair in pairs)


@pytest.mark.slow
def test_continuations_join_up_to_stretches_of_one_document() -> None:
    texts = dict(get_provider("python_docs").documents())
    pairs = get_provider("seq2seq").pairs()
    assert len({pair.document_id for pair in pairs}) >= 100
    assert len({pair.pair_id for pair in pairs}) == len(pairs) >= 800
    assert all(pair.source + pair.target in texts[pair.document_id] for pair in pairs)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("seq2seq", {"task": "translate"}, "got task 'translate'.*'continue' or 'reverse'"),
        ("seq2seq", {"words": 1}, "got words=1"),
        ("synthetic", {"count": 0}, "got count=0"),
    ],
)
def test_impossible_options_are_refused(name: str, options: dict[str, object], message: str) -> None:
    provider = get_provider(name, **options)
    with pytest.raises(ConfigError, match=message):
        provider.pairs() if name == "seq2seq" else provider.documents()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["synthetic", "seq2seq"])
def test_generated_data_serve_the_largest_profile(name: str, byte_tokenizer) -> None:
    preview, final = get_provider(name).windows(byte_tokenizer, preview_n=400, final_n=400, seq_len=512)
    assert len(set(preview.window_ids + final.window_ids)) == 800
