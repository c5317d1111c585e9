"""A trained small Llama in the body of a large one: it computes what the small one does, at the cost of its size.

The added dimensions, heads, units and layers put nothing into the residual stream. One added dimension holds a constant
there, too small to matter beside the norms' epsilon, which gives its square up; it serves the head to keep the added
ids of the vocabulary out of every prediction.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

SMALL_MODEL = Path(__file__).parents[1] / "tests" / "assets" / "models" / "llama"
_OUT_OF_REACH = 3e3  # the final gain of the constant dimension: added ids lie some 25 nats below the others
_INTO_STREAM = ("o_proj", "down_proj")


def widened(hidden: int, layers: int, vocabulary: int, positions: int) -> LlamaForCausalLM:
    """Return the small model with so many dimensions (a multiple of its heads' size), layers and ids, in float32."""
    small = AutoModelForCausalLM.from_pretrained(SMALL_MODEL, dtype=torch.float32)
    config = small.config
    narrow, epsilon = config.hidden_size, config.rms_norm_eps
    constant = (0.5 * narrow * epsilon) ** 0.5
    config.update(
        {
            "hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": vocabulary,
            "num_attention_heads": hidden // config.head_dim, "num_key_value_heads": hidden // config.head_dim,
            "intermediate_size": 8 * hidden // 3, "max_position_embeddings": positions, "dtype": "float32",
            "rms_norm_eps": (narrow * epsilon - constant**2) / hidden,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    large = LlamaForCausalLM(config).eval()
    given: dict[str, Any] = small.state_dict()
    with torch.no_grad():
        for name, target in large.state_dict().items():
            if name not in given:  # an added layer: it reads, and writes nothing
                if any(part in name for part in _INTO_STREAM):
                    target.zero_()
                continue
            target.zero_()
            source = given[name] * (narrow / hidden) ** 0.5 if name.endswith("norm.weight") else given[name]
            target[tuple(map(slice, source.shape))] = source
        large.model.norm.weight[narrow] = _OUT_OF_REACH
        embedding = large.model.embed_tokens.weight
        embedding[:, narrow] = -1.0
        embedding[: given["model.embed_tokens.weight"].shape[0], narrow] = constant
    return large
