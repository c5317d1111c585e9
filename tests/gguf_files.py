"""GGUF files of the test models, written as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Arrays = dict[str, NDArray[Any]]

_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """Return what a tensor of a Llama is called in a GGUF file."""
    module, _, leaf = name.rpartition(".")
    layer, rest = "", module
    if module.startswith("model.layers."):
        _, _, number, rest = module.split(".", 3)
        layer = f"blk.{number}."
    return f"{layer}{_NAMES[rest]}.{leaf}"


def interleaved(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """Order the rows of q and k as llama.cpp's rotary positions want them: the two halves of a head take turns."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    model: Path,
    file: Path,
    kind: str = "Q8_0",
    *,
    change: Callable[[Arrays], object] = lambda tensors: None,
    fields: Mapping[str, str] | None = None,
    architecture: str = "llama",
    shards: int = 1,
) -> Path:
    """Convert a Llama folder: matrices are quantized as `kind`, everything else stays in float32.

    change: what is done to the file's tensors, by their GGUF names and as they are stored (bytes of blocks, where
    quantized). fields: metadata texts to overwrite, such as the pre-tokenizer's. shards: more than one is written to files
    that are numbered.
    """
    import gguf

    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    names = list(load_file(model / "model.safetensors"))
    split = {"split_max_tensors": -(-len(names) // shards)} if shards > 1 else {}
    writer = gguf.GGUFWriter(file, architecture, **split)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    said = {"model": "gpt2", "pre": "gpt-2", **(fields or {})}
    writer.add_tokenizer_model(said["model"])
    writer.add_tokenizer_pre(said["pre"])
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    for role in ("bos", "eos", "pad"):
        writer.add_uint32(f"tokenizer.ggml.{'padding' if role == 'pad' else role}_token_id", config[f"{role}_token_id"])
    writer.add_add_bos_token(False)
    wanted = gguf.GGMLQuantizationType[kind]
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    stored: Arrays = {}
    types: dict[str, Any] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        values, called = tensor.astype(np.float32), gguf_name(name)
        if called.endswith(("attn_q.weight", "attn_k.weight")):
            key = "num_attention_heads" if "attn_q" in called else "num_key_value_heads"
            values = interleaved(values, config[key])
        plain = values.ndim < 2 or values.shape[1] % block
        types[called] = gguf.GGMLQuantizationType.F16 if plain and values.ndim > 1 else wanted
        if values.ndim < 2:
            types[called] = gguf.GGMLQuantizationType.F32
        stored[called] = gguf.quantize(values, types[called])
    change(stored)
    for called, values in stored.items():
        writer.add_tensor(called, values, raw_dtype=types.get(called))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
