"""The boundary to guards, and what their results mean for a run: the contract, the worst of several, what follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from invarlock.core import settings
from invarlock.core.api import (
    AdapterLike,
    Batches,
    Context,
    Guard,
    GuardWithContext,
    GuardWithPrepare,
    ModelLike,
    RunReport,
)
from invarlock.core.exceptions import GuardError, InvarlockError
from invarlock.core.files import first_line, plain

__all__ = [
    "BUILT_IN_GUARDS",
    "Consequence",
    "Finding",
    "Policy",
    "Result",
    "checked_result",
    "consequence",
    "finding",
    "not_evaluated",
    "oneline",
    "prepare_guard",
    "result",
    "validate_guard",
    "worst",
]

#: the guards that come with the package, in the order in which they run; each has a section of its own in a certificate
BUILT_IN_GUARDS = ("invariants", "spectral", "rmt", "variance")

Consequence = Literal["keep", "warn", "rollback", "abort"]
_ACTIONS = ("continue", "none", "warn", "rollback", "abort")
_SEVERITY: dict[Consequence, int] = {"keep": 0, "warn": 1, "rollback": 2, "abort": 3}

Result: TypeAlias = dict[str, Any]
Finding: TypeAlias = dict[str, Any]
Policy: TypeAlias = Mapping[str, Any]


def finding(code: str, module: str | None, message: str) -> Finding:
    """Build one finding of a result; `module` names the culprit."""
    return {"code": code, "module": module, "message": message}


def result(
    passed: bool,
    message: str,
    *,
    action: str | None = None,
    metrics: dict[str, Any] | None = None,
    warnings: Sequence[Finding | str] = (),
    errors: Sequence[Finding] = (),
    evaluated: bool = True,
) -> Result:
    """Build a guard result; `warnings` and `errors` hold findings."""
    action = action or ("rollback" if not passed else "warn" if warnings else "continue")
    found = {"metrics": metrics or {}, "warnings": list(warnings), "errors": list(errors)}
    return {"passed": passed, "action": action, "message": message, **found, "evaluated": evaluated}


#: the type of each key of a result
_TYPES = {key: type(value) for key, value in result(True, "").items()}


def oneline(error: BaseException) -> str:
    """Return `Type: first line`; our own errors without the type."""
    text = first_line(error)
    return text if isinstance(error, InvarlockError) else f"{type(error).__name__}: {text}"


def prepare_guard(
    guard: Guard, model: ModelLike, adapter: AdapterLike, calib: Batches | None, policy: Policy, report: RunReport
) -> str | None:
    """Show a guard the unedited model. Return why it failed where INVARLOCK_GUARD_PREPARE_STRICT=0 tolerates that.

    Raises GuardError where it is not tolerated.
    """
    try:
        if isinstance(guard, GuardWithContext):
            guard.set_run_context(report)
        if isinstance(guard, GuardWithPrepare):
            guard.prepare(model, adapter, calib, policy)
    except Exception as error:  # the plugin boundary: a guard's prepare may raise anything
        if settings.flag("INVARLOCK_GUARD_PREPARE_STRICT"):
            raise GuardError(f"guard {guard.name!r} failed in prepare: {oneline(error)}") from error
        return oneline(error)
    return None


def validate_guard(guard: Guard, model: ModelLike, adapter: AdapterLike, context: Context) -> Result:
    """Return a guard's checked result on the edited model. Raises GuardError where it fails or breaks the contract."""
    try:
        returned = guard.validate(model, adapter, context)
    except InvarlockError:
        raise
    except Exception as error:  # the plugin boundary: a guard's validate may raise anything
        raise GuardError(f"guard {guard.name!r} failed in validate: {oneline(error)}") from error
    return checked_result(guard.name, returned)


def checked_result(name: str, returned: object) -> Result:
    """Return a guard's result with every optional key filled. Raises GuardError where it breaks the contract."""
    if not isinstance(returned, Mapping):
        raise GuardError(f"guard {name!r} returned {type(returned).__name__}; expected a dict with 'passed'")
    if "passed" not in returned:
        keys = ", ".join(sorted(map(str, returned))) or "none"
        raise GuardError(f"guard {name!r} returned no 'passed' (keys: {keys}); include passed, action and message")
    passed = plain(returned["passed"])
    if not isinstance(passed, bool):  # NaN, None or a text would read as passed or as failed by accident
        raise GuardError(f"guard {name!r} returned passed={returned['passed']!r}; expected True or False")
    if settings.flag("INVARLOCK_ASSERT_GUARDS"):
        for key, value in returned.items():
            kind = _TYPES.get(key)
            if kind is None or not isinstance(value if key != "passed" else passed, kind):
                wanted = kind.__name__ if kind else f"one of the keys {', '.join(_TYPES)}"
                raise GuardError(f"guard {name!r} returned {key}={value!r}; expected {wanted}")
    action = returned.get("action")
    if action is not None and action not in _ACTIONS:
        raise GuardError(f"guard {name!r} returned action {action!r}; expected one of: {', '.join(_ACTIONS)}")
    return {**result(passed, ""), **plain(returned), "passed": passed, "action": action or "none"}


def not_evaluated(name: str, reason: str) -> Result:
    """Return the result of a guard that could not be evaluated; it never counts as passed."""
    message = f"{name} was not evaluated: {reason}"
    return result(False, message, action="none", warnings=[reason], evaluated=False)


def consequence(outcome: Mapping[str, Any]) -> Consequence:
    """Return what follows from one result: its explicit action, and rollback for a failure that names none."""
    if not outcome.get("evaluated", True):
        return "warn"
    action: Consequence = outcome["action"]
    if action in _SEVERITY:
        return action
    return "keep" if outcome["passed"] else "rollback"


def worst(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the worst of a guard's results; the single ones stand in `runs` where there were several.

    Whatever action was the gravest, the whole counts as passed and evaluated only where every single result does.
    """
    ranked = max(outcomes, key=lambda o: (_SEVERITY[consequence(o)], not o["passed"]))
    if len(outcomes) == 1:
        return ranked
    whole = {key: all(o.get(key, True) for o in outcomes) for key in ("passed", "evaluated")}
    return {**ranked, **whole, "runs": list(outcomes)}
