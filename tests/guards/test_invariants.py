"""The structural guard on live models: every kind of damage is named, nothing harmless is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from invarlock.evidence.model import Structure
from invarlock.guards import InvariantsGuard

Edit = Callable[[Any], None]


def _llama(tied: bool = True) -> Any:
    torch.manual_seed(2)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied)).eval()


def _judge(edit: Edit, *, tied: bool = True, policy: dict[str, Any] | None = None, **knobs: Any) -> dict[str, Any]:
    model, guard = _llama(tied), InvariantsGuard(**knobs)
    guard.prepare(model, None, None, policy or {})
    with torch.no_grad():
        edit(model)
    return guard.validate(model, None, {})


def _nothing(model: Any) -> None:
    pass


def _scale(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.mul_(0.9)


def _all_half(model: Any) -> None:
    model.half()


def _equal_copy(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())


@pytest.mark.parametrize("edit", [_nothing, _scale, _all_half, _equal_copy], ids=lambda e: e.__name__)
def test_harmless_edits_have_no_findings(edit: Edit) -> None:
    verdict = _judge(edit)
    assert verdict["passed"] and not verdict["warnings"] and not verdict["errors"]


def _nan(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")


def _inf(model: Any) -> None:
    model.model.norm.weight[0] = float("inf")


def _nan_buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq[1] = float("nan")


def _untie(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 1.01)


def _drop(model: Any) -> None:
    del model.model.layers[1].mlp.gate_proj


def _drop_norm(model: Any) -> None:
    model.model.norm = torch.nn.Identity()


def _reshape(model: Any) -> None:
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(16, 20, bias=False)


def _add(model: Any) -> None:
    model.model.layers[0].mlp.extra = torch.nn.Linear(2, 2, bias=False)


def _config(model: Any) -> None:
    model.config.rms_norm_eps = 0.1


@pytest.mark.parametrize(
    ("edit", "code", "culprit"),
    [
        (_nan, "non_finite", "model.layers.1.self_attn.q_proj.weight"),
        (_inf, "non_finite", "model.norm.weight"),
        (_nan_buffer, "non_finite", "model.rotary_emb.inv_freq"),
        (_untie, "untied", "lm_head.weight"),
        (_drop, "tensor_missing", "model.layers.1.mlp.gate_proj.weight"),
        (_drop_norm, "tensor_missing", "model.norm.weight"),
        (_reshape, "tensor_shape", "model.layers.0.mlp.up_proj.weight"),
        (_add, "tensor_unexpected", "model.layers.0.mlp.extra.weight"),
        (_config, "config_changed", "rms_norm_eps"),
    ],
)
def test_damage_is_named(edit: Edit, code: str, culprit: str) -> None:
    verdict = _judge(edit)
    assert (verdict["passed"], verdict["action"]) == (False, "rollback")
    named = {(finding["code"], finding["tensor"] or finding.get("key")) for finding in verdict["errors"]}
    assert (code, culprit) in named
    assert culprit in verdict["message"] or "more)" in verdict["message"]


def test_a_missing_norm_is_named_as_one() -> None:
    assert "norm_missing" in {finding["code"] for finding in _judge(_drop_norm)["errors"]}
    off = _judge(_drop_norm, profile_checks=["dtype"])
    assert {finding["code"] for finding in off["errors"]} == {"tensor_missing"}


def test_tying_what_was_apart_is_damage() -> None:
    def tie(model: Any) -> None:
        model.lm_head.weight = model.model.embed_tokens.weight

    verdict = _judge(tie, tied=False)
    assert [(f["code"], f["tensor"]) for f in verdict["errors"]] == [("tied", "lm_head.weight")]


@pytest.mark.slow
def test_non_finite_values_count_only_where_the_baseline_is_finite() -> None:
    model, guard = _llama(), InvariantsGuard()
    with torch.no_grad():
        _nan(model)
    guard.prepare(model, None, None, {})
    assert guard.validate(model, None, {})["passed"]
    with torch.no_grad():
        _inf(model)
    assert [f["tensor"] for f in guard.validate(model, None, {})["errors"]] == ["model.norm.weight"]


def _one_layer_half(model: Any) -> None:
    model.model.layers[0].mlp.half()


@pytest.mark.slow
def test_mixed_types_warn_and_fail_under_strict_mode() -> None:
    loose = _judge(_one_layer_half)
    assert loose["passed"] and [f["code"] for f in loose["warnings"]] == ["dtype_mixed"]
    assert not _judge(_one_layer_half, strict_mode=True)["passed"]


@pytest.mark.parametrize("action", ["warn", "rollback", "abort"])
def test_on_fail_is_the_action_and_never_makes_it_pass(action: str) -> None:
    verdict = _judge(_nan, on_fail=action)
    assert (verdict["passed"], verdict["action"]) == (False, action)


@pytest.mark.slow
def test_finetune_intent_softens_the_configuration_and_nothing_else() -> None:
    soft = _judge(_config, policy={"intent": "finetune"})
    assert soft["passed"] and [f["key"] for f in soft["warnings"]] == ["rms_norm_eps"]
    assert not _judge(_untie, policy={"intent": "finetune"})["passed"]
    assert not _judge(_config, policy={"intent": "finetune"}, strict_mode=True)["passed"]


def test_a_model_without_tensors_is_not_evaluated_and_does_not_pass() -> None:
    guard = InvariantsGuard()
    guard.prepare(torch.nn.Identity(), None, None, {})
    verdict = guard.validate(torch.nn.Identity(), None, {})
    assert (verdict["passed"], verdict["evaluated"]) == (False, False)


@pytest.mark.parametrize(
    ("tokenizer", "codes"),
    [((None, None), set()), (("a", 64), set()), (("b", 64), {"E002"}), (("a", 65), {"vocabulary_size"})],
)
def test_the_tokenizer_must_be_the_same_and_fit_the_embedding(tokenizer: tuple[Any, Any], codes: set[str]) -> None:
    from invarlock.checkpoints.structure import live_structure

    guard, structure = InvariantsGuard(), live_structure(_llama())
    old, new = guard.stats_from(structure, {}, "a", 64), guard.stats_from(structure, {}, *tokenizer)
    facts = guard.pair(old, new)
    assert {finding["code"] for finding in facts["findings"]} == codes
    assert guard.judge(facts, {})["passed"] == (not codes)


def test_a_tensor_that_does_not_fit_the_subjects_own_configuration_fails_after_the_setting_at_fault() -> None:
    guard = InvariantsGuard()
    intact = Structure(source="file", tensors=[])
    torn = Structure(source="file", tensors=[], misshapen=["h.0.q.weight: got [4, 4], expected [8, 4]"])
    old = guard.stats_from(intact, {"heads": 2}, None, None)
    new = guard.stats_from(torn, {"heads": 4}, None, None)
    found = guard.pair(old, new)["findings"]
    assert [(finding["code"], finding["tensor"]) for finding in found] == [
        ("config_changed", None),
        ("tensor_shape", "h.0.q.weight"),
    ]
    again = guard.pair(new, new)["findings"]
    assert again == []
