"""Small models of every recognised architecture: freshly initialised from a fixed seed, and trained ones."""

from __future__ import annotations

from pathlib import Path
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
            {"num_layers": layers, "d_model": 64, "d_ff": 128, "num_heads": 4, "d_kv": 16, "vocab_size": 300}
            | {"decoder_start_token_id": 0, "pad_token_id": 0},
        ),
        "moe": ("MixtralConfig", "MixtralForCausalLM", common | {"num_local_experts": 4}),
    }
    config_name, model_name, arguments = configs[architecture]
    torch.manual_seed(7)
    config = getattr(transformers, config_name)(**arguments)
    return getattr(transformers, model_name)(config).eval()


def trained(name: str) -> tuple[Any, Any]:
    """Load one of the small trained models and its tokenizer, in single precision."""
    transformers = pytest.importorskip("transformers")
    root = Path(__file__).parents[2]
    folder = root / "src/invarlock/data/demo_model" if name == "gpt2" else root / "tests/assets/models" / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"the trained model {name} is not there; make it with tools/train_demo_models.py")
    kind = {"bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}.get(name, "AutoModelForCausalLM")
    model = getattr(transformers, kind).from_pretrained(folder, dtype="float32").eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)
