"""Plugins: the worked example of a guard, and the state of everything that is registered."""

from __future__ import annotations

from invarlock.plugins.hello_guard import HelloGuard

__all__ = ["HelloGuard"]
