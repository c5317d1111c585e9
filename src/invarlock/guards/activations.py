"""Which modules a guard watches while windows are scored."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from invarlock.core.api import AdapterLike, ModelLike
from invarlock.guards.families import classify, is_expert_stack

if TYPE_CHECKING:
    from torch.nn import Module

__all__ = ["watched_modules"]

_SINGLE_EXPERT = re.compile(r"experts\.\d+(\.|$)")  # sees the tokens routed to it, no whole window


def watched_modules(model: ModelLike, adapter: AdapterLike | None = None) -> dict[str, str]:
    """Map the modules whose outputs are watched to their families: linear-like layers, stacks of experts and the
    input embedding, in the model's order. The output layer is left out: the loop applies it piece by piece.
    """
    if not hasattr(model, "named_modules"):
        return {}  # an inference session and the like: there is nothing to hook
    overrides: dict[str, str] = dict(getattr(adapter, "module_families", lambda model: {})(model))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    embedding = getattr(getattr(model, "get_input_embeddings", lambda: None)(), "weight", None)
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        kind, weight = type(module).__name__, getattr(module, "weight", None)
        embeds = kind == "Embedding" and weight is embedding  # T5 reads a shared weight through other modules
        linear = ("Linear" in kind or kind == "Conv1D") and not _SINGLE_EXPERT.search(path)
        if module is not head and (linear or embeds or _holds_experts(path, module)):
            name = f"{path}.weight"
            family = overrides.get(name) or overrides.get(path)
            found[path] = family or classify(name, tuple(getattr(weight, "shape", ())))[0]
    return found


def _holds_experts(path: str, module: Module) -> bool:
    """Say whether the output of a module is that of all its experts together."""
    stacked = (is_expert_stack(f"{path}.{name}", p.ndim) for name, p in module.named_parameters(recurse=False))
    return type(getattr(module, "experts", None)).__name__ == "ModuleList" or any(stacked)
