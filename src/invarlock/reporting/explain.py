"""A certificate in plain words: for each gate what was measured, against what, why, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from invarlock.reporting.terminal import summary_lines, wrapped
from invarlock.reporting.view import GateRow, parse, view
from invarlock.reporting.wording import middle_cut

__all__ = ["explain", "explanations"]


def explanations(certificate: Mapping[str, Any]) -> list[GateRow]:
    """Explain every gate of a certificate, in its order. Raises CertificateError where it breaks the schema."""
    return view(parse(certificate)).gates


def explain(certificate: Mapping[str, Any]) -> str:
    """Return the explanation as text for a terminal, 80 columns wide, ending in a newline."""
    lines = [*summary_lines(certificate), ""]
    for row in explanations(certificate):
        against = f"(limit {row.limit})" if row.measured == "not measured" else f"against {row.limit}"
        entries = {
            "measured": f"{row.measured} {against}, by {row.basis}",
            "asks": row.meaning,
            "why": row.why,
            "do next": row.next_step,
        }
        lines.append(f"{middle_cut(row.title, 60)}: {row.badge.word}")
        for label, text in entries.items():
            if text:
                lines.extend(wrapped(f"  {label}", text))
        lines.append("")
    return "\n".join(lines)
