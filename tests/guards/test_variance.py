from __future__ import annotations

import json
import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from guards.models import trained  # noqa: E402
from invarlock.core.exceptions import ConfigError  # noqa: E402 - torch is needed first
from invarlock.eval.sources.torch_model import TorchSource, task_of_model  # noqa: E402
from invarlock.evidence.windows import calibration_windows  # noqa: E402
from invarlock.guards.variance import VarianceGuard, propose  # noqa: E402


def batches(count: int = 12, length: int = 40) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(1, 300, (length,), generator=generator).tolist()} for _ in range(count)]


def tap(name: str, before: float, after: float, scalable: bool = True) -> dict[str, Any]:
    return {"name": name, "tokens": [9, 9], "spread": [before, after], "scalable": scalable}


TAPS = [tap("a", 1.0, 1.01), tap("b", 1.1, 1.0), tap("c", 1.0, 1.04), tap("d", 2.0, 1.0, scalable=False)]


@pytest.mark.parametrize(
    ("policy", "scales"),
    [
        ({}, {"b": 1.03, "c": 0.97}),
        ({"max_scale_step": None}, {"b": 1.1, "c": 1 / 1.04}),
        ({"max_adjusted_modules": 1}, {"b": 1.03}),
        ({"deadband": 0.05}, {"b": 1.03}),
        ({"deadband": 0.2}, {}),
        ({"deadband": 0.2, "topk_backstop": 1}, {"b": 1.03}),
        ({"min_abs_adjust": 0.035}, {}),
        ({"min_abs_adjust": None, "deadband": 0.0}, {"b": 1.03, "c": 0.97, "a": 1 / 1.01}),
    ],
)
def test_scales_follow_from_spreads_and_filters(policy: dict[str, Any], scales: dict[str, float]) -> None:
    guard = VarianceGuard(**policy)
    assert propose(TAPS, guard.policy) == pytest.approx(scales)


def facts(delta: list[float | None] | None) -> dict[str, Any]:
    scales = propose(TAPS, VarianceGuard.defaults)
    trial = (
        None
        if delta is None
        else {"scales": scales, "delta": delta, "tokens": [10] * len(delta), "documents": list(range(len(delta)))}
    )
    return {"taps": TAPS, "unpaired": [], "trial": trial}


@pytest.mark.parametrize(
    ("delta", "policy", "enabled"),
    [
        (None, {}, False),
        ([-0.02, -0.03, -0.025, -0.028], {}, True),
        ([-0.02, -0.03, -0.025, -0.028], {"min_effect_lognll": 0.024}, False),
        ([-0.02, 0.03, -0.025, 0.028], {}, False),
        ([0.02, 0.03, 0.025, 0.028], {}, False),
        ([-0.02, None, -0.025, -0.028], {}, False),
        ([-0.02], {}, False),
        ([-0.001, -0.04, -0.03, -0.02], {"min_effect_lognll": 0.003, "predictive_one_sided": True}, True),
        ([-0.001, -0.04, -0.03, -0.02], {"min_effect_lognll": 0.003, "predictive_one_sided": False}, False),
    ],
)
def test_scales_stay_only_when_the_interval_lies_beyond_the_effect(delta, policy, enabled: bool) -> None:
    guard = VarianceGuard(**policy)
    result = guard.judge(facts(delta), guard.policy)
    assert result["passed"]
    assert result["metrics"]["enabled"] is enabled
    assert result["metrics"]["reason"]
    json.dumps(result, allow_nan=False)


def test_a_trial_of_other_scales_does_not_pass() -> None:
    guard = VarianceGuard()
    forged = facts([-0.02, -0.03])
    forged["trial"]["scales"] = {"b": 1.02}
    assert not guard.judge(forged, guard.policy)["passed"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spread": [1.0, None]}, "not finite in the subject"),
        ({"spread": [None, None]}, "not finite in the baseline"),
        ({"spread": [1.0, 0.0]}, "no longer vary"),
        ({"tokens": [9, 8]}, "expected the same"),
    ],
)
def test_a_damaged_tap_fails_and_is_named(change: dict[str, Any], words: str) -> None:
    guard = VarianceGuard()
    broken = {**facts(None), "taps": [*TAPS, {**tap("e", 1.0, 1.0), **change}]}
    result = guard.judge(broken, guard.policy)
    assert not result["passed"]
    assert [finding["module"] for finding in result["errors"]] == ["e"]
    assert words in result["message"]


