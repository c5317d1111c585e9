"""The public face of certificates: make, render, validate, verify."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from invarlock.certificate.reports import make_certificate
from invarlock.certificate.verify import Verification, validate_certificate, verify_certificate

__all__ = [
    "Verification",
    "make_certificate",
    "render_certificate_html",
    "render_certificate_markdown",
    "validate_certificate",
    "verify_certificate",
]


def render_certificate_markdown(certificate: Mapping[str, Any]) -> str:
    """Return the certificate as Markdown."""
    from invarlock.reporting.markdown import render_markdown

    return render_markdown(certificate)


def render_certificate_html(certificate: Mapping[str, Any]) -> str:
    """Return the certificate as one HTML page that stands alone."""
    from invarlock.reporting.html import render_html

    return render_html(certificate)
