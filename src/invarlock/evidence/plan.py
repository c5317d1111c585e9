"""In which order documents are measured, and how far each look reaches. Fixed by the seed before anything is measured.

A look takes whole documents. Those of the preview and of the final windows, and of each kind of text, take turns in
proportion, so that all of them grow together. Windows that a provider cut stand in this order, so that a look is a
prefix of either split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from invarlock.stats.sequential import looks

if TYPE_CHECKING:
    from invarlock.evidence.windows import Window, Windows

__all__ = ["GLANCE", "Cut", "cuts", "document_order", "glance", "in_order"]

Cut = tuple[int, int]  # how many windows of preview and of final
GLANCE = 6  # documents before the first look, on which a subject can only fail


def document_order(strata: Sequence[Sequence[str]], seed: int) -> dict[str, int]:
    """Return the place of every document, given those of each stratum (repeats count once).

    Within a stratum documents are ordered by SHA-256 of (seed, document); one that stands in several is of the first.
    """

    def key(document: str) -> bytes:
        return hashlib.sha256(f"{seed}\x1f{document}".encode("utf-8", "surrogatepass")).digest()

    turns: dict[str, float] = {}
    for stratum in strata:
        own = sorted(set(stratum) - turns.keys(), key=key)
        turns |= {name: (place + 0.5) / len(own) for place, name in enumerate(own)}
    ordered = sorted(turns, key=lambda name: (turns[name], key(name)))
    return {name: place for place, name in enumerate(ordered)}


def in_order(splits: Sequence[Sequence[Window]], seed: int) -> list[tuple[Window, ...]]:
    """Return the windows of preview and final in the order of their documents."""
    order = document_order(_strata(splits), seed)
    return [tuple(sorted(split, key=lambda window: order[window.document])) for split in splits]


def _strata(splits: Sequence[Sequence[Window]]) -> list[list[str]]:
    kinds = dict.fromkeys(sorted({window.slice or "" for split in splits for window in split}))
    return [[w.document for w in split if (w.slice or "") == kind] for split in splits for kind in kinds]


def cuts(windows: Windows, minimum: int) -> list[Cut]:
    """Return how many windows of preview and final each look reaches, none of them at fewer than `minimum` documents.

    One look at the end where the windows do not stand in the order of their documents (they come from a caller, or were
    cut by an earlier release).
    """
    whole = (len(windows.preview), len(windows.final))
    ranks, documents = _ranks(windows)
    if not documents:
        return [whole]
    found = [_reached(ranks, look.documents) for look in looks(documents, minimum)]
    return found if all(min(cut) > 0 or cut == whole for cut in found) else [whole]


def glance(windows: Windows) -> Cut | None:
    """Return how many windows of preview and final the first `GLANCE` documents hold; None where there is nothing beyond
    them, or the windows do not stand in the order of their documents."""
    ranks, documents = _ranks(windows)
    cut = _reached(ranks, GLANCE)
    return cut if documents > GLANCE and min(cut) > 0 else None


def _ranks(windows: Windows) -> tuple[list[list[int]], int]:
    """Return the place of each window's document, by split, and how many there are: 0 where they are out of order."""
    splits = (windows.preview, windows.final)
    order = document_order(_strata(splits), windows.origin.seed)
    ranks = [[order[window.document] for window in split] for split in splits]
    return ranks, 0 if any(split != sorted(split) for split in ranks) else len(order)


def _reached(ranks: Sequence[Sequence[int]], documents: int) -> Cut:
    first, second = (sum(rank < documents for rank in split) for split in ranks)
    return first, second
