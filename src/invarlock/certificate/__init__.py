"""Certificates: compare two pieces of evidence into a verdict, and re-derive that verdict later. No torch here."""

from __future__ import annotations

__all__: list[str] = []
