from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from guards import faults  # noqa: E402
from invarlock.core.exceptions import ConfigError  # noqa: E402 - torch is needed first
from invarlock.eval.sources.torch_model import TorchSource  # noqa: E402
from invarlock.guards.spectral import SpectralGuard  # noqa: E402


def compare(model: Any, edit: Any, **policy: Any) -> tuple[dict[str, Any], Any]:
    """Judge the edited model against itself before the edit; return the result and what the edit returned."""
    guard = SpectralGuard(**policy)
    before = guard.measure(model, None)
    with torch.no_grad():
        expected = edit(model)
    facts = guard.pair(before, guard.measure(model, None))
    return guard.judge(json.loads(json.dumps(facts, allow_nan=False)), guard.policy), expected


@pytest.mark.slow
def test_a_model_against_itself_has_no_findings(model) -> None:
    result, _ = compare(model, lambda m: None)
    assert result["passed"] and result["evaluated"]
    assert result["action"] == "continue"
    assert (result["warnings"], result["errors"], result["metrics"]["worst"]) == ([], [], [])
    assert result["metrics"]["max_growth"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["zeroed", "scaled x8", "scaled /8", "one head zeroed", "embedding rows zeroed"])
def test_each_fault_of_magnitude_fails_with_its_module_on_top(model, fault: str) -> None:
    result, expected = compare(model, faults.FAULTS[fault])
    assert not result["passed"]
    assert result["action"] == "rollback"
    assert {finding["module"] for finding in result["errors"]} == expected
    assert result["metrics"]["worst"][0]["module"] in expected
    assert next(iter(expected)) in result["message"]


def test_nan_is_fatal_and_named_on_either_side(make_model) -> None:
    model = make_model("llama")
    broken = copy.deepcopy(model)
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    guard = SpectralGuard()
    good, bad = guard.measure(model, None), guard.measure(broken, None)
    for sides in ((good, bad), (bad, good), (bad, bad)):
        facts = json.loads(json.dumps(guard.pair(*sides), allow_nan=False))
        result = guard.judge(facts, guard.policy)
        assert not result["passed"]
        assert [(f["code"], f["module"]) for f in result["errors"]] == [
            ("spectral_nonfinite", "model.layers.0.mlp.up_proj.weight")
        ]


def test_columns_of_a_few_rows_are_single_weights_and_may_round_to_zero() -> None:
    """As in the gate of a shared expert, [1, width]: 8-bit rounding zeroes its smallest weights and harms nobody."""
    gate = torch.nn.Sequential(torch.nn.Linear(256, 1, bias=False))
    torch.nn.init.normal_(gate[0].weight, generator=torch.Generator().manual_seed(1))

    def round_it(model: Any) -> None:
        step = model[0].weight.abs().max() / 127
        model[0].weight.copy_((model[0].weight / step).round() * step)
        assert int((model[0].weight == 0).sum()) > 0

    result, _ = compare(gate, round_it)
    assert result["passed"] and not result["warnings"], result["message"]
    assert not compare(gate, lambda model: model[0].weight.zero_())[0]["passed"]


def test_a_zeroed_embedding_row_is_named_by_its_number(make_model) -> None:
    def edit(model: Any) -> None:
        model.get_input_embeddings().weight[17] = 0

    result, _ = compare(make_model("llama"), edit)
    assert result["errors"][0]["message"].endswith("rows zeroed (1 of 300): 17")


def permute_neurons(model: Any) -> None:
    for layer in model.model.layers:
        order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
        for name in ("gate_proj", "up_proj"):
            weight = getattr(layer.mlp, name).weight
            weight.copy_(weight[order].clone())
        layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order].clone())


def permute_heads(model: Any) -> None:
    for layer in model.model.layers:  # two groups of two query heads on one key-value head each
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight.copy_(torch.cat(projection.weight.chunk(2)[::-1]).clone())
        attention.o_proj.weight.copy_(torch.cat(attention.o_proj.weight.chunk(2, dim=1)[::-1], dim=1).clone())


def move_factor_ffn(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    model.model.layers[1].mlp.down_proj.weight.div_(1.5)


def move_factor_attention(model: Any) -> None:
    model.model.layers[1].self_attn.v_proj.weight.mul_(1.5)
    model.model.layers[1].self_attn.o_proj.weight.div_(1.5)


@pytest.mark.parametrize("change", [permute_neurons, permute_heads, move_factor_ffn, move_factor_attention])
def test_what_leaves_the_function_as_it_was_does_not_fail(make_model, change) -> None:
    model = make_model("llama")
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        before = model(input_ids=ids).logits
    result, _ = compare(model, change)
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-5)
    assert result["passed"], result["message"]
    moved = change in (move_factor_ffn, move_factor_attention)
    assert result["metrics"]["violations"] == (2 if moved else 0)
    assert result["action"] == ("warn" if moved else "continue")


@pytest.mark.slow
@pytest.mark.parametrize("edit", [lambda m: faults.round_to(m, 8), faults.prune, lambda m: m.bfloat16() and None])
def test_harmless_edits_have_no_findings(model, edit) -> None:
    result, _ = compare(model, edit)
    assert result["passed"] and not result["warnings"], result


