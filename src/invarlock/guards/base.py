"""The form of a built-in guard: measure one model, pair two measurements, judge the pair.

    measure(model) ──▶ stats ─┐
                              ├─ pair ──▶ facts ── judge(policy) ──▶ result
    measure(model) ──▶ stats ─┘

`pair` and `judge` are pure (no torch): a certificate embeds `facts`, and `verify` runs `judge` again on them. A guard
so written never sees both models at once and works with a stored baseline; `prepare` and `validate` are a thin shell.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeAlias

from invarlock.core.api import Guard
from invarlock.core.exceptions import GuardError

__all__ = ["Facts", "Policy", "Result", "Stats", "StatsGuard", "configure_guards", "result"]

Stats: TypeAlias = dict[str, Any]  # JSON-ready: what `measure` saw on one model
Facts: TypeAlias = dict[str, Any]  # JSON-ready: two Stats side by side, all that `judge` needs
Policy: TypeAlias = Mapping[str, Any]
Result: TypeAlias = dict[str, Any]


def result(
    passed: bool,
    message: str,
    *,
    action: str | None = None,
    metrics: dict[str, Any] | None = None,
    warnings: list[dict[str, Any]] | None = None,
    errors: list[dict[str, Any]] | None = None,
    evaluated: bool = True,
) -> Result:
    """Build a guard result. A finding in `warnings`/`errors` is {code, message, module?, ...}: module names the culprit."""
    default = "continue" if passed and not warnings else "warn" if passed else "rollback"
    return {
        "passed": passed,
        "action": action or default,
        "message": message,
        "metrics": metrics or {},
        "warnings": warnings or [],
        "errors": errors or [],
        "evaluated": evaluated,
    }


class StatsGuard(Guard):
    """A guard in the measure / pair / judge form."""

    #: names the defaults of every policy key; a constructor argument or the resolved policy overrides them
    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, **overrides: Any) -> None:
        self.overrides: dict[str, Any] = overrides
        self.policy: dict[str, Any] = {**self.defaults, **overrides}
        self.baseline: Stats | None = None
        self.subject: Stats | None = None

    def configure(self, policy: Policy) -> None:
        """Take the resolved policy; constructor arguments stand above it. Some keys change what is measured."""
        self.policy = {**self.defaults, **dict(policy), **self.overrides}

    @abstractmethod
    def contract(self) -> dict[str, Any]:
        """Return everything that changes what `measure` measures; two sides with other contracts do not compare."""

    @abstractmethod
    def measure(self, model: Any, adapter: Any, batches: Any = None) -> Stats:
        """Measure one model. `batches` is a sequence of {input_ids, attention_mask?, labels?} for activation guards."""

    @abstractmethod
    def pair(self, baseline: Stats, subject: Stats) -> Facts:
        """Put two measurements side by side. Pure."""

    @abstractmethod
    def judge(self, facts: Facts, policy: Policy) -> Result:
        """Decide from the facts alone. Pure; never passes on a missing or non-finite value."""

    def prepare(self, model: Any, adapter: Any, calib: Any, policy: Any) -> dict[str, Any]:
        """Measure the unedited model; what the caller has measured already is taken from `calib.measurements`."""
        self.configure(policy or {})
        ready = getattr(calib, "measurements", {}).get(self.name)
        self.baseline = ready if ready is not None else self.measure(model, adapter, calib)
        self._batches = calib
        return {"ready": True}

    def validate(self, model: Any, adapter: Any, context: dict[str, Any]) -> Result:
        """Measure the edited model and judge it against what `prepare` saw."""
        if self.baseline is None:
            raise GuardError(f"guard {self.name!r} has no baseline: call prepare(...) on the unedited model first")
        ready = context.get("measurements", {}).get(self.name)
        self.subject = (
            ready if ready is not None else self.measure(model, adapter, context.get("batches", self._batches))
        )
        return self.judge(self.pair(self.baseline, self.subject), self.policy)


def configure_guards(guards: Iterable[Any], policies: Mapping[str, Policy]) -> None:
    """Give each built-in guard its part of the resolved policy; a plugin guard gets its own in `prepare`."""
    for guard in guards:
        if isinstance(guard, StatsGuard):
            guard.configure(policies.get(guard.name, {}))
