"""Which tokenizer a checkpoint has, told by what it does and not by the form of its files."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["tokenizer_facts"]

_PROBE = "The quick brown fox — 1,234.5 naïve cafés; def f(x):\n\treturn x**2  # ok?"


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase | None) -> tuple[str | None, int | None]:
    """Return (digest, number of tokens). The digest covers the vocabulary, the special tokens and how a probe text is
    encoded, and not the form of the files, which re-saving changes."""
    if tokenizer is None:
        return None, None
    vocabulary = sorted(tokenizer.get_vocab().items())
    specials = sorted({str(token) for token in tokenizer.all_special_tokens})
    encoded = tokenizer(_PROBE)["input_ids"]
    text = json.dumps([vocabulary, specials, encoded], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32], len(tokenizer)
