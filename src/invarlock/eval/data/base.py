"""What every provider shares: documents in, two disjoint sets of windows out.

How windows are chosen, and why:

- Windows of one document are not independent, so intervals are taken over documents; the more documents, the
  narrower and the more honest they are. Windows are therefore dealt round by round: one of every document, then a
  second of every document, and so on until there are enough.
- Documents, and the windows within one, are ordered by SHA-256 of (seed, id). That is a random permutation which no
  release of any library can change.
- A window never spans two documents and is never padded. A long document gives full windows first and its remainder
  last; a document shorter than `seq_len` gives one short window.
- The special tokens that the tokenizer puts around a text (Llama's beginning of the sequence, BERT's [CLS] and [SEP])
  stand around every window, and are not scored: a model is used with them.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, TypeAlias, TypeVar

import numpy as np

from invarlock.checkpoints.tokenizer import special_tokens_around
from invarlock.core import settings
from invarlock.core.exceptions import DataError, TooLittleTextError
from invarlock.core.reading import check_size
from invarlock.evidence.plan import document_order
from invarlock.evidence.windows import IGNORED, EvaluationWindow

__all__ = [
    "MIN_SCORED_TOKENS",
    "Document",
    "EvaluationWindow",
    "FieldPairsProvider",
    "FieldTextProvider",
    "FieldsProvider",
    "Pair",
    "PairProvider",
    "Provider",
    "TextProvider",
    "Tokenizer",
    "provider_digest",
]

MIN_SCORED_TOKENS = 8
_BATCH = 64  # documents tokenised at once: enough to keep a fast tokenizer busy, few enough to stop early
_CHARACTERS = 2_000_000  # of them together: a token takes a hundred times as much while it is being made

#: one of the `transformers` library, or anything that is called like it: a list of texts in, their ids under `input_ids`
Tokenizer: TypeAlias = Callable[..., Mapping[str, Sequence[Sequence[int]]]]

_T = TypeVar("_T")


class Document(NamedTuple):
    """One text; `document_id` is unique within its provider and split and stays the same from run to run."""

    document_id: str
    text: str


class Pair(NamedTuple):
    """One source and its target; pairs of one document share its `document_id`, `pair_id` is unique."""

    pair_id: str
    document_id: str
    source: str
    target: str


class _Window(NamedTuple):
    rank: int  # how many windows of the same document come before this one, as `_rank` says
    key: bytes  # its place in the seeded permutation
    window_id: str
    document_id: str
    input_ids: list[int]
    labels: list[int] | None


@dataclass(frozen=True)
class _Request:
    preview_n: int
    final_n: int
    seq_len: int
    stride: int
    seed: int
    special: bool = True
    joined: bool = False

    def __post_init__(self) -> None:
        if self.preview_n < 0 or self.final_n < 0 or self.total == 0:
            raise DataError(
                f"got preview_n={self.preview_n} and final_n={self.final_n}, expected counts >= 0 and at least one "
                "window in all: correct the counts"
            )
        if self.seq_len < 2:
            raise DataError(f"got seq_len={self.seq_len}, expected at least 2, since the first token is not scored")
        if self.stride < 1:
            raise DataError(f"got stride={self.stride}, expected at least 1: leave it out to use seq_len")

    @property
    def total(self) -> int:
        return self.preview_n + self.final_n

    def key(self, name: str) -> bytes:
        return hashlib.sha256(f"{self.seed}\x1f{name}".encode("utf-8", "surrogatepass")).digest()

    def fitted(self, source: Sequence[int], target: Sequence[int], tail: int) -> tuple[list[int], list[int], bool]:
        """Return ids and labels of a pair, and whether it is there whole. What is too long loses its end, but for the
        `tail` special tokens behind it; of a joined pair the beginning of the source goes before the end of the target."""
        if not self.joined:
            ids, labels = (
                list(side) if len(side) <= self.seq_len else [*side[: self.seq_len - tail], *side[len(side) - tail :]]
                for side in (source, target)
            )
            return ids, labels, len(ids) == len(source) and len(labels) == len(target)
        labels = list(target[: self.seq_len - 1])
        before = list(source[-(self.seq_len - len(labels)) :])
        whole = len(before) == len(source) and len(labels) == len(target)
        return before + labels, [IGNORED] * len(before) + labels, whole

    def window(self, document_id: str, place: object, ids: Sequence[int], labels: Sequence[int] | None) -> _Window:
        head = f"{document_id}\x1f{place}\x1f".encode("utf-8", "surrogatepass")
        content = head + _token_bytes(ids) + b"\x1f" + _token_bytes(labels or ())
        window_id, target = hashlib.sha256(content).hexdigest()[:16], None if labels is None else list(labels)
        return _Window(0, self.key(window_id), window_id, document_id, list(ids), target)


@dataclass(frozen=True)
class Provider(ABC):
    """A source of evaluation windows. The dataclass fields of a provider are its options."""

    name: ClassVar[str]
    kind: ClassVar[str]

    split: str | None = None

    #: what a reader should know of the data that the last call of `windows` read, one line each
    remarks: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def options(cls) -> list[str]:
        """Names of the options that the constructor takes."""
        return [item.name for item in fields(cls)]

    def describe(self) -> dict[str, Any]:
        """The registry name and the options that were set, as plain data for a report."""
        values = {item: getattr(self, item) for item in self.options()}
        return {"name": self.name, "options": {key: value for key, value in values.items() if value is not None}}

    @abstractmethod
    def _rows(self, tokenizer: Tokenizer, request: _Request, split: str | None) -> Iterator[list[_Window]]:
        """Windows document by document, documents in the seeded order."""

    def windows(
        self,
        tokenizer: Tokenizer,
        *,
        preview_n: int,
        final_n: int,
        seq_len: int,
        stride: int | None = None,
        seed: int = 42,
        split: str | None = None,
        add_special_tokens: bool = True,
        joined: bool = False,
    ) -> tuple[EvaluationWindow, EvaluationWindow]:
        """Two disjoint sets of windows, `preview_n` and `final_n` long, of at most `seq_len` tokens each.

        Of running text `seq_len` counts the content: what the tokenizer itself puts before and after a text is told
        beside the windows (`prefix`, `suffix`), unless `add_special_tokens` is False.

        The result depends on the data, the tokenizer, the seed and the counts alone. `stride` is the distance between
        the starts of neighbouring windows (default `seq_len`); below `seq_len` windows overlap, and then preview and
        final are drawn from different documents so that they still share no token. `split` overrides the provider's.
        Of pairs, `joined` puts the target behind its source in one window, the source unscored, as models that only
        continue a text read them. Raises `DataError` for impossible counts and for too little text, with the counts that
        would fit.
        """
        object.__setattr__(self, "remarks", ())
        cut = seq_len if stride is None else stride
        request = _Request(preview_n, final_n, seq_len, cut, seed, add_special_tokens, joined)
        apart = request.stride < request.seq_len and preview_n > 0 and final_n > 0
        counts = (preview_n, final_n) if apart else (request.total, 0)
        preview, final = _deal(self._rows(tokenizer, request, split or self.split), *counts)
        fits = min(len(rows) / count for rows, count in zip((preview, final), counts, strict=True) if count)
        if fits < 1:
            raise _too_little(preview + final, request, fits)
        if not apart:
            pool = sorted(preview, key=lambda row: row.key)
            preview, final = pool[:preview_n], pool[preview_n:]
        around = self._around(tokenizer, joined) if add_special_tokens else ((), ())
        order = document_order([[row.document_id for row in rows] for rows in (preview, final)], seed)
        first, second = (sorted(rows, key=lambda row: order[row.document_id]) for rows in (preview, final))
        return _pack(first, *around), _pack(second, *around)

    def texts_of(self, document_ids: Collection[str], split: str | None = None) -> dict[str, str]:
        """The whole texts of documents that windows were cut from, by id; {} where the provider cannot tell."""
        return {}

    def _around(self, tokenizer: Tokenizer, joined: bool) -> tuple[Sequence[int], Sequence[int]]:
        """What stands before and after the content of every window, unscored."""
        return (), ()

    def _usable(self, what: str, items: Sequence[_T], content: Callable[[_T], tuple[str, ...]]) -> list[list[_T]]:
        """Leave out what has no text, and group the rest by content, whatever its ids and its blanks say: the first of each
        group first, and alone under INVARLOCK_DEDUP_TEXTS."""
        groups: dict[tuple[str, ...], list[_T]] = {}
        for item in items:
            texts = tuple(" ".join(text.split()) for text in content(item))
            if all(texts):
                groups.setdefault(texts, []).append(item)
        if not groups:
            raise DataError(f"the data set is empty: got no {what} from provider '{self.name}', expected at least one")
        kept = sum(map(len, groups.values()))
        self._remark(len(items) - kept, f"{what} without content left out")
        self._remark(kept - len(groups), f"{what} with the content of another: they count as one document")
        if settings.flag("INVARLOCK_DEDUP_TEXTS"):
            return [group[:1] for group in groups.values()]
        return list(groups.values())

    def _remark(self, count: int, what: str) -> None:
        """Note something of the data that a reader should know, where there is any of it."""
        if count:
            object.__setattr__(self, "remarks", (*self.remarks, f"{count:,} x {what}"))


class TextProvider(Provider):
    """A provider of running text; a subclass only says what its documents are."""

    kind: ClassVar[str] = "text"

    @abstractmethod
    def documents(self, split: str | None = None) -> Sequence[Document]:
        """All documents of a split (None: the default one). Raises `DataError` where there are none to be had."""

    def _rows(self, tokenizer: Tokenizer, request: _Request, split: str | None) -> Iterator[list[_Window]]:
        texts = self._usable("text", [self._mended(each) for each in self.documents(split)], lambda each: (each.text,))
        ordered = sorted(texts, key=lambda group: request.key(group[0].document_id))
        for batch in _batches(ordered, lambda group: len(group[0].text)):
            encoded = tokenizer([group[0].text for group in batch], add_special_tokens=False, verbose=False)
            for group, ids in zip(batch, encoded["input_ids"], strict=True):
                yield _cut(group[0].document_id, ids, request, len(group))

    def _mended(self, document: Document) -> Document:
        check_size("line", f"the document {document.document_id}", DataError, size=len(document.text))
        text = _without_half_pairs(document.text)
        self._remark(
            int(text != document.text), f"half a surrogate pair in the text of {document.document_id}, replaced"
        )
        return document._replace(text=text)

    def texts_of(self, document_ids: Collection[str], split: str | None = None) -> dict[str, str]:
        read = self.documents(split or self.split)
        return {d.document_id: _without_half_pairs(d.text) for d in read if d.document_id in document_ids}

    def _around(self, tokenizer: Tokenizer, joined: bool) -> tuple[Sequence[int], Sequence[int]]:
        return special_tokens_around(tokenizer)


class PairProvider(Provider):
    """A provider of (source, target) pairs; a subclass only says what its pairs are.

    Both sides get the special tokens that the tokenizer adds (T5 needs its end-of-sequence token) and are cut off at
    `seq_len`; `stride` has no meaning here.
    """

    kind: ClassVar[str] = "pairs"

    @abstractmethod
    def pairs(self, split: str | None = None) -> Sequence[Pair]:
        """All pairs of a split (None: the default one). Raises `DataError` where there are none to be had."""

    def _rows(self, tokenizer: Tokenizer, request: _Request, split: str | None) -> Iterator[list[_Window]]:
        groups: dict[str, list[Pair]] = defaultdict(list)
        mended = [
            pair._replace(source=_without_half_pairs(pair.source), target=_without_half_pairs(pair.target))
            for pair in self.pairs(split)
        ]
        for pair in mended:
            check_size("line", f"the pair {pair.pair_id}", DataError, size=len(pair.source) + len(pair.target))
        for same in self._usable("pair", mended, lambda pair: (pair.source, pair.target)):
            groups[same[0].document_id] += [pair._replace(document_id=same[0].document_id) for pair in same]
        cut, tail = 0, len(special_tokens_around(tokenizer)[1]) if request.special else 0
        try:
            for batch in _batches(sorted(groups, key=request.key), lambda name: _characters(groups[name])):
                flat = [pair for document_id in batch for pair in groups[document_id]]
                how = {} if request.special and not request.joined else {"add_special_tokens": False}
                sources = tokenizer([pair.source for pair in flat], verbose=False, **how)["input_ids"]
                targets = tokenizer(text_target=[pair.target for pair in flat], verbose=False, **how)["input_ids"]
                rows: dict[str, list[_Window]] = defaultdict(list)
                for pair, source, target in zip(flat, sources, targets, strict=True):
                    ids, labels, whole = request.fitted(source, target, tail)
                    cut += not whole
                    rows[pair.document_id].append(request.window(pair.document_id, pair.pair_id, ids, labels))
                yield from map(_rank, rows.values())
        finally:  # also where enough was read before the end
            self._remark(cut, f"pairs cut off at {request.seq_len} tokens")

    def _around(self, tokenizer: Tokenizer, joined: bool) -> tuple[Sequence[int], Sequence[int]]:
        return special_tokens_around(tokenizer) if joined else ((), ())

    def texts_of(self, document_ids: Collection[str], split: str | None = None) -> dict[str, str]:
        found: dict[str, list[str]] = defaultdict(list)
        for pair in self.pairs(split or self.split):
            if pair.document_id in document_ids:
                found[pair.document_id] += [pair.source, pair.target]
        return {name: _without_half_pairs("\n".join(texts)) for name, texts in found.items()}


class FieldsProvider(Provider):
    """A provider whose rows have named fields; a subclass only says how they are read."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Name the fields of a row that are read."""
        return ()

    @abstractmethod
    def texts(self, split: str | None, *names: str) -> Iterable[Sequence[str]]:
        """Give, row by row, a unique id and the texts under the fields `names`."""

    def look(self, split: str | None = None) -> None:
        """Raise what `texts` would for the first row, where that takes no library and no network; else nothing."""


