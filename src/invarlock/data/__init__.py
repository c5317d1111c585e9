"""Packaged data: tiers, profiles, schemas and the demo model."""

from __future__ import annotations

__all__: list[str] = []
