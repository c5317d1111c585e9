"""Adapters: load, describe, snapshot and save one kind of model."""

from __future__ import annotations

from invarlock.adapters.auto import HF_Auto_Adapter, HF_Causal_Auto_Adapter
from invarlock.adapters.hf import HF_Causal_Adapter, HF_MLM_Adapter, HF_Seq2Seq_Adapter
from invarlock.adapters.onnx import HF_Causal_ONNX_Adapter
from invarlock.adapters.packed import HF_AWQ_Adapter, HF_BNB_Adapter, HF_GPTQ_Adapter

__all__ = [
    "HF_AWQ_Adapter",
    "HF_Auto_Adapter",
    "HF_BNB_Adapter",
    "HF_Causal_Adapter",
    "HF_Causal_Auto_Adapter",
    "HF_Causal_ONNX_Adapter",
    "HF_GPTQ_Adapter",
    "HF_MLM_Adapter",
    "HF_Seq2Seq_Adapter",
]
