"""A tiny model, tiny data and one call that runs an edit on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from invarlock.adapters import HF_Causal_Adapter
from invarlock.core.api import ModelEdit, RunConfig, RunReport
from invarlock.edits import NoopEdit
from invarlock.flow.execute import CoreRunner

VOCABULARY = 96

Execute = Callable[..., RunReport]


class Edit(ModelEdit):
    """An edit made of a function; what it returns is the edit's report."""

    name = "test_edit"

    def __init__(self, change: Callable[[Any], Any]) -> None:
        self.change = change

    def apply(self, model: Any, adapter: Any, **config: Any) -> dict[str, Any]:
        with torch.no_grad():
            returned = self.change(model)
        return returned if isinstance(returned, dict) else {"deltas": {"params_changed": 1, "layers_modified": 1}}


def build(kind: str = "gpt2") -> Any:
    torch.manual_seed(3)
    if kind == "llama":  # it has buffers (rotary frequencies) that no checkpoint stores
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, max_position_embeddings=64, **sizes)
        return LlamaForCausalLM(config).eval()
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    return build


@pytest.fixture(scope="session")
def tiny_data() -> list[dict[str, Any]]:
    """Eight windows of 20 tokens."""
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(0, VOCABULARY, (20,), generator=generator).tolist()} for _ in range(8)]


@pytest.fixture
def execute(tiny_data: list[dict[str, Any]]) -> Execute:
    """Run `edit` (an edit or a function of the model) under `guards`; keywords of RunConfig and `execute` mix freely."""

    def _execute(
        edit: Any = None, guards: Sequence[Any] = (), *, model: Any = None, data: Any = tiny_data, **options: Any
    ) -> RunReport:
        edit = NoopEdit() if edit is None else edit if hasattr(edit, "apply") else Edit(edit)
        keys = RunConfig.__dataclass_fields__.keys() & options.keys()
        config = RunConfig(**{"device": "cpu", **{key: options.pop(key) for key in keys}})
        adapter = options.pop("adapter", None) or HF_Causal_Adapter()
        model = build() if model is None else model
        return CoreRunner().execute(model, adapter, edit, list(guards), config, calibration_data=data, **options)

    return _execute


@pytest.fixture
def state_of() -> Callable[[Any], dict[str, torch.Tensor]]:
    """Copy everything that a model holds: parameters under every name, and all buffers."""

    def _state(model: Any) -> dict[str, torch.Tensor]:
        names = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        return {name: tensor.detach().clone() for name, tensor in names}

    return _state


@pytest.fixture
def same_state() -> Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], bool]:
    """Say whether two states have the same names, types and bits."""

    def _same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
        return before.keys() == after.keys() and all(
            before[name].dtype == after[name].dtype
            and torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
            for name in before
        )

    return _same
