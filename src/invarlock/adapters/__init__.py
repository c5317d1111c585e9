"""Adapters: load, describe, snapshot and save one kind of model."""

from __future__ import annotations

from invarlock.adapters.auto import HF_Auto_Adapter, HF_Causal_Auto_Adapter
from invarlock.adapters.hf import HF_Causal_Adapter, HF_MLM_Adapter, HF_Seq2Seq_Adapter
from invarlock.adapters.packed import HF_AWQ_Adapter, HF_BNB_Adapter, HF_GPTQ_Adapter
from invarlock.core.exceptions import AdapterError

__all__ = [
    "HF_AWQ_Adapter",
    "HF_Auto_Adapter",
    "HF_BNB_Adapter",
    "HF_Causal_Adapter",
    "HF_Causal_Auto_Adapter",
    "HF_GPTQ_Adapter",
    "HF_MLM_Adapter",
    "HF_Seq2Seq_Adapter",
]

_NOT_YET = {"HF_Causal_ONNX_Adapter": "convert the model to a Hugging Face checkpoint and use HF_Causal_Adapter"}


def __getattr__(name: str) -> object:
    if name in _NOT_YET:
        raise AdapterError(f"{name} is not part of this version; {_NOT_YET[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
