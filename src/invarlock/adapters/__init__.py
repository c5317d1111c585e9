"""Adapters: load, describe, snapshot and save one kind of model. Classes are imported when first asked for."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from invarlock.core.exceptions import AdapterError, DependencyError

if TYPE_CHECKING:
    from invarlock.adapters.auto import HF_Auto_Adapter, HF_Causal_Auto_Adapter
    from invarlock.adapters.hf import HF_Causal_Adapter, HF_MLM_Adapter, HF_Seq2Seq_Adapter

__all__ = [
    "HF_Auto_Adapter",
    "HF_Causal_Adapter",
    "HF_Causal_Auto_Adapter",
    "HF_MLM_Adapter",
    "HF_Seq2Seq_Adapter",
]

_HOMES = {
    "HF_Auto_Adapter": "invarlock.adapters.auto",
    "HF_Causal_Adapter": "invarlock.adapters.hf",
    "HF_Causal_Auto_Adapter": "invarlock.adapters.auto",
    "HF_MLM_Adapter": "invarlock.adapters.hf",
    "HF_Seq2Seq_Adapter": "invarlock.adapters.hf",
}
_NOT_YET = {"HF_Causal_ONNX_Adapter": "convert the model to a Hugging Face checkpoint and use HF_Causal_Adapter"}


def __getattr__(name: str) -> Any:
    if name in _NOT_YET:
        raise AdapterError(f"{name} is not part of this version; {_NOT_YET[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in ("torch", "transformers"):
        if importlib.util.find_spec(module) is None:
            raise DependencyError(name, "adapters")
    return getattr(importlib.import_module(_HOMES[name]), name)
