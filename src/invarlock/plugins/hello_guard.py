"""`hello_guard`: the smallest guard that does something real. Copy it to start your own.

A guard is a class with a `name` and a `validate`. `prepare` is optional and sees the unedited model; `validate` sees the
edited one. In `certify` the two are different checkpoints, so keep what you need of the first in `self`, and keep it small.

Register your class under the entry-point group `invarlock.guards`:

    [project.entry-points."invarlock.guards"]
    my_guard = "my_package.my_module:MyGuard"

then name it in `guards.order` of a configuration; `guards.my_guard.*` become the arguments of its constructor.
"""

from __future__ import annotations

from typing import Any

from invarlock.core.api import AdapterLike, Batches, Context, Guard, ModelLike
from invarlock.core.exceptions import ConfigError, GuardError

__all__ = ["HelloGuard"]


class HelloGuard(Guard):
    """Says `message` and checks that the edit left the number of parameters as it was.

    `tolerance` is the largest relative change of that number that still passes; 0 (the default) allows none.
    """

    name = "hello_guard"

    def __init__(self, message: str = "hello", tolerance: float = 0.0) -> None:
        if not 0 <= tolerance < 1:
            raise ConfigError(f"hello_guard: tolerance is {tolerance!r}; expected a share from 0 to below 1")
        self.message = message
        self.tolerance = tolerance
        self._before: int | None = None

    def prepare(self, model: ModelLike, adapter: AdapterLike, calib: Batches | None, policy: object) -> dict[str, Any]:
        """Count the parameters of the unedited model."""
        self._before = _count(model)
        return {"ready": True, "parameters": self._before}

    def validate(self, model: ModelLike, adapter: AdapterLike, context: Context) -> dict[str, Any]:
        """Count again and compare. `passed` is required; the other keys make the result worth reading."""
        if self._before is None:
            raise GuardError("hello_guard: validate was called first; call prepare on the unedited model before it")
        after = _count(model)
        passed = self._before > 0 and abs(after - self._before) <= self.tolerance * self._before
        return {
            "passed": passed,
            "action": "continue" if passed else "rollback",
            "message": f"{self.message}: {self._before} parameters before, {after} after",
            "metrics": {"parameters_before": self._before, "parameters_after": after},
        }


def _count(model: ModelLike) -> int:
    """Count elements, not tensors. This file needs no torch."""
    return sum(int(parameter.numel()) for parameter in model.parameters())