@dataclass(frozen=True)
class FieldTextProvider(TextProvider, FieldsProvider):
    """One row is one document, its text under `text_field`."""

    text_field: str = "text"

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.text_field,)

    def documents(self, split: str | None = None) -> list[Document]:
        return [Document(*row) for row in self.texts(split, *self.fields)]


@dataclass(frozen=True)
class FieldPairsProvider(PairProvider, FieldsProvider):
    """One row is one pair, under `src_field` and `tgt_field`."""

    src_field: str = "source"
    tgt_field: str = "target"

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.src_field, self.tgt_field)

    def pairs(self, split: str | None = None) -> list[Pair]:
        return [Pair(row[0], *row) for row in self.texts(split, *self.fields)]


def provider_digest(preview: EvaluationWindow, final: EvaluationWindow) -> str:
    """SHA-256, in hexadecimal, over the window ids, document ids and token ids of both sets, in order."""
    digest = hashlib.sha256()
    for name, window in (("preview", preview), ("final", final)):
        digest.update(f"{name}\x1f{len(window)}\x1e".encode())
        labels: list[list[int]] = window.labels or [[]] * len(window)
        for row in zip(window.window_ids, window.document_ids, window.input_ids, labels, strict=True):
            digest.update(f"{row[0]}\x1f{row[1]}\x1f".encode("utf-8", "surrogatepass"))
            digest.update(_token_bytes(row[2]) + b"\x1f" + _token_bytes(row[3]) + b"\x1e")
    return digest.hexdigest()


