"""Decisions look by look: what each look showed at its level, and that nothing was measured after one that decided.

All gates decide together. A look passes when no gate fails or is undecided, and fails as soon as one gate fails: an
interval beyond its limit, or a finding on the weights. Levels are those of `stats.sequential`, from the share of the
planned documents that each look reached. A glance at the first documents comes before the looks. It can only fail: where
bets on these documents against a limit of the divergence (`stats.betting`) came to 1 / `GLANCE_ERROR`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from invarlock.certificate.gates import GateKind, base_name
from invarlock.certificate.schema import Gate, GateDecision, Look, Looks, LooksRecord, PairedRows, Split
from invarlock.certificate.slices import at_level
from invarlock.core.exceptions import CertificateError, DataError
from invarlock.evidence.plan import GLANCE
from invarlock.evidence.rows import WindowRows
from invarlock.policy.limits import Limits
from invarlock.stats.betting import GLANCE_ERROR, fortune, won
from invarlock.stats.intervals import cluster_codes, cluster_sums
from invarlock.stats.sequential import looks

__all__ = ["fortunes", "head", "lost", "status_of", "through_looks"]

_Seen = TypeVar("_Seen")
_Rows = Mapping[Split, PairedRows]


def head(rows: _Rows, cut: Sequence[int]) -> dict[Split, PairedRows]:
    """Return the rows that a look reached."""
    sizes: dict[Split, int] = {"preview": cut[0], "final": cut[1]}
    return {split: rows[split].head(size) for split, size in sizes.items()}


def status_of(gates: Sequence[Gate], kinds: Sequence[GateKind]) -> GateDecision:
    """Return what all gates together decide at a look: fail, pass or inconclusive."""
    last = {kind.name for kind in kinds if kind.at_end}
    decisions = {gate.decision for gate in gates if base_name(gate.name) not in last}
    return next((found for found in ("fail", "inconclusive") if found in decisions), "pass")


def fortunes(rows: Iterable[PairedRows | WindowRows], limits: Limits, largest: int) -> dict[str, float]:
    """Return what bets on the documents of both splits, against each limit of the divergence, came to by gate; {} where
    it was not measured. `largest`: the scored tokens of the largest document of the plan.

    Raises DataError for rows that cannot be.
    """
    parts = [*rows]
    codes = cluster_codes([document for part in parts for document in part.document_ids])
    tokens = cluster_sums(codes, np.concatenate([part.tokens for part in parts]))
    held = {"divergence_kl": ("kl_sum", limits.divergence.kl_max), "token_flips": ("flips", limits.divergence.flip_max)}
    found = {}
    for gate, (column, limit) in held.items():
        values = [getattr(part, column) for part in parts]
        if None not in values and limit > 0.0:
            each = np.array([value for part in values for value in part], dtype=np.float64)  # None: not finite
            sums = cluster_sums(codes, each)
            found[gate] = fortune(sums, tokens, limit, largest)
    return found


def lost(found: Mapping[str, float]) -> bool:
    """Whether bets came to so much that the subject is beyond a limit."""
    return any(map(won, found.values()))


def through_looks(
    record: LooksRecord,
    limits: Limits,
    rows: _Rows,
    judge: Callable[[_Rows, Limits, Mapping[str, float]], tuple[_Seen, GateDecision]],
) -> tuple[_Seen, Looks]:
    """Judge look after look; return what the last one shows, and all of them.

    `judge` gets the rows that a look reached, the limits at its level, and the fortunes of a glance. Raises
    CertificateError where the looks are not those that the plan gives, split a document, or go on after one that decided.
    """
    whole = [len(rows[split].window_ids) for split in ("preview", "final")]
    error = (1.0 - limits.ratio.ci_level) / 2.0
    planned = looks(record.planned_documents, limits.sample.early_documents, error=error)
    if record.glance is not None:
        part = head(rows, record.glance.windows)
        try:
            found = fortunes(part.values(), limits, record.glance.largest)
        except DataError as why:
            raise CertificateError(f"the glance cannot have been made: {why}") from None
        if lost(found):
            seen, decision = judge(part, at_level(limits, 1.0 - 2.0 * planned[0].level), found)
            if not record.ended_at_glance or whole != [*record.glance.windows]:
                raise CertificateError(
                    "looks were made although the glance before them had decided; expected none after it"
                )
            made = [_look(record, rows, record.glance.windows, GLANCE, GLANCE_ERROR, "the glance", decision)]
            return seen, _looks(record, made)
    if not record.reached or list(record.reached[-1]) != whole or len(record.reached) > len(planned):
        raise CertificateError(
            f"looks reach {record.reached}; the rows are {whole}, and {len(planned)} looks were planned"
        )
    made = []
    for number, (cut, look) in enumerate(zip(record.reached, planned, strict=False), start=1):
        if made and made[-1].decision != "inconclusive":
            raise CertificateError(
                f"look {number} was made although the one before had decided; expected none after it"
            )
        seen, decision = judge(head(rows, cut), at_level(limits, 1.0 - 2.0 * look.level), {})
        made.append(_look(record, rows, cut, look.documents, look.level, f"look {number}", decision))
    return seen, _looks(record, made)


def _look(
    record: LooksRecord,
    rows: _Rows,
    cut: tuple[int, int],
    expected: int,
    level: float,
    name: str,
    decision: GateDecision,
) -> Look:
    """Return a look at the first windows of both splits, which must be whole documents, as many as expected."""
    part = head(rows, cut)
    documents = {name for split in part.values() for name in split.document_ids}
    rest = {name for split in rows for name in rows[split].document_ids[len(part[split].document_ids) :]}
    if len(documents) != expected or documents & rest:
        raise CertificateError(
            f"{name} reaches {len(documents)} documents; expected {expected} of {record.planned_documents}, each of "
            "them whole"
        )
    tokens = sum(sum(split.tokens) for split in part.values())
    return Look(documents=len(documents), windows=cut, tokens=tokens, level=level, decision=decision)


def _looks(record: LooksRecord, made: list[Look]) -> Looks:
    return Looks(**dict(record), made=made, share_used=made[-1].tokens / record.planned_tokens)
