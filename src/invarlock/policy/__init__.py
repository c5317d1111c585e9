"""Which limits apply: tiers, profiles and a configuration, resolved into one policy with its provenance and digest."""

from __future__ import annotations

__all__: list[str] = []
