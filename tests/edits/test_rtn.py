"""Round-to-nearest quantization, held against an independent implementation in numpy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from invarlock.core.exceptions import EditError
from invarlock.edits import RTNQuantEdit
from invarlock.edits.rtn import round_to_nearest


def _reference(weight: np.ndarray[Any, Any], bits: int, per_channel: bool, group: int | None, clamp: float) -> Any:
    """The same rounding, written group by group as one would on paper."""
    out = np.empty_like(weight, dtype=np.float64)
    levels = 2 ** (bits - 1) - 1

    def fill(rows: Any, columns: Any) -> None:
        block = weight[rows, columns].astype(np.float64)
        sizes = np.sort(np.abs(block), axis=None)
        top = sizes[max(1, round((1 - clamp) * sizes.size)) - 1] or sizes[-1]
        scale = top / levels if top else 1.0
        out[rows, columns] = np.clip(np.rint(block / scale), -levels, levels) * scale

    for row in range(weight.shape[0]):
        if group and group < weight.shape[1]:
            for start in range(0, weight.shape[1], group):
                fill(slice(row, row + 1), slice(start, start + group))
        elif per_channel:
            fill(slice(row, row + 1), slice(None))
    if not per_channel and not (group and group < weight.shape[1]):
        fill(slice(None), slice(None))
    return out


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("group", [None, 1, 7, 32, 50, 128])
@pytest.mark.parametrize("clamp", [0.0, 0.05])
def test_rounding_matches_numpy(bits: int, per_channel: bool, group: int | None, clamp: float) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(6, 50, generator=generator)
    rounded = round_to_nearest(weight, bits, per_channel=per_channel, group_size=group, clamp_ratio=clamp)
    expected = _reference(weight.numpy(), bits, per_channel, group, clamp)
    assert rounded.shape == weight.shape
    close = np.isclose(rounded.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert close.mean() >= 0.999  # a tie may fall to the other side in single precision


@pytest.mark.parametrize("bits", range(2, 9))
def test_each_row_holds_at_most_the_values_of_the_grid_and_the_error_is_half_a_step(bits: int) -> None:
    weight = torch.randn(5, 400, generator=torch.Generator().manual_seed(0))
    rounded = round_to_nearest(weight, bits, per_channel=True, group_size=None, clamp_ratio=0.0)
    step = weight.abs().amax(1) / (2 ** (bits - 1) - 1)
    assert max(len(row.unique()) for row in rounded) <= 2**bits - 1
    assert bool(((rounded - weight).abs().amax(1) <= step / 2 * 1.0001).all())


def test_rounding_twice_changes_nothing_more() -> None:
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    once = round_to_nearest(weight, 4, per_channel=True, group_size=16, clamp_ratio=0.0)
    twice = round_to_nearest(once, 4, per_channel=True, group_size=16, clamp_ratio=0.0)
    assert torch.allclose(once, twice, atol=1e-6)


def test_rows_of_zeros_and_sparse_rows_survive() -> None:
    weight = torch.zeros(2, 100)
    weight[1, 3] = 0.5
    rounded = round_to_nearest(weight, 8, per_channel=True, group_size=None, clamp_ratio=0.1)
    assert torch.allclose(rounded, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_type_of_the_weights_stays(dtype: torch.dtype) -> None:
    rounded = round_to_nearest(torch.randn(3, 9).to(dtype), 8, per_channel=True, group_size=None, clamp_ratio=0.0)
    assert rounded.dtype == dtype and bool(torch.isfinite(rounded).all())


def _models() -> dict[str, Any]:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=False))
    return {"gpt2": gpt2, "llama": llama}


MODELS = _models()
ATTENTION = {"gpt2": ("attn.c_attn", "attn.c_proj"), "llama": ("q_proj", "k_proj", "v_proj", "o_proj")}
FFN = {"gpt2": ("mlp.c_fc", "mlp.c_proj"), "llama": ("gate_proj", "up_proj", "down_proj")}


def _changed(before: Any, after: Any) -> set[str]:
    old = dict(before.named_parameters())
    return {name for name, tensor in after.named_parameters() if not torch.equal(old[name], tensor)}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("scope", ["attn", "ffn", "all"])
def test_scope_chooses_layers_and_never_head_or_embedding(name: str, scope: Any) -> None:
    model = copy.deepcopy(MODELS[name])
    report = RTNQuantEdit(bitwidth=3, scope=scope).apply(model, None)
    ends = {"attn": ATTENTION[name], "ffn": FFN[name], "all": ATTENTION[name] + FFN[name]}[scope]
    expected = {n for n, _ in model.named_parameters() if n.removesuffix(".weight").endswith(ends) and "bias" not in n}
    assert _changed(MODELS[name], model) == expected
    assert {row["module"] + ".weight" for row in report["modules"]} == expected
    assert report["deltas"]["layers_modified"] == len(expected) == 2 * len(ends)
    if name == "gpt2":
        assert model.lm_head.weight is model.transformer.wte.weight


def test_conv1d_is_rounded_along_its_inputs() -> None:
    model = copy.deepcopy(MODELS["gpt2"])
    before = model.transformer.h[0].mlp.c_fc.weight.detach().clone()  # [in, out]
    RTNQuantEdit(bitwidth=4, per_channel=True, group_size=5).apply(model, None)
    expected = _reference(before.t().numpy(), 4, True, 5, 0.0).T
    assert np.allclose(model.transformer.h[0].mlp.c_fc.weight.detach().numpy(), expected, atol=1e-6)


def test_max_modules_takes_the_first_in_model_order() -> None:
    model = copy.deepcopy(MODELS["gpt2"])
    report = RTNQuantEdit(max_modules=3).apply(model, None)
    assert [row["module"] for row in report["modules"]] == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.attn.c_proj",
        "transformer.h.0.mlp.c_fc",
    ]


def test_the_report_says_how_much_moved_and_config_overrides_the_constructor() -> None:
    model = copy.deepcopy(MODELS["llama"])
    report = RTNQuantEdit(bitwidth=8).apply(model, None, bitwidth=4)
    assert report["plan"]["bitwidth"] == report["deltas"]["bitwidth"] == 4
    old = dict(MODELS["llama"].named_parameters())
    for row in report["modules"]:
        before = old[row["module"] + ".weight"].detach()
        after = model.get_submodule(row["module"]).weight.detach()
        assert row["relative_change"] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
        assert row["weights_changed"] == int((after != before).sum())


@pytest.mark.slow
def test_eight_bits_are_harmless_on_a_trained_model_and_two_are_not(
    demo_model: Path, load_model: Callable[[Path], Any]
) -> None:
    changes = {}
    for bits in (8, 2):
        rows = RTNQuantEdit(bitwidth=bits).apply(load_model(demo_model), None)["modules"]
        changes[bits] = max(row["relative_change"] for row in rows)
    assert changes[8] < 0.02 and changes[2] > 0.3


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"bitwidth": 1}, "bitwidth=1"),
        ({"bitwidth": 9}, "bitwidth=9"),
        ({"bitwidth": 4.0}, "bitwidth=4.0"),
        ({"group_size": 0}, "group_size=0"),
        ({"clamp_ratio": 0.5}, "clamp_ratio=0.5"),
        ({"clamp_ratio": float("nan")}, "clamp_ratio=nan"),
        ({"scope": "mlp"}, "scope='mlp'"),
        ({"max_modules": 0}, "max_modules=0"),
    ],
)
def test_settings_out_of_range_are_refused_at_once_and_at_apply(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(EditError, match=named):
        RTNQuantEdit(**settings)
    with pytest.raises(EditError, match=named):
        RTNQuantEdit().apply(MODELS["gpt2"], None, **settings)


def test_unknown_settings_and_models_without_linear_layers_are_refused() -> None:
    with pytest.raises(EditError, match="'bits'; expected one of: bitwidth"):
        RTNQuantEdit().apply(MODELS["gpt2"], None, bits=4)
    with pytest.raises(EditError, match="no linear layer in scope 'all'"):
        RTNQuantEdit().apply(torch.nn.LayerNorm(4), None)


@pytest.mark.parametrize("turned", [False, True], ids=["out_in", "in_out"])
def test_stacked_experts_are_rounded_each_by_its_output_channels(turned: bool) -> None:
    """The library keeps the experts of a layer in one tensor, some of them turned; most weights of a model lie there."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    model: Any
    if turned:
        model = GptOssForCausalLM(GptOssConfig(num_key_value_heads=2, head_dim=8, num_local_experts=4, **sizes))
    else:
        model = MixtralForCausalLM(MixtralConfig(num_key_value_heads=2, num_local_experts=4, **sizes))
    experts = model.model.layers[0].mlp.experts
    before = {name: parameter.detach().clone() for name, parameter in experts.named_parameters() if parameter.ndim == 3}
    assert len(before) == 2
    done = RTNQuantEdit(bitwidth=4, scope="ffn").apply(model, None)
    for name, stack in before.items():
        for expert, matrix in enumerate(stack):
            old, new = (m.T if turned else m for m in (matrix, experts.get_parameter(name)[expert]))
            expected = _reference(old.numpy(), 4, True, None, 0.0)
            assert np.isclose(new.detach().numpy(), expected, rtol=1e-5, atol=1e-6).mean() >= 0.999
            assert f"model.layers.0.mlp.experts.{name}[{expert}]" in [row["module"] for row in done["modules"]]
    untouched = RTNQuantEdit(bitwidth=2, scope="attn").apply(model, None)["modules"]
    assert not any("experts" in row["module"] for row in untouched)
