from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from invarlock.core.exceptions import ConfigError  # noqa: E402 - torch is needed first
from invarlock.eval.sources.torch_model import TorchSource  # noqa: E402
from invarlock.evidence.windows import calibration_windows, pick_indices  # noqa: E402
from invarlock.guards.activations import watched_modules  # noqa: E402
from invarlock.guards.rmt import RMTGuard, edge_ratio  # noqa: E402


def batches(count: int = 12, length: int = 40) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(1, 300, (length,), generator=generator).tolist()} for _ in range(count)]


def judged(guard: RMTGuard, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return guard.judge(json.loads(json.dumps(guard.pair(before, after), allow_nan=False)), guard.policy)


def test_noise_of_any_scale_lies_at_the_edge_and_a_common_direction_above() -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(400, 300, generator=generator)
    shifted = 5 + noise * torch.arange(1, 301)
    assert edge_ratio(noise)[0] == pytest.approx(1.0, abs=0.03)
    assert edge_ratio(shifted)[0] == pytest.approx(edge_ratio(noise)[0], rel=1e-3)
    common = noise + 3 * torch.randn(400, 1, generator=generator)
    assert edge_ratio(common)[0] > 5


def test_constant_features_are_dropped_and_counted() -> None:
    noise = torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    with_constants = torch.cat([noise, torch.zeros(50, 2), torch.full((50, 1), 7.3)], dim=1)
    assert edge_ratio(with_constants) == (pytest.approx(edge_ratio(noise)[0], rel=1e-6), 3)
    assert edge_ratio(torch.ones(50, 4))[1] == 4


@pytest.mark.slow
def test_a_model_against_itself_changes_nothing(model) -> None:
    guard = RMTGuard()
    before, after = guard.look(model, None, batches()), guard.look(model, None, batches())
    assert before == after
    result = judged(guard, before, after)
    assert result["passed"] and result["evaluated"]
    assert (result["errors"], result["warnings"], result["metrics"]["worst"]) == ([], [], [])
    assert {"ffn", "attn", "embed"} <= set(result["metrics"]["families"])
    assert all(row["change"] == 0 for row in result["metrics"]["families"].values())


def test_without_activations_it_fails_closed(make_model) -> None:
    guard = RMTGuard()
    for nothing in (None, []):
        stats = guard.look(make_model("gpt2"), None, nothing)
        result = judged(guard, stats, stats)
        assert not result["passed"] and not result["evaluated"]
        assert "no activations" in result["message"]


@pytest.mark.slow
def test_a_module_whose_output_died_is_named(make_model) -> None:
    model = make_model("llama")
    guard = RMTGuard()
    before = guard.look(model, None, batches())
    model.model.layers[1].mlp.up_proj.weight.data.zero_()
    result = judged(guard, before, guard.look(model, None, batches()))
    assert not result["passed"]
    assert result["errors"][0]["module"] == "model.layers.1.mlp.up_proj"
    assert "constant" in result["errors"][0]["message"]


@pytest.mark.slow
def test_activations_that_are_not_finite_are_named_where_they_began(make_model) -> None:
    model = make_model("llama")
    guard = RMTGuard()
    before = guard.look(model, None, batches())
    model.model.layers[1].self_attn.o_proj.weight.data[0, 0] = math.nan
    after = guard.look(model, None, batches())
    result = judged(guard, before, after)
    assert not result["passed"]
    assert result["errors"][0]["module"] == "model.layers.1.self_attn.o_proj"
    assert not judged(guard, after, after)["passed"]


def facts(change: float, *, family: str = "ffn", tokens: int = 100) -> dict[str, Any]:
    rows = [("a", 100, 2.0, 2.0), ("b", tokens, 4.0, 4.0 * change)]
    common = {"features": [64, 64], "constant": [0, 0], "dead_windows": [0, 0]}
    modules = [
        {"name": name, "family": family, "tokens": [m, m], "ratio": [r0, r1], **common} for name, m, r0, r1 in rows
    ]
    return {"modules": modules, "missing": [], "extra": []}


@pytest.mark.parametrize(
    ("change", "policy", "passed"),
    [
        (1.07, {}, True),  # family mean: (200 + 400 * 1.07) / 600 = 1.047
        (1.08, {}, False),
        (0.93, {}, True),
        (0.92, {}, False),
        (0.92, {"two_sided": False}, True),
        (1.16, {"epsilon": {"ffn": 0.2}}, True),
        (1.01, {"epsilon": {"ffn": 0.0}}, False),
    ],
)
def test_a_family_is_accepted_within_epsilon(change: float, policy: dict[str, Any], passed: bool) -> None:
    guard = RMTGuard(**policy)
    result = guard.judge(facts(change), guard.policy)
    assert result["passed"] is passed
    if not passed:
        assert result["errors"][0]["module"] == "b"
        assert result["errors"][0]["family"] == "ffn"


def test_families_are_weighted_by_tokens() -> None:
    guard = RMTGuard()
    assert guard.judge(facts(1.5, tokens=1), guard.policy)["passed"]
    assert not guard.judge(facts(1.5, tokens=1000), guard.policy)["passed"]


@pytest.mark.parametrize("change", ["tokens", "features", "missing", "extra", "ratio"])
def test_sides_that_saw_different_things_do_not_pass(change: str) -> None:
    guard = RMTGuard()
    broken = facts(1.0)
    if change in ("missing", "extra"):
        broken[change] = ["c"]
    else:
        broken["modules"][1][change] = [broken["modules"][1][change][0], None if change == "ratio" else 7]
    assert not guard.judge(broken, guard.policy)["passed"]


@pytest.mark.slow
def test_the_batch_size_does_not_matter(make_model) -> None:
    model = make_model("gpt2")
    guard = RMTGuard()
    windows = calibration_windows(batches(6))
    seen = []
    for size in (1, 2, 6):
        watch = replace(guard.watch(model, None, 6), windows=frozenset((0, 3, 5)))
        for _ in TorchSource(model, batch_tokens=40 * size).score(windows, watch=[watch]):
            pass
        seen.append(guard.measure(model, None)["modules"])
    for other in seen[1:]:
        for first, second in zip(seen[0], other, strict=True):
            assert second["ratio"] == pytest.approx(first["ratio"], rel=1e-5)
            assert {**second, "ratio": 0} == {**first, "ratio": 0}


def test_nothing_is_observed_when_no_window_is_wanted(make_model) -> None:
    model = make_model("gpt2")
    guard = RMTGuard()
    watch = replace(guard.watch(model, None, 4), windows=frozenset())
    list(TorchSource(model).score(calibration_windows(batches(4)), watch=[watch]))
    assert guard.measure(model, None) == {"modules": []}


def test_hooks_are_removed_however_the_scoring_ends(make_model) -> None:
    model = make_model("gpt2")
    watch = RMTGuard().watch(model, None, 4)

    def stop(path: str, outputs: Any) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        list(TorchSource(model).score(calibration_windows(batches(4)), watch=[replace(watch, receive=stop)]))
    scoring = TorchSource(model, batch_tokens=1).score(calibration_windows(batches(4)), watch=[watch])
    next(scoring)
    scoring.close()
    assert not any(module._forward_hooks for module in model.modules())


def test_the_output_layer_is_not_watched_and_stacked_experts_are(make_model) -> None:
    watched = watched_modules(make_model("moe"))
    assert "lm_head" not in watched
    assert watched["model.layers.0.mlp.experts"] == "ffn"
    assert watched["model.embed_tokens"] == "embed"


@pytest.mark.slow
def test_padding_of_a_batch_is_not_seen(make_model) -> None:
    model = make_model("bert")
    guard = RMTGuard()
    plain = [{"input_ids": [row["input_ids"]]} for row in batches(4)]
    padded = [{"input_ids": [row["input_ids"][0] + [0] * 9], "attention_mask": [[1] * 40 + [0] * 9]} for row in plain]
    assert guard.look(model, None, plain) == guard.look(model, None, padded)


def test_indices_follow_the_policy() -> None:
    assert pick_indices(10, 3, "evenly_spaced") == [0, 4, 9]
    assert pick_indices(10, 3, "first") == [0, 1, 2]
    assert pick_indices(10, 3, "last") == [7, 8, 9]
    assert pick_indices(2, 8, "evenly_spaced") == [0, 1]
    assert pick_indices(0, 8, "evenly_spaced") == []
    with pytest.raises(ConfigError, match="indices_policy"):
        RMTGuard(activation={"sampling": {"windows": {"indices_policy": "random"}}}).watch(None, None, 5)
