"""What guard results mean for a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from invarlock.core.exceptions import GuardError
from invarlock.guards.boundary import checked_result, consequence, not_evaluated, worst


def _result(**given: Any) -> dict[str, Any]:
    return checked_result("g", {"passed": True, **given})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"passed": True}, "keep"),
        ({"passed": True, "action": "none"}, "keep"),
        ({"passed": True, "action": "continue"}, "keep"),
        ({"passed": True, "action": "warn"}, "warn"),
        ({"passed": True, "action": "rollback"}, "rollback"),
        ({"passed": False}, "rollback"),
        ({"passed": False, "action": "none"}, "rollback"),
        ({"passed": False, "action": "continue"}, "rollback"),
        ({"passed": False, "action": "warn"}, "warn"),
        ({"passed": False, "action": "abort"}, "abort"),
    ],
)
def test_action_and_passed_decide_what_follows(given: dict[str, Any], expected: str) -> None:
    assert consequence(checked_result("g", given)) == expected


def test_missing_passed_names_the_guard_and_the_keys_that_came() -> None:
    with pytest.raises(GuardError, match=r"'probe'.*action, message"):
        checked_result("probe", {"action": "warn", "message": "hm"})


@pytest.mark.parametrize("passed", [None, "False", float("nan"), [], "yes", 0.5])
def test_passed_that_is_no_truth_value_is_refused(passed: Any) -> None:
    with pytest.raises(GuardError, match="expected True or False"):
        checked_result("g", {"passed": passed})


def test_numpy_truth_values_are_truth_values() -> None:
    assert checked_result("g", {"passed": np.bool_(True)})["passed"] is True
    assert checked_result("g", {"passed": np.bool_(False)})["passed"] is False


@pytest.mark.parametrize("returned", [None, True, ["passed"]])
def test_results_that_are_no_mapping_are_refused(returned: Any) -> None:
    with pytest.raises(GuardError, match="expected a dict"):
        checked_result("g", returned)


def test_unknown_action_is_refused() -> None:
    with pytest.raises(GuardError, match="'explode'.*continue, none, warn, rollback, abort"):
        checked_result("g", {"passed": True, "action": "explode"})


def test_assert_guards_holds_results_to_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = {"passed": True, "mood": "good"}
    assert checked_result("g", odd)["mood"] == "good"
    monkeypatch.setenv("INVARLOCK_ASSERT_GUARDS", "1")
    with pytest.raises(GuardError, match="mood"):
        checked_result("g", odd)
    with pytest.raises(GuardError, match="warnings"):
        checked_result("g", {"passed": True, "warnings": "one"})
    assert checked_result("g", {"passed": np.bool_(True)})["passed"] is True


def test_not_evaluated_never_counts_as_passed() -> None:
    skipped = not_evaluated("g", "no data")
    assert (skipped["passed"], skipped["evaluated"], consequence(skipped)) == (False, False, "warn")


def test_worst_keeps_every_single_result() -> None:
    first, second = _result(message="fine"), _result(passed=False, message="bad")
    merged = worst([first, second])
    assert (merged["passed"], merged["message"]) == (False, "bad")
    assert merged["runs"] == [first, second]
    assert "runs" not in worst([first])


def test_a_failure_is_never_hidden_by_a_graver_action_of_a_result_that_passed() -> None:
    merged = worst([_result(passed=False, action="warn"), _result(action="rollback")])
    assert (merged["passed"], merged["action"]) == (False, "rollback")
    assert worst([not_evaluated("g", "why"), _result(action="rollback")])["evaluated"] is False


def test_results_become_plain_json_values() -> None:
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.tensor([2.0, float("nan")]))
    kept = _result(metrics={"max": weight.abs().max(), "both": weight * 1, "np": np.float32(0.5), "inf": np.inf})
    assert kept["metrics"] == {"max": None, "both": [2.0, None], "np": 0.5, "inf": None}
