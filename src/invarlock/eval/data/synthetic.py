"""Generated text, for smoke tests, and generated pairs.

Nothing here depends on a library's random generator: choices come from SHA-256, so that the text never changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from invarlock.core.exceptions import ConfigError
from invarlock.eval.data.base import Document, Pair, PairProvider, TextProvider
from invarlock.eval.data.python_docs import PythonDocsProvider

__all__ = ["SyntheticProvider", "SyntheticSeq2SeqProvider"]

_WORDS = {
    "noun": "river engineer harbour letter machine garden teacher signal mountain library winter market bridge sailor "
    "forest kitchen window doctor village engine painter island lantern station farmer mirror castle ocean",
    "adjective": "old quiet bright narrow heavy gentle broken early distant careful wooden empty clever sudden",
    "verb": "follows repairs remembers watches carries finds leaves crosses measures paints answers visits opens",
    "adverb": "slowly often never again quickly rarely always soon",
    "place": "near the coast|behind the hill|after the storm|before sunrise|in the city|along the road|at the border",
}
_CHOICES = {kind: words.split("|" if kind == "place" else " ") for kind, words in _WORDS.items()}
_TEMPLATES = [
    "The {adjective} {noun} {verb} the {noun} {place}.",
    "One {noun} {adverb} {verb} the {adjective} {noun}.",
    "{place}, the {noun} {verb} some {adjective} {noun}.",
    "Every {noun} that {verb} the {noun} {adverb} {verb} some {adjective} {noun}.",
]


@dataclass(frozen=True)
class SyntheticProvider(TextProvider):
    """`count` documents of `sentences` sentences each; `split` only changes which sentences."""

    name: ClassVar[str] = "synthetic"

    count: int = 512
    sentences: int = 40

    def documents(self, split: str | None = None) -> list[Document]:
        _check(self.name, count=self.count, sentences=self.sentences)
        prefix = f"synthetic:{split or self.split or 'test'}"
        keys = (f"{prefix}:{i}" for i in range(self.count))
        return [Document(key, " ".join(_sentences(key, self.sentences))) for key in keys]


@dataclass(frozen=True)
class SyntheticSeq2SeqProvider(PairProvider):
    """Pairs made from text.

    `task="continue"` (default) splits real text, that of `python_docs`, into passages of about `words` words, the
    first half of which is the source and the second the target: several pairs a document. `task="reverse"` pairs
    each of `count` generated sentences with its words in reverse order; for smoke tests.
    """

    name: ClassVar[str] = "seq2seq"

    task: str = "continue"
    words: int = 60
    count: int = 2048

    def pairs(self, split: str | None = None) -> list[Pair]:
        _check(self.name, words=self.words, count=self.count)
        if self.task == "continue":
            return list(self._continuations(split))
        if self.task == "reverse":
            keys = [f"reverse:{split or self.split or 'test'}:{i}" for i in range(self.count)]
            texts = [next(_sentences(key, 1)) for key in keys]
            return [Pair(key, key, text, " ".join(text.split()[::-1])) for key, text in zip(keys, texts, strict=True)]
        raise ConfigError(f"got task '{self.task}' for dataset provider 'seq2seq', expected 'continue' or 'reverse'")

    def _continuations(self, split: str | None) -> Iterator[Pair]:
        for document in PythonDocsProvider(split=split or self.split).documents():
            words = document.text.split(" ")
            half = self.words // 2
            for start in range(0, len(words) - self.words + 1, 2 * half):
                source, target = (" ".join(words[at : at + half]) for at in (start, start + half))
                yield Pair(f"{document.document_id}:{start}", document.document_id, source, f" {target}")


def _check(name: str, **sizes: int) -> None:
    for option, value in sizes.items():
        if value < 2:
            raise ConfigError(f"got {option}={value} for dataset provider '{name}', expected at least 2")


def _sentences(key: str, count: int) -> Iterator[str]:
    """`count` sentences drawn by the bytes of SHA-256(key, i): the modulo bias is of no concern here."""
    for i in range(count):
        draws = iter(hashlib.sha256(f"{key}:{i}".encode()).digest())
        template = _TEMPLATES[next(draws) % len(_TEMPLATES)]
        while "{" in template:
            kind = template[template.index("{") + 1 : template.index("}")]
            template = template.replace("{" + kind + "}", _CHOICES[kind][next(draws) % len(_CHOICES[kind])], 1)
        yield template[0].upper() + template[1:]
