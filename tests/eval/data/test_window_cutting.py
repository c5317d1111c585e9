"""How documents become windows, on a provider whose texts are known byte by byte."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from invarlock.core.exceptions import DataError
from invarlock.eval.data import Document, EvaluationWindow, Pair, PairProvider, TextProvider, provider_digest


@dataclass(frozen=True)
class Texts(TextProvider):
    name: ClassVar[str] = "texts"
    content: tuple[str, ...] = ()

    def documents(self, split: str | None = None) -> list[Document]:
        return [Document(f"doc:{i}", text) for i, text in enumerate(self.content)]


@dataclass(frozen=True)
class Pairs(PairProvider):
    name: ClassVar[str] = "pairs"
    content: tuple[tuple[str, str], ...] = ()

    def pairs(self, split: str | None = None) -> list[Pair]:
        return [Pair(f"p{i}", f"doc:{i // 2}", source, target) for i, (source, target) in enumerate(self.content)]


def text(seed: int, length: int) -> str:
    """ASCII in which every 8 bytes are different from all others, so that a piece has one place it comes from."""
    return "".join(f"{seed:03d}{i:05d}" for i in range(length // 8 + 1))[:length]


CORPUS = Texts(content=tuple(text(seed, 20 + 37 * seed) for seed in range(30)))


def cut(provider: Any, tokenizer: Any, **changes: Any) -> tuple[EvaluationWindow, EvaluationWindow]:
    request = {"preview_n": 20, "final_n": 25, "seq_len": 32} | changes
    return provider.windows(tokenizer, **request)


def pieces(tokenizer: Any, *sets: EvaluationWindow) -> list[tuple[str, str]]:
    return [
        (document_id, tokenizer.decode(ids))
        for window in sets
        for document_id, ids in zip(window.document_ids, window.input_ids, strict=True)
    ]


def test_counts_lengths_and_masks_are_as_asked(byte_tokenizer) -> None:
    preview, final = cut(CORPUS, byte_tokenizer)
    assert (len(preview), len(final)) == (20, 25)
    for window in (preview, final):
        assert window.labels is None
        assert all(9 <= len(ids) <= 32 for ids in window.input_ids)
        assert [[1] * len(ids) for ids in window.input_ids] == window.attention_masks
        assert all(len(window_id) == 16 and int(window_id, 16) >= 0 for window_id in window.window_ids)


def test_each_window_is_an_unpadded_stretch_of_its_own_document(byte_tokenizer) -> None:
    for document_id, piece in pieces(byte_tokenizer, *cut(CORPUS, byte_tokenizer)):
        assert piece in CORPUS.content[int(document_id[4:])]


@pytest.mark.parametrize("stride", [32, 40])
def test_windows_never_overlap_at_full_stride(byte_tokenizer, stride: int) -> None:
    covered: Counter[tuple[str, int]] = Counter()
    for document_id, piece in pieces(byte_tokenizer, *cut(CORPUS, byte_tokenizer, stride=stride, final_n=200)):
        start = CORPUS.content[int(document_id[4:])].index(piece)
        covered.update((document_id, start + i) for i in range(len(piece)))
    assert max(covered.values()) == 1


def test_overlapping_windows_still_share_no_document_between_preview_and_final(byte_tokenizer) -> None:
    preview, final = cut(CORPUS, byte_tokenizer, stride=8, preview_n=100, final_n=60)
    assert not set(preview.document_ids) & set(final.document_ids)
    assert len(set(preview.window_ids) | set(final.window_ids)) == 160


def test_as_many_documents_as_possible_are_used(byte_tokenizer) -> None:
    preview, final = cut(CORPUS, byte_tokenizer, preview_n=15, final_n=15)
    assert len(set(preview.document_ids + final.document_ids)) == 30
    used = Counter(sum((list(w.document_ids) for w in cut(CORPUS, byte_tokenizer, preview_n=40, final_n=40)), []))
    assert len(used) == 30
    assert max(used.values()) - 1 <= 4  # dealt in rounds: nobody gets far ahead


def test_the_same_request_gives_the_same_windows_and_another_seed_others(byte_tokenizer) -> None:
    first, again = cut(CORPUS, byte_tokenizer), cut(CORPUS, byte_tokenizer)
    other = cut(CORPUS, byte_tokenizer, seed=43)
    assert first == again
    assert provider_digest(*first) == provider_digest(*again) != provider_digest(*other)


def test_windows_do_not_depend_on_the_order_of_the_documents(byte_tokenizer) -> None:
    class Shuffled(Texts):
        def documents(self, split: str | None = None) -> list[Document]:
            return super().documents(split)[::-1]

    assert cut(Shuffled(content=CORPUS.content), byte_tokenizer) == cut(CORPUS, byte_tokenizer)


def test_windows_stay_what_they_were_in_the_first_release(byte_tokenizer) -> None:
    """Stored baselines are found again by these ids: a change here breaks every one of them."""
    preview, final = cut(CORPUS, byte_tokenizer)
    assert {"765eadad701d598f", "f4513919dd9cd92f"} <= set(preview.window_ids)
    assert provider_digest(preview, final)[:16] == "16a854e18c714818"


def test_the_digest_sees_every_id_and_token(byte_tokenizer) -> None:
    def windows(ids: list[int], window_id: str = "w", document_id: str = "d", labels: Any = None) -> EvaluationWindow:
        return EvaluationWindow([ids], [[1] * len(ids)], [window_id], [document_id], labels)

    empty = EvaluationWindow()
    variants = [
        windows([1, 2]), windows([1, 3]), windows([1, 2], "v"), windows([1, 2], document_id="e"),
        windows([1, 2], labels=[[4]]),
    ]  # fmt: skip
    digests = {provider_digest(variant, empty) for variant in variants} | {provider_digest(empty, variants[0])}
    assert len(digests) == len(variants) + 1


def test_texts_with_fewer_than_eight_scored_tokens_are_left_out(byte_tokenizer) -> None:
    corpus = Texts(content=("8 bytes.", "nine byte", "  \n", "ten bytes!"))
    preview, final = cut(corpus, byte_tokenizer, preview_n=1, final_n=1)
    assert {piece for _, piece in pieces(byte_tokenizer, preview, final)} == {"nine byte", "ten bytes!"}


def test_too_little_text_says_which_counts_would_fit(byte_tokenizer) -> None:
    corpus = Texts(content=tuple(text(seed, 32) for seed in range(37)))
    with pytest.raises(DataError) as caught:
        cut(corpus, byte_tokenizer, preview_n=32, final_n=32)
    assert "got 37 windows from 37 documents, expected 64 (32 preview + 32 final)" in str(caught.value)
    assert "preview_n=18 and final_n=18" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(cut(corpus, byte_tokenizer, preview_n=18, final_n=18)[0]) == 18


def test_too_little_text_for_overlapping_windows_says_so_too(byte_tokenizer) -> None:
    corpus = Texts(content=(text(1, 48), text(2, 48)))
    with pytest.raises(DataError, match="preview_n=3 and final_n=3"):
        cut(corpus, byte_tokenizer, stride=8, preview_n=4, final_n=4)
    assert len(cut(corpus, byte_tokenizer, stride=8, preview_n=3, final_n=3)[1]) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 1}, "seq_len=1"),
        ({"preview_n": -1}, "preview_n=-1"),
        ({"final_n": -2}, "final_n=-2"),
        ({"preview_n": 0, "final_n": 0}, "at least one window"),
        ({"stride": 0}, "stride=0"),
    ],
)
def test_impossible_requests_are_refused(byte_tokenizer, changes: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        cut(CORPUS, byte_tokenizer, **changes)


@pytest.mark.parametrize("provider", [Texts(), Texts(content=("", " \n")), Pairs(), Pairs(content=(("a", " "),))])
def test_a_data_set_without_text_is_called_empty(byte_tokenizer, provider) -> None:
    with pytest.raises(DataError, match="is empty"):
        cut(provider, byte_tokenizer)


@pytest.mark.parametrize(("wanted", "left"), [("1", 2), ("0", 3)])
def test_exact_duplicates_are_dropped_on_demand(byte_tokenizer, monkeypatch, wanted: str, left: int) -> None:
    monkeypatch.setenv("INVARLOCK_DEDUP_TEXTS", wanted)
    for corpus in (
        Texts(content=(text(1, 30), text(2, 30), text(1, 30))),
        Pairs(content=(("a", "b"), ("c", "d"), ("a", "b"))),
    ):
        with pytest.raises(DataError, match=f"got {left} windows"):
            cut(corpus, byte_tokenizer)


def test_pairs_keep_source_and_target_with_their_end_tokens(byte_tokenizer) -> None:
    provider = Pairs(content=tuple((f"source {i}", f"target {i} " * 9) for i in range(8)))
    preview, final = provider.windows(byte_tokenizer, preview_n=4, final_n=4, seq_len=24)
    seen = set()
    for window in (preview, final):
        assert window.labels is not None
        for source, target in zip(window.input_ids, window.labels, strict=True):
            number = byte_tokenizer.decode(source, skip_special_tokens=True).removeprefix("source ")
            assert byte_tokenizer.decode(target, skip_special_tokens=True).startswith(f"target {number} ")
            assert source[-1] == target[-1] == 1
            assert len(target) == 24
            seen.add(number)
    assert len(seen) == 8
    assert Counter(preview.document_ids + final.document_ids) == {f"doc:{i}": 2 for i in range(4)}


def test_describe_gives_name_and_set_options_as_plain_data() -> None:
    assert Texts(split="train", content=("a",)).describe() == {
        "name": "texts",
        "options": {"split": "train", "content": ("a",)},
    }
