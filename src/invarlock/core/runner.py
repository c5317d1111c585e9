"""The public name of `flow.execute`: `CoreRunner`, the programmatic entry point."""

from __future__ import annotations

from invarlock.flow.execute import CoreRunner

__all__ = ["CoreRunner"]