def _token_bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, dtype="<i8").tobytes()


def _batches(items: Sequence[_T], length: Callable[[_T], int] = lambda item: 0) -> Iterator[list[_T]]:
    """Yield up to so many items, and of long ones no more than so many characters, at once."""
    batch, held = list[_T](), 0
    for item in items:
        if batch and (len(batch) == _BATCH or held + length(item) > _CHARACTERS):
            yield batch
            batch, held = [], 0
        batch.append(item)
        held += length(item)
    if batch:
        yield batch


def _characters(pairs: Sequence[Pair]) -> int:
    return sum(len(pair.source) + len(pair.target) for pair in pairs)


def _without_half_pairs(text: str) -> str:
    """Return a text that has bytes: half a surrogate pair, which JSON can spell, becomes the replacement character."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _cut(document_id: str, ids: Sequence[int], request: _Request, copies: int = 1) -> list[_Window]:
    """Windows of one document and of its copies, ranked: whole ones in the seeded order, the shorter remainder last."""
    shortest = min(MIN_SCORED_TOKENS + 1, request.seq_len)
    rows = []
    for start in range(0, len(ids), request.stride):
        piece = ids[start : start + request.seq_len]
        if len(piece) >= shortest:
            rows += [
                request.window(document_id, f"{start}#{copy}" if copy else start, piece, None) for copy in range(copies)
            ]
        if start + request.seq_len >= len(ids):  # what follows lies within this window
            break
    return _rank(rows, request.seq_len)


def _rank(rows: list[_Window], seq_len: int = 0) -> list[_Window]:
    ordered = sorted(rows, key=lambda row: (len(row.input_ids) < seq_len, row.key))
    return [row._replace(rank=rank) for rank, row in enumerate(ordered)]


def _deal(documents: Iterable[list[_Window]], preview_n: int, final_n: int) -> list[list[_Window]]:
    """Deal documents to two sets in proportion to the counts: up to so many windows from as many documents as there are.

    A document serves one set and never both. Reads no further once each window has a document of its own or, under
    INVARLOCK_CAPACITY_FAST, once there are enough.
    """
    fast, total = settings.flag("INVARLOCK_CAPACITY_FAST"), preview_n + final_n
    pools: tuple[list[_Window], list[_Window]] = ([], [])
    for used, rows in enumerate(filter(None, documents), start=1):
        turn_of_preview = used * preview_n // total > (used - 1) * preview_n // total
        pools[0 if turn_of_preview else 1].extend(rows)
        if used >= total or (fast and len(pools[0]) >= preview_n and len(pools[1]) >= final_n):
            break
    counts = zip(pools, (preview_n, final_n), strict=True)
    return [sorted(pool, key=lambda row: (row.rank, row.key))[:count] for pool, count in counts]


def _too_little(rows: list[_Window], request: _Request, fits: float) -> DataError:
    """`fits` is the part of the requested counts that the rows would serve, in [0, 1)."""
    preview_fits, final_fits = int(request.preview_n * fits), int(request.final_n * fits)
    fewer = f"ask for preview_n={preview_fits} and final_n={final_fits}, a shorter seq_len, or "
    advice = (fewer if preview_fits + final_fits else "") + "give more text"
    documents = len({row.document_id for row in rows})
    return TooLittleTextError(
        f"too little text: got {len(rows)} windows from {documents} documents, expected {request.total} "
        f"({request.preview_n} preview + {request.final_n} final) of up to {request.seq_len} tokens",
        advice,
        (preview_fits, final_fits),
    )


def _pack(rows: list[_Window], prefix: Sequence[int], suffix: Sequence[int]) -> EvaluationWindow:
    labels = [row.labels for row in rows if row.labels is not None]
    return EvaluationWindow(
        [row.input_ids for row in rows],
        [[1] * len(row.input_ids) for row in rows],
        [row.window_id for row in rows],
        [row.document_id for row in rows],
        labels if rows and len(labels) == len(rows) else None,
        list(prefix),
        list(suffix),
    )
