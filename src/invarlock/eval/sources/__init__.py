"""Who scores windows: a model in torch."""

from __future__ import annotations

__all__: list[str] = []
