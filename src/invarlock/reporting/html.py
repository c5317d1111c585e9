"""A certificate as one HTML page that stands alone: no scripts, no fonts, no network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from invarlock.reporting.plots import draw
from invarlock.reporting.view import Badge, parse, view

__all__ = ["page_environment", "render_html"]


def _is_badge(value: object) -> bool:
    return isinstance(value, Badge)


def render_html(certificate: Mapping[str, Any]) -> str:
    """Return the page; all that comes from the certificate is escaped.

    Raises CertificateError where the certificate does not follow the schema.
    """
    parsed = parse(certificate)
    environment = page_environment()
    environment.tests["badge"] = _is_badge
    return environment.get_template("certificate.html").render(view=view(parsed), plots=draw(parsed))


def page_environment() -> Environment:
    """Return what renders the templates of pages; all that they are given is escaped."""
    return Environment(
        loader=PackageLoader("invarlock.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
