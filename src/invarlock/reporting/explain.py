"""A certificate in plain words: for each gate what was measured, against what, why, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from invarlock.certificate.schema import Certificate, Gate
from invarlock.reporting.terminal import summary_lines, wrapped
from invarlock.reporting.view import GateRow, parse, view
from invarlock.reporting.wording import DECISIONS, count, effect, gate_kind, middle_cut

__all__ = ["Explanation", "explain", "explanations"]


@dataclass(frozen=True)
class Explanation:
    """One gate in words; `next_step` is empty where there is nothing to do."""

    gate: str
    title: str
    decision: str
    measured: str
    limit: str
    basis: str
    meaning: str
    why: str
    next_step: str


def explanations(certificate: Mapping[str, Any]) -> list[Explanation]:
    """Explain every gate of a certificate, in its order. Raises CertificateError where it breaks the schema."""
    c = parse(certificate)
    return [_explanation(gate, row, c) for gate, row in zip(c.gates, view(c).gates, strict=True)]


def _explanation(gate: Gate, row: GateRow, c: Certificate) -> Explanation:
    return Explanation(
        gate=row.name,
        title=row.title,
        decision=gate.decision,
        measured=row.measured,
        limit=row.limit,
        basis=row.basis,
        meaning=gate_kind(gate, c.primary_metric).meaning,
        why=row.reason,
        next_step=_next_step(gate, c),
    )


def _next_step(gate: Gate, c: Certificate) -> str:
    kind = gate_kind(gate, c.primary_metric)
    refused = c.primary_metric.decision == "not_evaluated" and not c.data_rows()
    if gate.decision == "fail" or (gate.decision == "warn" and gate.measured is not None):
        return kind.failed
    if gate.decision == "not_evaluated" and gate.name == "primary_metric" and refused:
        return "Repair the files first: what is wrong with them is named below. Then certify again."
    if gate.decision == "inconclusive" and gate.name == "primary_metric":
        return _more_windows(c, kind.undecided)
    if gate.decision in ("inconclusive", "not_evaluated", "warn"):
        return kind.undecided
    return ""


def _more_windows(c: Certificate, advice: str) -> str:
    """Say how small an effect this sample could see, and how many windows would decide."""
    pm, have = c.primary_metric, c.dataset.windows.preview + c.dataset.windows.final
    parts = []
    if pm.minimum_detectable_effect is not None:
        parts.append(f"These {count(have)} windows settle a value {effect(pm)} or more from the limit (80 % power).")
    if pm.windows_needed is not None:
        parts.append(f"About {count(pm.windows_needed)} windows would decide at the value seen.")
    elif pm.minimum_detectable_effect is not None:
        parts.append("The value seen is so close to the limit that no number of windows can be promised to decide.")
    return " ".join([*parts, f"{advice}."])


def explain(certificate: Mapping[str, Any]) -> str:
    """Return the explanation as text for a terminal, 80 columns wide, ending in a newline."""
    lines = [*summary_lines(certificate), ""]
    for item in explanations(certificate):
        lines.append(f"{middle_cut(item.title, 60)}: {DECISIONS[item.decision]}")
        against = f" against {item.limit}" if item.measured != "not measured" else f" (limit {item.limit})"
        entries = [
            ("measured", f"{item.measured}{against}, by {item.basis}"),
            ("asks", item.meaning),
            ("why", item.why),
        ]
        if item.next_step:
            entries.append(("do next", item.next_step))
        for label, text in entries:
            lines.extend(wrapped(f"  {label}", text))
        lines.append("")
    return "\n".join(lines)
