"""Show a certificate: Markdown, one HTML page, JUnit, plain words, lines for a terminal. Nothing here imports torch."""

from __future__ import annotations

from invarlock.reporting.explain import explain, explanations
from invarlock.reporting.html import render_html
from invarlock.reporting.junit import render_junit
from invarlock.reporting.markdown import compare, render_markdown
from invarlock.reporting.terminal import summary_lines

__all__ = [
    "compare",
    "explain",
    "explanations",
    "render_html",
    "render_junit",
    "render_markdown",
    "summary_lines",
]
