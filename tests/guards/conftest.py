"""Small models of every recognised architecture, freshly initialised from a fixed seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

ARCHITECTURES = ("gpt2", "llama", "bert", "t5", "moe")


def build(architecture: str, layers: int = 3) -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers}
    common |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
    common |= {"max_position_embeddings": 128}
    configs: dict[str, tuple[str, str, dict[str, Any]]] = {
        "gpt2": (
            "GPT2Config",
            "GPT2LMHeadModel",
            {
                "n_layer": layers,
                "n_embd": 64,
                "n_head": 4,
                "vocab_size": 300,
                "n_positions": 128,
                "bos_token_id": 0,
                "eos_token_id": 0,
            },
        ),
        "llama": ("LlamaConfig", "LlamaForCausalLM", common),
        "bert": (
            "BertConfig",
            "BertForMaskedLM",
            {key: value for key, value in common.items() if key not in ("num_key_value_heads",)},
        ),
        "t5": (
            "T5Config",
            "T5ForConditionalGeneration",
            {"num_layers": layers, "d_model": 64, "d_ff": 128, "num_heads": 4, "d_kv": 16, "vocab_size": 300},
        ),
        "moe": ("MixtralConfig", "MixtralForCausalLM", common | {"num_local_experts": 4}),
    }
    config_name, model_name, arguments = configs[architecture]
    torch.manual_seed(7)
    config = getattr(transformers, config_name)(**arguments)
    return getattr(transformers, model_name)(config).eval()


@pytest.fixture
def make_model() -> Callable[..., Any]:
    return build


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(architecture: str) -> Any:
    return build(architecture)
