"""Which tokenizer a checkpoint has, told by what it does and not by the form of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["cut_differently", "encoded_differently", "special_tokens_around", "tokenizer_facts", "tokenizer_usage"]

_PROBE = "The quick brown fox — 1,234.5 naïve cafés; def f(x):\n\treturn x**2  # ok?"
#: what tells the common rules of cutting text apart: runs of digits and blanks, contractions, scripts, marks, symbols
_CUTS = (
    _PROBE, "0 12 345 6789 1234567890123", "  two   spaces\t\ttabs \n\n\n lines \r\n",
    "I'LL can't we've O'Neill 'S it's", "ÀÉî Straße ﬁne Ω≈ç√ 3.14e-10 #$%^&*()_+{}|:<>?", "e\u0301a\u0300 🚀🇩🇪 ☃️",
    "Нельзя 你好，世界 こんにちは 한국어 ไทย हिन्दी שלום مرحبا", "camelCaseHTTPServer snake_case __init__ //comment\n/* x */",
    "<|endoftext|> <s> </s> [INST] [MASK]",
)  # fmt: skip
_SPREAD = 4096
_PER_CALL = ("version", "truncation", "padding")  # in the serialised state, and no part of what a checkpoint says
_NO_IDS = ("trim_offsets", "special")  # settings that change no id
_BATCH = 64
_WORD = "x"
_Name = TypeVar("_Name")


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase | None, version: int = 2) -> tuple[str | None, int | None]:
    """Return (digest, number of tokens).

    The digest covers everything that encodes and decodes, the added tokens with their flags and the roles of special
    tokens. Version 1, which stored baselines of the first release have, covers the vocabulary, the special tokens and one
    probe text.
    """
    if tokenizer is None:
        return None, None
    if version == 1:
        specials = sorted({str(token) for token in tokenizer.all_special_tokens})
        covered: object = [sorted(tokenizer.get_vocab().items()), specials, tokenizer(_PROBE)["input_ids"]]
    else:
        covered = [_state(tokenizer), _roles(tokenizer), _special(tokenizer)]
    return _digest(covered), len(tokenizer)


def tokenizer_usage(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what tells a tokenizer that encodes otherwise from one whose special tokens have other roles.

    `encoding` is the digest without the roles, `first_digest` the one of version 1. `effect` is what stays the same where
    a tokenizer was made again out of another format's metadata: ids of all tokens, and how texts and tokens are cut.
    """
    first, _ = tokenizer_facts(tokenizer, version=1)
    roles, encoding, effect = _roles(tokenizer), _digest(_state(tokenizer)), _digest(_effect(tokenizer))
    return {"roles": roles, "encoding": encoding, "first_digest": first, "effect": effect}


def _effect(tokenizer: PreTrainedTokenizerBase) -> list[object]:
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    tokens = [[number] for _, number in vocabulary[:: -(-len(vocabulary) // _SPREAD)]]
    texts = [*_CUTS, *(tokenizer.decode(token, clean_up_tokenization_spaces=False) for token in tokens)]
    return [
        vocabulary,
        tokenizer(texts, verbose=False, add_special_tokens=False)["input_ids"],
        tokenizer("a")["input_ids"],
    ]


def special_tokens_around(tokenizer: Callable[..., Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer itself puts (before, after) a text."""
    bare, whole = (
        [int(token) for token in tokenizer([_WORD], add_special_tokens=special, verbose=False)["input_ids"][0]]
        for special in (False, True)
    )
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []  # one that encodes the text itself otherwise with them


def encoded_differently(
    ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[int]:
    """Return which of the texts the two encode differently, special tokens included, by their places.

    Two fast tokenizers of one class of the library that hold the same state encode alike, so that nothing is encoded.
    """
    if _library_owned(ours) and type(ours) is type(theirs) and _state(ours) == _state(theirs):
        return []
    found: list[int] = []
    for start in range(0, len(texts), _BATCH):
        batch: list[str] = list(texts[start : start + _BATCH])
        sides = (tokenizer(batch, verbose=False)["input_ids"] for tokenizer in (ours, theirs))
        pairs = enumerate(zip(next(sides), next(sides), strict=True), start)
        found += [place for place, (here, there) in pairs if here != there]
    return found


def cut_differently(
    tokenizer: PreTrainedTokenizerBase, texts: Mapping[_Name, str], cuts: Mapping[_Name, Iterable[Sequence[int]]]
) -> list[_Name]:
    """Return the names of the texts of which a tokenizer does not give the pieces that `cuts` holds of them, in order."""
    found = []
    for name, text in texts.items():
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not all(_within(list(piece), ids) for piece in cuts.get(name, ())):
            found.append(name)
    return found


def _library_owned(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether all that a tokenizer does is in its serialised state: a slow one, or one with code of its own, may do more."""
    return hasattr(tokenizer, "backend_tokenizer") and type(tokenizer).__module__.startswith("transformers.")


def _within(piece: list[int], ids: list[int]) -> bool:
    starts = (place for place, token in enumerate(ids) if token == piece[0])
    return any(ids[start : start + len(piece)] == piece for start in starts)


def _state(tokenizer: PreTrainedTokenizerBase) -> list[object]:
    """Return all that decides ids and text. A slow tokenizer has no serialised state: its vocabulary and flags stand in."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        added = [
            [number, token.content, token.lstrip, token.rstrip, token.single_word, token.normalized]
            for number, token in sorted(tokenizer.added_tokens_decoder.items())
        ]
        state: object = [sorted(tokenizer.get_vocab().items()), added]
    else:
        serialised = json.loads(backend.to_str())
        state = {key: _plain(value) for key, value in serialised.items() if key not in _PER_CALL}
    return [state, tokenizer(_PROBE, verbose=False)["input_ids"]]


def _plain(value: object) -> object:
    """Return serialised state without what releases write in several ways: null for a default, a merge as one text."""
    if isinstance(value, dict):
        kept = {key: entry for key, entry in value.items() if entry is not None and key not in _NO_IDS}
        return {key: entry if key == "vocab" else _plain(entry) for key, entry in kept.items()} | (
            {"merges": [merge if isinstance(merge, list) else merge.split(" ") for merge in kept["merges"]]}
            if "merges" in kept
            else {}
        )
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def _roles(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    named = tokenizer.special_tokens_map.items()
    return {role: str(token) for role, token in sorted(named) if not isinstance(token, (list, tuple, dict))}


def _special(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    flagged = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(flagged | {str(token) for token in tokenizer.all_special_tokens})


def _digest(covered: object) -> str:
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()[:32]
