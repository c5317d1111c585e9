"""The few lines that a terminal shows of a certificate."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from invarlock.certificate.schema import Certificate
from invarlock.reporting.view import View, parse, view
from invarlock.reporting.wording import MISSING, clean, middle_cut

__all__ = ["WIDTH", "summary_lines", "wrapped"]

WIDTH = 80
_LABEL = 14
_REASONS = 6


def wrapped(label: str, text: str) -> list[str]:
    """Return `label  text` in lines of at most WIDTH characters, continued under the text."""
    lead = f"{label:<{_LABEL}}"
    return textwrap.wrap(text or MISSING, WIDTH, initial_indent=lead, subsequent_indent=" " * _LABEL)


def summary_lines(certificate: Mapping[str, Any]) -> list[str]:
    """Return verdict, figures, guards and culprits as plain text, no line longer than 80 characters.

    Raises CertificateError where the certificate does not follow the schema.
    """
    c = parse(certificate)
    shown = view(c)
    return [line for label, text in _entries(c, shown) for line in wrapped(label, text)]


def _entries(c: Certificate, shown: View) -> Iterator[tuple[str, str]]:
    yield shown.status, shown.headline
    yield "subject", middle_cut(shown.subject, WIDTH - _LABEL)
    yield "baseline", middle_cut(shown.baseline, WIDTH - _LABEL)
    for reason in shown.reasons[:_REASONS]:
        yield "why", f"{reason.label}: {reason.value}"
    if len(shown.reasons) > _REASONS:
        yield "", f"and {len(shown.reasons) - _REASONS} more"
    for warning in shown.warnings:
        yield "warning", f"{warning.label}: {warning.value}"
    for figure in shown.figures:
        yield figure.short, f"{figure.value}  ({figure.note})"
    guards = [row for row in shown.gates if row.basis in ("guard", "plugin guard")]
    yield "guards", ", ".join(f"{row.gate.removeprefix('plugin:')} {row.badge.word}" for row in guards) or "none ran"
    yield "culprits", _culprits(c)


def _culprits(c: Certificate) -> str:
    if c.weights.identical:
        return "none: the weights are identical"
    if c.weights.culprits:
        more = f" and {len(c.weights.culprits) - 3} more" if len(c.weights.culprits) > 3 else ""
        return ", ".join(clean(name, 120) for name in c.weights.culprits[:3]) + more
    if not c.weights.changes:
        return "not measured"
    return "none: the change is uniform" if c.weights.uniform else "none"
