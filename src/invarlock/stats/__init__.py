"""Numbers in, numbers out: intervals, decisions, tails, multiplicity, linear algebra. numpy and scipy."""

from __future__ import annotations

__all__: list[str] = []
