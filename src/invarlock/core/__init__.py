"""Contracts and orchestration. Nothing in this room imports torch when it is imported."""

from __future__ import annotations

__all__: list[str] = []
