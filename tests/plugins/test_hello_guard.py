"""The worked example: it compares the number of parameters before and after."""

from __future__ import annotations

import pytest
import torch

from invarlock.core.api import Guard, GuardWithPrepare
from invarlock.core.exceptions import ConfigError, GuardError
from invarlock.plugins import HelloGuard


def _validated(guard: HelloGuard, before: torch.nn.Module, after: torch.nn.Module) -> dict[str, object]:
    assert guard.prepare(before, None, None, {}) == {"ready": True, "parameters": 12}
    return guard.validate(after, None, {})


def test_it_is_a_guard_that_prepares() -> None:
    assert isinstance(HelloGuard(), Guard)
    assert isinstance(HelloGuard(), GuardWithPrepare)
    assert HelloGuard.name == "hello_guard"


def test_a_model_against_itself_passes() -> None:
    model = torch.nn.Linear(3, 3)
    result = _validated(HelloGuard(message="hi"), model, model)
    assert result == {
        "passed": True,
        "action": "continue",
        "message": "hi: 12 parameters before, 12 after",
        "metrics": {"parameters_before": 12, "parameters_after": 12},
    }


@pytest.mark.parametrize(("tolerance", "passed"), [(0.0, False), (0.2, False), (0.5, True)])
def test_a_lost_row_fails_beyond_the_tolerance(tolerance: float, passed: bool) -> None:
    result = _validated(HelloGuard(tolerance=tolerance), torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    assert (result["passed"], result["action"]) == (passed, "continue" if passed else "rollback")


def test_an_empty_model_never_passes() -> None:
    guard = HelloGuard()
    guard.prepare(torch.nn.Identity(), None, None, {})
    assert guard.validate(torch.nn.Identity(), None, {})["passed"] is False


def test_validate_before_prepare_says_what_to_do() -> None:
    with pytest.raises(GuardError, match="call prepare on the unedited model before it"):
        HelloGuard().validate(torch.nn.Linear(1, 1), None, {})


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, float("nan")])
def test_a_tolerance_out_of_range_is_refused(tolerance: float) -> None:
    with pytest.raises(ConfigError, match="expected a share from 0 to below 1"):
        HelloGuard(tolerance=tolerance)
