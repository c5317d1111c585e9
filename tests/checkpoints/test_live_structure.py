"""A live model has the structure of the files that it was loaded from, until something changes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from invarlock.adapters import HF_Auto_Adapter
from invarlock.checkpoints.side import Loading, read_side
from invarlock.checkpoints.structure import live_structure
from invarlock.edits import NoopEdit
from invarlock.evidence.model import Structure

Loaded = tuple[Any, Structure]

_DECODER = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_SMALL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_DECODER, "tie_word_embeddings": True}),
    "bert": (
        "BertConfig",
        "BertForMaskedLM",
        {
            key: value
            for key, value in _DECODER.items()
            if key not in ("num_key_value_heads", "bos_token_id", "eos_token_id")
        },
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 300}
        | {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
    ),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_DECODER, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**_DECODER, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32},
    ),
}
_TRAINED = ("gpt2", "llama", "bert", "t5", "neox", "qwen")
_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a small random model of an architecture in a type; returns its folder."""
    made: dict[tuple[str, str], Path] = {}

    def save(architecture: str, dtype: str = "float32") -> Path:
        if (architecture, dtype) not in made:
            config, model, values = _SMALL[architecture]
            torch.manual_seed(3)
            built = getattr(transformers, model)(getattr(transformers, config)(**values))
            folder = tmp_path_factory.mktemp("small") / f"{architecture}-{dtype}"
            built.to(getattr(torch, dtype)).save_pretrained(folder)
            made[architecture, dtype] = folder
        return made[architecture, dtype]

    return save


def _load(folder: Path) -> Loaded:
    """Return the model as `certify` loads it on a CPU, in single precision, and the structure of its files."""
    adapter, loading = HF_Auto_Adapter(), Loading()
    side = read_side(adapter, str(folder), loading)
    return loading.load(adapter, side, "cpu"), side.structure


def _changed(before: Structure, after: Structure) -> set[str]:
    old, new = ({row.name: row for row in side.tensors} for side in (before, after))
    return {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", _TYPES)
@pytest.mark.parametrize("architecture", _SMALL)
def test_a_model_that_nothing_changed_has_exactly_the_structure_of_its_files(
    architecture: str, dtype: str, small: Callable[..., Path]
) -> None:
    model, files = _load(small(architecture, dtype))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {row.dtype for row in files.tensors} == {_TYPES[dtype]} and files.tied == live_structure(model).tied
    NoopEdit().apply(model, HF_Auto_Adapter())
    assert live_structure(model, files) is files


@pytest.mark.slow
@pytest.mark.parametrize("name", _TRAINED)
def test_so_has_a_trained_one(name: str, demo_model: Path, model_folder: Callable[[str], Path]) -> None:
    model, files = _load(demo_model if name == "gpt2" else model_folder(name))
    assert live_structure(model, files) is files


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", _SMALL)
def test_an_edited_model_has_the_structure_of_the_files_that_it_is_saved_as(
    architecture: str, dtype: str, small: Callable[..., Path], tmp_path: Path
) -> None:
    model, files = _load(small(architecture, dtype))
    weight = next(m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")).weight
    expert = next((p for name, p in model.named_parameters() if name.endswith("experts.down_proj")), None)
    with torch.no_grad():
        weight[0, 0] += 1
        if expert is not None:
            expert[2, 0, 0] = 5
    live = live_structure(model, files)
    assert live.source == "model"
    if dtype == "float32":
        changed = _changed(files, live)
        assert len(changed) == (1 if expert is None else 2)
        assert expert is None or any(".experts.2." in name for name in changed)
    model.save_pretrained(tmp_path)  # in the type that it was measured in
    saved = read_side(HF_Auto_Adapter(), str(tmp_path), Loading()).structure
    assert live.model_copy(update={"source": "file"}) == saved


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "head"),
    [
        ("gpt2", "lm_head.weight"),
        ("llama", "lm_head.weight"),
        ("bert", "cls.predictions.decoder.weight"),
        ("t5", "lm_head.weight"),
    ],
)
def test_an_edit_that_unties_a_head_shows(architecture: str, head: str, small: Callable[..., Path]) -> None:
    model, files = _load(small(architecture))
    assert head in dict(files.tied)
    output = model.get_output_embeddings()
    output.weight = torch.nn.Parameter(output.weight.detach().clone())
    assert live_structure(model, files) is files  # saved and loaded again, it is the same model
    with torch.no_grad():
        output.weight[3, 3] += 1
    live = live_structure(model, files)
    assert head not in dict(live.tied) and len(live.tied) == len(files.tied) - 1
    assert _changed(files, live) == {head}


@pytest.mark.slow
def test_an_edit_that_ties_what_was_apart_shows(small: Callable[..., Path]) -> None:
    model, files = _load(small("mixtral"))
    model.lm_head.weight = model.model.embed_tokens.weight
    live = live_structure(model, files)
    assert live.tied == [["lm_head.weight", "model.embed_tokens.weight"]] and files.tied == []
    assert _changed(files, live) == {"lm_head.weight"}


@pytest.mark.slow
def test_a_buffer_that_no_file_holds_is_listed_where_it_is_spoilt(small: Callable[..., Path]) -> None:
    model, files = _load(small("llama"))
    name = "model.rotary_emb.inv_freq"
    assert name in files.buffers and name not in {row.name for row in live_structure(model).tensors}
    model.model.rotary_emb.inv_freq[1] = float("nan")
    live = live_structure(model, files)
    assert _changed(files, live) == {name} and live.unexpected == []
    assert [row.non_finite for row in live.tensors if row.name == name] == [1]


@pytest.mark.slow
def test_files_without_the_prefix_and_with_an_extra_tensor_are_those_of_the_model(
    small: Callable[..., Path], tmp_path: Path
) -> None:
    """GPT-2's own files call `h.0.attn.c_attn.weight` what a re-save calls `transformer.h.0.attn.c_attn.weight`."""
    source = small("gpt2")
    tensors = load_file(source / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file({**bare, "extra": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    model, files = _load(tmp_path)
    assert files.unexpected == ["extra"]
    assert live_structure(model, files) is files
    with torch.no_grad():
        model.transformer.ln_f.bias += 1
    assert _changed(files, live_structure(model, files)) == {"transformer.ln_f.bias", "extra"}


def test_any_torch_module_has_a_structure() -> None:
    first = torch.nn.Linear(3, 2)
    model = torch.nn.Sequential(first, torch.nn.LayerNorm(2), torch.nn.Linear(2, 3))
    model.append(first)
    live = live_structure(model)
    assert [row.name for row in live.tensors] == [f"{i}.{leaf}" for i in range(3) for leaf in ("bias", "weight")]
    assert live.tied == [["3.bias", "0.bias"], ["3.weight", "0.weight"]]
    assert (live.norms, live.embedding_rows, live.missing) == (["1.bias", "1.weight"], None, [])
