"""Causal models as ONNX files: executed by onnxruntime, for evaluation only; their weights are read from the initializers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

from invarlock.adapters.hf import HF_Causal_Adapter
from invarlock.adapters.native import said, same_model
from invarlock.checkpoints.files import resolve_folder
from invarlock.checkpoints.onnx import OnnxFolder
from invarlock.checkpoints.shards import SafetensorsFolder
from invarlock.core.device import require_extra, thread_count
from invarlock.core.exceptions import AdapterError, ModelLoadError
from invarlock.core.files import first_line

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

__all__ = ["HF_Causal_ONNX_Adapter"]

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


class HF_Causal_ONNX_Adapter(HF_Causal_Adapter):
    """A folder with `config.json`, a tokenizer and `model.onnx`. The graph scores windows; the dense model of its
    initializers is what guards of weights look at. Activations are not seen, and nothing of it can be edited."""

    name = "hf_causal_onnx"

    def __init__(self) -> None:
        super().__init__()
        require_extra(type(self).__name__, "onnx", "onnxruntime", "onnx")

    def can_handle(self, model_id: str) -> bool:
        return super().can_handle(model_id) and OnnxFolder.recognises(resolve_folder(model_id))

    def load_model(self, model_id: str, device: str = "auto", **options: Any) -> PreTrainedModel:
        """See `HF_Causal_Adapter`. Raises AdapterError for a folder without an ONNX file, or with other weights beside it."""
        import onnxruntime

        folder = resolve_folder(model_id, options.get("revision"))
        path = OnnxFolder(folder, None).file()
        if path is None or SafetensorsFolder.recognises(folder):
            got = "no model.onnx" if path is None else "safetensors beside its ONNX file"
            raise AdapterError(
                f"{folder} has {got}; {self.name} expects a folder with an ONNX file alone: use the adapter auto"
            )
        model = super().load_model(model_id, "cpu", **{**options, "dtype": "float32"})
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = thread_count()
        try:
            session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no root of their own
            raise ModelLoadError(f"{path} cannot be run by onnxruntime: {first_line(error)}") from error
        model.forward = partial(_run, session)
        model.get_output_embeddings = lambda: None  # the logits are the session's, whole
        model.runs_elsewhere = True
        return model

    def run_natively(self, model: PreTrainedModel, token_ids: Sequence[int]) -> None:
        """Hold the graph against the dense model of its initializers. Raises ModelLoadError where they differ."""
        runtime: dict[str, Any] = {"package": "onnxruntime", "version": metadata.version("onnxruntime")}
        facts: dict[str, Any] = {"executed": "native", "quant_method": "onnx", "runtime": runtime, "notes": []}
        try:
            dense = partial(type(model).forward, model)
            runtime["kl"], runtime["tokens"] = same_model(dense, model, token_ids, rounds_activations=False)
        except ValueError as error:
            facts["notes"] = [f"the graph was not held against its initializers: {error}"]
        said(model, facts)


def _run(
    session: InferenceSession, input_ids: Tensor, attention_mask: Tensor | None = None, **_: object
) -> CausalLMOutput:
    import torch
    from transformers.modeling_outputs import CausalLMOutput

    rows, length = input_ids.shape
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    given = {"input_ids": input_ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    feed: dict[str, object] = {}
    for one in session.get_inputs():
        kind = _TYPES[one.type]
        if one.name in given:
            feed[one.name] = given[one.name].numpy().astype(kind)
        else:  # a cache of earlier tokens, which is empty: its length is the one that is not told
            shape = [rows, *(size if isinstance(size, int) else 0 for size in one.shape[1:])]
            feed[one.name] = np.zeros(shape if len(one.shape) > 1 else [1], dtype=kind)
    names = [one.name for one in session.get_outputs()]
    wanted = "logits" if "logits" in names else names[0]
    return CausalLMOutput(logits=torch.from_numpy(session.run([wanted], feed)[0]).float())