def scale_ffn(count: int, factor: float = 1.3):
    def edit(model: Any) -> None:
        for index in range(count):
            faults.in_family(model, "ffn", index).tensor().mul_(factor)

    return edit


@pytest.mark.parametrize(("count", "passed"), [(0, True), (1, True), (5, True), (6, False)])
def test_more_violations_than_max_caps_fail(make_model, count: int, passed: bool) -> None:
    result, _ = compare(make_model("llama"), scale_ffn(count))
    assert result["passed"] is passed
    assert result["metrics"]["violations"] == count


@pytest.mark.slow
def test_growth_within_the_deadband_or_kappa_or_outside_scope_is_no_violation(make_model) -> None:
    model = make_model("llama")
    for policy in ({"deadband": 0.31}, {"kappa": {"ffn": 56.0}}, {"scope": ["attn"]}, {"tau": {"ffn": 5.0}}):
        result, _ = compare(copy.deepcopy(model), scale_ffn(3), **policy)
        assert result["metrics"]["violations"] == 0, policy
    result, _ = compare(model, scale_ffn(3), multiple_testing={"method": "bonferroni", "alpha": 6.25e-4})
    assert result["metrics"]["violations"] == 3


def test_an_unknown_multiple_testing_method_is_refused(make_model) -> None:
    with pytest.raises(ConfigError, match="bonferroni"):
        compare(make_model("gpt2"), lambda m: None, multiple_testing={"method": "holm", "alpha": 0.05})


def test_missing_and_extra_modules_fail_and_packed_ones_are_left_out(make_model) -> None:
    guard = SpectralGuard()
    before = guard.measure(make_model("llama"), None)
    after = copy.deepcopy(before)
    gone = after["modules"].pop(3)["name"]
    result = guard.judge(guard.pair(before, after), guard.policy)
    assert [(f["code"], f["module"]) for f in result["errors"]] == [("spectral_missing", gone)]
    result = guard.judge(guard.pair(after, before), guard.policy)
    assert [(f["code"], f["module"]) for f in result["errors"]] == [("spectral_extra", gone)]
    after["unreadable"] = [gone]  # packed in the subject only
    result = guard.judge(guard.pair(before, after), guard.policy)
    assert result["passed"] and result["metrics"]["not_comparable"] == 1
    assert [finding["code"] for finding in result["warnings"]] == ["spectral_not_comparable"]
    result = guard.judge(guard.pair(after, after), guard.policy)  # packed on both sides: counted, no finding
    assert result["passed"] and result["metrics"]["not_comparable"] == 1 and not result["warnings"]


def test_nothing_to_compare_never_passes() -> None:
    guard = SpectralGuard()
    empty = {"modules": [], "unreadable": []}
    result = guard.judge(guard.pair(empty, empty), guard.policy)
    assert not result["passed"] and not result["evaluated"]


def test_a_model_without_weights_is_not_evaluated() -> None:
    guard = SpectralGuard()
    stats = guard.measure(object(), None)
    assert not guard.judge(guard.pair(stats, stats), guard.policy)["evaluated"]


@pytest.mark.slow
def test_a_dead_row_may_stay_dead_or_wake_but_not_explode(make_model) -> None:
    def wake(scale: float):
        def edit(model: Any) -> None:
            weight = model.get_input_embeddings().weight
            weight[5] = scale * weight[6]

        return edit

    for scale, passed in ((0.0, True), (1.0, True), (30.0, False)):
        model = make_model("llama")
        model.get_input_embeddings().weight.data[5] = 0
        result, _ = compare(model, wake(scale))
        assert result["passed"] is passed, scale


@pytest.mark.parametrize("missing", ["sigma", "frobenius", "row_norm", "column_norm"])
def test_a_fact_that_is_missing_fails(make_model, missing: str) -> None:
    guard = SpectralGuard()
    stats = guard.measure(make_model("gpt2"), None)
    facts = guard.pair(stats, stats)
    entry = facts["modules"][2]
    entry[missing] = [None, None] if isinstance(entry[missing], list) else dict.fromkeys(entry[missing])
    result = guard.judge(facts, guard.policy)
    assert [finding["module"] for finding in result["errors"]] == [entry["name"]]


def test_correction_scales_an_offender_back_and_says_so(make_model) -> None:
    model = make_model("llama")
    guard = SpectralGuard(correction_enabled=True, sigma_quantile=1.0)
    guard.prepare(model, None, None, {})
    with torch.no_grad():
        offender = faults.in_family(model, "ffn")
        offender.tensor().mul_(4)
    found = guard.validate(model, None, {})
    assert "corrections" not in found["metrics"], "to judge changes nothing"
    result, changed = guard.remedy(model, None, found, (), TorchSource(model))
    assert [entry["module"] for entry in result["metrics"]["corrections"]] == [offender.name]
    assert changed and result["passed"]


def test_the_facts_of_a_large_model_stay_small(make_model) -> None:
    guard = SpectralGuard()
    stats = guard.measure(make_model("llama", layers=6), None)
    facts = guard.pair(stats, stats)
    assert len(json.dumps(facts)) / len(facts["modules"]) < 500
