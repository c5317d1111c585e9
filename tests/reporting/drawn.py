"""The HTML page of a certificate, drawn once for all tests: drawing is slow."""

from __future__ import annotations

import functools
import json
from typing import Any

from invarlock import reporting

__all__ = ["render_html"]


@functools.cache
def _drawn(text: str) -> str:
    return reporting.render_html(json.loads(text))


def render_html(certificate: dict[str, Any]) -> str:
    """Return the page of `certificate`, from memory where the same one was drawn before."""
    return _drawn(json.dumps(certificate))
