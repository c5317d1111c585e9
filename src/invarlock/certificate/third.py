"""What derivation 3 estimates, gates and judges otherwise than the second. New certificates follow it.

A rule changes here and nowhere else: an estimator in THIRD_ESTIMATORS, a gate in `_CHANGED` (one of the second's, by its
name) or `_ADDED`, the verdict of a guard in THIRD_JUDGES. What the first two derivations use stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

from invarlock.certificate.gates import PLUGINS, GateKind
from invarlock.certificate.guards import GUARDS
from invarlock.certificate.second import SECOND_ESTIMATORS, SECOND_GATES
from invarlock.guards.base import StatsGuard

__all__ = ["GATE_NAMES", "THIRD_ESTIMATORS", "THIRD_GATES", "THIRD_JUDGES"]

THIRD_ESTIMATORS = SECOND_ESTIMATORS

_CHANGED: Mapping[str, GateKind] = {}
_ADDED: tuple[GateKind, ...] = ()
THIRD_GATES: tuple[GateKind, ...] = (*(_CHANGED.get(kind.name, kind) for kind in SECOND_GATES), *_ADDED)
#: what a gate may be called; that of a plugin guard is `plugin:<its name>`
GATE_NAMES = tuple(kind.name for kind in THIRD_GATES if kind.name != PLUGINS)

#: guards whose verdict on recorded facts is another one than before, by name
_JUDGES: Mapping[str, StatsGuard] = {}
THIRD_JUDGES: Mapping[str, StatsGuard] = {**GUARDS, **_JUDGES}
