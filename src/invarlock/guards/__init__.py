"""Guards: where a model broke, and damage that the evaluation text cannot see. Imported when first asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from invarlock.guards.invariants import InvariantsGuard
    from invarlock.guards.rmt import RMTGuard
    from invarlock.guards.spectral import SpectralGuard
    from invarlock.guards.variance import VarianceGuard

__all__ = ["InvariantsGuard", "RMTGuard", "SpectralGuard", "VarianceGuard"]

_HOMES = {name: f"invarlock.guards.{name.removesuffix('Guard').lower()}" for name in __all__}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
