"""The few lines that a terminal shows of a certificate: the verdict and why, the figures, what to do next."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from invarlock.certificate.schema import Certificate
from invarlock.reporting.story import FOUND_BY_TENSOR, next_steps, points, warnings
from invarlock.reporting.view import View, parse, view
from invarlock.reporting.wording import GATES, MISSING, clean, middle_cut

__all__ = ["WIDTH", "summary_lines", "wrapped"]

WIDTH = 80
_LABEL = 14
_REASONS = 6


def wrapped(label: str, text: str, width: int = WIDTH) -> list[str]:
    """Return `label  text` in lines of at most `width` characters, continued under the text."""
    lead = f"{label:<{_LABEL}}"
    return textwrap.wrap(text or MISSING, width, initial_indent=lead, subsequent_indent=" " * _LABEL)


def summary_lines(certificate: Mapping[str, Any], place: Path | None = None, width: int = WIDTH) -> list[str]:
    """Return verdict, reason, figures, guards, culprits and next steps as plain text, no line longer than `width`.

    `place` is the folder of the certificate, for the commands. Raises CertificateError where the certificate does not
    follow the schema.
    """
    c = parse(certificate)
    shown = view(c)
    return [line for label, text in _entries(c, shown, place, width) for line in wrapped(label, text, width)]


def _entries(c: Certificate, shown: View, place: Path | None, width: int) -> Iterator[tuple[str, str]]:
    yield shown.status, shown.headline
    if shown.why:
        yield "why", shown.why
    yield "subject", middle_cut(shown.subject, width - _LABEL)
    yield "baseline", middle_cut(shown.baseline, width - _LABEL)
    yield from _findings(c)
    for warning in warnings(c):
        yield "warning", warning
    for figure in shown.figures:
        yield figure.short, f"{figure.value}  ({figure.note})"
    guards = [row for row in shown.gates if row.basis in ("guard", "plugin guard")]
    yield "guards", ", ".join(f"{row.gate.removeprefix('plugin:')} {row.badge.word}" for row in guards) or "none ran"
    yield "culprits", _culprits(c)
    for sentence, command in next_steps(c, place):
        yield "next", f"{sentence}: {command}"


def _findings(c: Certificate) -> Iterator[tuple[str, str]]:
    """What the guards hold against the subject, which the sentence of reasons only sums up."""
    titles = {GATES[name].title for name in FOUND_BY_TENSOR}
    found = list(dict.fromkeys(text for title, text in points(c) if title in titles))
    for text in found[:_REASONS]:
        yield "found", text
    if len(found) > _REASONS:
        yield "", f"and {len(found) - _REASONS} more"


def _culprits(c: Certificate) -> str:
    if c.weights.identical:
        return "none: the weights are identical"
    if c.weights.culprits:
        more = f" and {len(c.weights.culprits) - 3} more" if len(c.weights.culprits) > 3 else ""
        return ", ".join(clean(name, 120) for name in c.weights.culprits[:3]) + more
    if not c.weights.changes:
        return "not measured"
    return "none: the change is uniform" if c.weights.uniform else "none"
