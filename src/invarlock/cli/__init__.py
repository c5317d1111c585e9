"""The command line: one thin file per command over the library."""

from __future__ import annotations

__all__: list[str] = []
