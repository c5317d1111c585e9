"""A certificate, and a table of several, as Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from invarlock.reporting.view import Badge, parse, table, values, view
from invarlock.reporting.wording import WORDS

__all__ = ["compare", "render_markdown"]

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$])")


def _escape(value: object) -> str:
    """Escape what Markdown or HTML would read as markup; text of the template itself is no value and stays."""
    if isinstance(value, Markup):
        return value
    text = value.word if isinstance(value, Badge) else str(value)
    return _SPECIAL.sub(r"\\\1", html.escape(text, quote=False))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("invarlock.reporting", "templates"),
        finalize=_escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, escaped by `finalize`
    )
    environment.filters["plainly"] = Markup  # for the commands, which are ours
    return environment


def render_markdown(certificate: Mapping[str, Any]) -> str:
    """Return the certificate as Markdown. Raises CertificateError where it does not follow the schema."""
    text = _environment().get_template("certificate.md").render(view=view(parse(certificate)))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def compare(certificates: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table, one row a certificate, and a note where they do not compare like with like.

    Raises CertificateError where one does not follow the schema.
    """
    parsed = [parse(certificate) for certificate in certificates]
    facts = {
        "baseline weights": {c.weights.baseline_digest for c in parsed},
        "evaluation text": {c.provenance.provider_digest for c in parsed},
        "policies": {c.policy_digest for c in parsed},
        "metrics": {c.primary_metric.kind for c in parsed},
    }
    tables = table("", WORDS["tables"]["compare"], [values(c) for c in parsed])
    differing = [what for what, found in facts.items() if len(found) > 1]
    text = _environment().get_template("compare.md").render(tables=tables, differing=differing)
    return text.strip() + "\n"
