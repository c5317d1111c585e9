"""Edits: in-place changes of a model. Classes are imported when first asked for."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from invarlock.core.exceptions import DependencyError

if TYPE_CHECKING:
    from invarlock.edits.checkpoint import CheckpointEdit
    from invarlock.edits.noop import NoopEdit
    from invarlock.edits.rtn import RTNQuantEdit

__all__ = ["CheckpointEdit", "NoopEdit", "RTNQuantEdit"]

_HOMES = {
    "CheckpointEdit": "invarlock.edits.checkpoint",
    "NoopEdit": "invarlock.edits.noop",
    "RTNQuantEdit": "invarlock.edits.rtn",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if importlib.util.find_spec("torch") is None:
        raise DependencyError(name, "edits")
    return getattr(importlib.import_module(_HOMES[name]), name)