def test_a_model_against_itself_proposes_nothing(model) -> None:
    guard = VarianceGuard(tap="both")
    before = guard.look(model, None, batches())
    after = guard.look(model, None, batches())
    assert before == after
    result = guard.judge(guard.pair(before, after), guard.policy)
    assert result["passed"] and result["evaluated"]
    assert (result["metrics"]["proposed"], result["metrics"]["enabled"]) == ({}, False)


def test_without_activations_it_is_off_and_not_evaluated(make_model) -> None:
    guard = VarianceGuard()
    stats = guard.measure(make_model("gpt2"), None)
    result = guard.judge(guard.pair(stats, stats), guard.policy)
    assert not result["evaluated"]
    assert "no activations" in result["message"]


@pytest.mark.parametrize(("tap_name", "count"), [("ffn", 3), ("attn", 3), ("both", 6), (r"gate_proj$", 3)])
def test_taps_are_chosen_by_family_or_pattern(make_model, tap_name: str, count: int) -> None:
    guard = VarianceGuard(tap=tap_name)
    assert len(guard.look(make_model("llama"), None, batches())["taps"]) == count


def test_a_bad_pattern_is_refused(make_model) -> None:
    with pytest.raises(ConfigError, match="expected ffn, attn, both"):
        VarianceGuard(tap="(").look(make_model("gpt2"), None, batches())


def text_batches(tokenizer: Any, count: int = 32) -> list[dict[str, Any]]:
    from invarlock.eval.data import get_provider

    preview, final = get_provider("python_docs").windows(
        tokenizer, preview_n=count // 2, final_n=count // 2, seq_len=64, stride=64
    )
    return [{"input_ids": ids} for ids in preview.input_ids + final.input_ids]


def _repair(guard: VarianceGuard, model: Any, data: Any) -> tuple[dict[str, Any], bool]:
    """What a run does: judge, then let the guard do something about it."""
    source = TorchSource(model, task_of_model(model))
    return guard.remedy(model, None, guard.validate(model, None, {}), calibration_windows(data), source)


def test_windows_of_one_document_are_one_cluster_of_the_trial() -> None:
    """Ten windows that gain alike are strong evidence from ten documents, and none from one."""
    guard = VarianceGuard()
    delta = [-0.02 - 0.001 * i for i in range(10)]
    apart = facts(list(delta))
    assert guard.judge(apart, guard.policy)["metrics"]["enabled"]
    apart["trial"]["documents"] = ["one"] * 10
    assert not guard.judge(apart, guard.policy)["metrics"]["enabled"]


@pytest.mark.slow
def test_spread_that_an_edit_took_away_is_restored_when_it_helps() -> None:
    model, tokenizer = trained("gpt2")
    data = text_batches(tokenizer)
    guard = VarianceGuard(max_scale_step=None)
    guard.prepare(model, None, data, {})
    projection = model.transformer.h[1].mlp.c_proj
    original = projection.weight.detach().clone()
    with torch.no_grad():
        projection.weight.mul_(0.4)
        projection.bias.mul_(0.4)
    result, changed = _repair(guard, model, data)
    assert changed and result["passed"] and result["metrics"]["enabled"], result["message"]
    assert result["metrics"]["proposed"]["transformer.h.1.mlp.c_proj"] == pytest.approx(2.5, rel=1e-4)
    assert torch.allclose(projection.weight, original, rtol=1e-3)


@pytest.mark.slow
def test_scales_that_do_not_help_are_taken_back_bit_for_bit() -> None:
    model, tokenizer = trained("gpt2")
    data = text_batches(tokenizer)
    guard = VarianceGuard(min_effect_lognll=5.0)
    guard.prepare(model, None, data, {})
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight.mul_(0.7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result, changed = _repair(guard, model, data)
    assert not changed and result["passed"] and not result["metrics"]["enabled"]
    assert result["metrics"]["interval"]["hi"] is not None and math.isfinite(result["metrics"]["interval"]["hi"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    untried = guard.validate(model, None, {})
    assert untried["metrics"]["proposed"] and untried["metrics"]["interval"] is None


def test_windows_without_a_loss_leave_the_scales_untried(make_model) -> None:
    model = make_model("bert")
    guard = VarianceGuard()
    guard.prepare(model, None, batches(), {})
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.mul_(0.5)
    kept = model.bert.encoder.layer[1].output.dense.weight.clone()
    result, changed = _repair(guard, model, batches())
    assert not changed and result["passed"] and result["metrics"]["proposed"]
    assert "not tried" in result["metrics"]["reason"]
    assert torch.equal(model.bert.encoder.layer[1].output.dense.weight, kept)
