from __future__ import annotations

from types import SimpleNamespace

import pytest

from invarlock.guards.families import classify, layer_index, unreadable_weights, weight_matrices

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("transformer.wte.weight", "embed"),
        ("transformer.wpe.weight", "embed"),
        ("transformer.h.0.attn.c_attn.weight", "attn"),
        ("transformer.h.0.attn.c_proj.weight", "attn"),
        ("transformer.h.0.mlp.c_proj.weight", "ffn"),
        ("transformer.h.0.ln_1.weight", "other"),
        ("model.layers.3.self_attn.q_proj.weight", "attn"),
        ("model.layers.3.mlp.gate_proj.weight", "ffn"),
        ("model.layers.3.mlp.gate.weight", "router"),
        ("model.layers.3.mlp.shared_expert_gate.weight", "router"),
        ("model.layers.3.mlp.experts.gate_up_proj[2]", "ffn"),
        ("model.layers.3.block_sparse_moe.experts.1.w2.weight", "ffn"),
        ("model.layers.3.post_attention_layernorm.weight", "other"),
        ("lm_head.weight", "embed"),
        ("embed_out.weight", "embed"),
        ("bert.encoder.layer.0.attention.output.dense.weight", "attn"),
        ("bert.encoder.layer.0.output.dense.weight", "ffn"),
        ("bert.encoder.layer.0.intermediate.dense.weight", "ffn"),
        ("cls.predictions.transform.dense.weight", "other"),
        ("cls.predictions.decoder.weight", "embed"),
        ("shared.weight", "embed"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "attn"),
        ("decoder.block.0.layer.2.DenseReluDense.wo.weight", "ffn"),
        ("model.decoder.layers.0.fc1.weight", "ffn"),
        ("model.decoder.layers.0.self_attn_layer_norm.weight", "other"),
        ("gpt_neox.layers.0.attention.query_key_value.weight", "attn"),
        ("transformer.h.0.mlp.dense_4h_to_h.weight", "ffn"),
        ("distilbert.transformer.layer.0.attention.out_lin.weight", "attn"),
        ("distilbert.transformer.layer.0.ffn.lin2.weight", "ffn"),
    ],
)
def test_names_in_use_are_recognised(name: str, family: str) -> None:
    assert classify(name, (64, 64)) == (family, "name")


@pytest.mark.parametrize(
    ("shape", "family"),
    [((64, 64), "attn"), ((256, 64), "ffn"), ((64, 256), "ffn"), ((999, 64), "embed"), ((64,), "other")],
)
def test_an_unknown_name_falls_back_to_the_shape_and_says_so(shape: tuple[int, ...], family: str) -> None:
    assert classify("blk.thing.weight", shape) == (family, "shape")


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("transformer.h.11.attn.c_attn.weight", 11),
        ("decoder.block.2.layer.0.SelfAttention.q.weight", 2),
        ("model.layers.4.mlp.experts.7.w1.weight", 4),
        ("lm_head.weight", None),
    ],
)
def test_layer_numbers(name: str, layer: int | None) -> None:
    assert layer_index(name) == layer


def test_every_matrix_of_a_known_architecture_is_listed_by_name(model, architecture) -> None:
    weights = weight_matrices(model)
    assert all(weight.by == "name" for weight in weights)
    assert all(tuple(weight.tensor().shape) == weight.shape for weight in weights)
    covered = sum(weight.tensor().numel() for weight in weights)
    assert covered == sum(p.numel() for p in model.parameters() if p.ndim > 1)
    expected = {"ffn", "attn", "embed"} | ({"router"} if architecture == "moe" else set())
    assert expected <= {weight.family for weight in weights}


def test_a_tied_head_is_listed_once_as_the_embedding(make_model) -> None:
    tied = [weight for weight in weight_matrices(make_model("gpt2")) if weight.tied]
    assert [(weight.name, weight.role) for weight in tied] == [("transformer.wte.weight", "embedding")]
    assert [w.role for w in weight_matrices(make_model("llama")) if w.name == "lm_head.weight"] == ["head"]


def test_conv1d_is_oriented_like_a_linear_layer(make_model) -> None:
    model = make_model("gpt2")
    weight = next(w for w in weight_matrices(model) if w.name.endswith("0.mlp.c_fc.weight"))
    assert weight.shape == (256, 64)
    weight.tensor().zero_()
    assert not model.transformer.h[0].mlp.c_fc.weight.any()


def test_experts_of_a_stack_come_one_by_one(make_model) -> None:
    names = [w.name for w in weight_matrices(make_model("moe")) if "layers.0.mlp.experts.down_proj" in w.name]
    assert names == [f"model.layers.0.mlp.experts.down_proj[{index}]" for index in range(4)]


def test_an_adapter_overrules_the_table(make_model) -> None:
    adapter = SimpleNamespace(module_families=lambda model: {"lm_head.weight": "other"})
    head = next(w for w in weight_matrices(make_model("llama"), adapter) if w.name == "lm_head.weight")
    assert (head.family, head.by) == ("other", "adapter")


def test_packed_weights_are_reported_instead_of_measured() -> None:
    class Packed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))

    class EightBit(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)

    model = torch.nn.ModuleDict({"a": Packed(), "b": EightBit(), "c": torch.nn.Linear(4, 4)})
    assert [weight.name for weight in weight_matrices(model)] == ["c.weight"]
    assert unreadable_weights(model) == ["a.weight", "b.weight"]
