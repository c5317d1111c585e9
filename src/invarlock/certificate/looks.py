"""Decisions look by look: what each look showed at its level, and that nothing was measured after one that decided.

All gates decide together. A look passes when no gate fails or is undecided, and fails as soon as one gate fails: an
interval beyond its limit, or a finding on the weights. Levels are those of `stats.sequential`, from the share of the
planned documents that each look reached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from invarlock.certificate.gates import GateKind, base_name
from invarlock.certificate.schema import Gate, GateDecision, Look, Looks, LooksRecord, PairedRows, Split
from invarlock.certificate.slices import at_level
from invarlock.core.exceptions import CertificateError
from invarlock.policy.limits import Limits
from invarlock.stats.sequential import looks

__all__ = ["head", "status_of", "through_looks"]

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


def through_looks(
    record: LooksRecord,
    limits: Limits,
    rows: _Rows,
    judge: Callable[[_Rows, Limits], tuple[_Seen, GateDecision]],
) -> tuple[_Seen, Looks]:
    """Judge look after look; return what the last one shows, and all of them.

    Raises CertificateError where the looks are not those that the plan gives, split a document, or go on after one that
    decided.
    """
    error = (1.0 - limits.ratio.ci_level) / 2.0
    planned = looks(record.planned_documents, limits.sample.early_documents, error=error)
    whole = [len(rows[split].window_ids) for split in ("preview", "final")]
    if not record.reached or list(record.reached[-1]) != whole or len(record.reached) > len(planned):
        raise CertificateError(
            f"looks reach {record.reached}; the rows are {whole}, and {len(planned)} looks were planned"
        )
    made: list[Look] = []
    for number, (cut, look) in enumerate(zip(record.reached, planned, strict=False), start=1):
        if made and made[-1].decision != "inconclusive":
            raise CertificateError(
                f"look {number} was made although the one before had decided; expected none after it"
            )
        part = head(rows, cut)
        documents = {name for split in part.values() for name in split.document_ids}
        rest = {name for split in rows for name in rows[split].document_ids[len(part[split].document_ids) :]}
        if len(documents) != look.documents or documents & rest:
            raise CertificateError(
                f"look {number} reaches {len(documents)} documents; expected {look.documents} of "
                f"{record.planned_documents}, each of them whole"
            )
        seen, decision = judge(part, at_level(limits, 1.0 - 2.0 * look.level))
        tokens = sum(sum(split.tokens) for split in part.values())
        made.append(Look(documents=len(documents), windows=cut, tokens=tokens, level=look.level, decision=decision))
    share = made[-1].tokens / record.planned_tokens
    return seen, Looks(**dict(record), made=made, share_used=share)
