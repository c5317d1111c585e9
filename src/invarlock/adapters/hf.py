"""Adapters for Hugging Face checkpoints: causal, masked and sequence-to-sequence language models."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from invarlock.adapters import state
from invarlock.checkpoints import files as checkpoint
from invarlock.core import settings
from invarlock.core.api import ModelAdapter
from invarlock.core.device import resolve_device
from invarlock.core.exceptions import AdapterError, CheckpointDamagedError, ModelLoadError

__all__ = ["HF_Causal_Adapter", "HF_MLM_Adapter", "HF_Seq2Seq_Adapter", "tokenizer_facts"]

_PROBE = "The quick brown fox — 1,234.5 naïve cafés; def f(x):\n\treturn x**2  # ok?"


def tokenizer_facts(tokenizer: Any) -> tuple[str | None, int | None]:
    """Return (digest, number of tokens). The digest covers the vocabulary, the special tokens and how a probe text is
    encoded, and not the form of the files, which re-saving changes."""
    if tokenizer is None:
        return None, None
    vocabulary = sorted(tokenizer.get_vocab().items())
    specials = sorted({str(token) for token in tokenizer.all_special_tokens})
    encoded = tokenizer(_PROBE)["input_ids"]
    text = json.dumps([vocabulary, specials, encoded], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32], len(tokenizer)


_MASKED = ("ForMaskedLM", "ForPreTraining")


class HF_Causal_Adapter(ModelAdapter):
    """Causal language models such as GPT-2 and Llama."""

    name = "hf_causal"
    task: ClassVar[str] = "causal"
    metric_kind: ClassVar[str] = "ppl_causal"
    auto_class_name: ClassVar[str] = "AutoModelForCausalLM"
    architecture_suffixes: ClassVar[tuple[str, ...]] = ("ForCausalLM", "LMHeadModel")

    @property
    def auto_class(self) -> Any:
        import transformers

        return getattr(transformers, self.auto_class_name)

    def can_handle(self, model_id: str) -> bool:
        """Say whether the configuration names an architecture of this kind."""
        try:
            config = checkpoint.load_config(checkpoint.resolve_folder(model_id))
        except ModelLoadError:
            return False
        return self.matches(config)

    def matches(self, config: Any) -> bool:
        """Say whether `config.architectures` is of this kind (an absent list counts for causal models only)."""
        names = config.architectures or []
        return any(name.endswith(self.architecture_suffixes) for name in names) or (
            not names and self.task == "causal" and not config.is_encoder_decoder
        )

    def load_model(self, model_id: str, device: str = "auto", **kwargs: Any) -> Any:
        """Load a checkpoint in evaluation mode.

        dtype (`auto`, float32, float16, bfloat16): auto computes in float32 on the CPU, where half precision is slow and
        coarse, and in the checkpoint's own type elsewhere. Further keywords go to `from_pretrained`. Raises
        ModelLoadError, and CheckpointDamagedError where tensors are missing or mis-shaped instead of making them up.
        """
        device = resolve_device(device)
        trust = bool(kwargs.pop("trust_remote_code", settings.flag("INVARLOCK_TRUST_REMOTE_CODE")))
        dtype = str(kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or "auto")
        folder = checkpoint.resolve_folder(model_id, kwargs.pop("revision", None))
        config = checkpoint.load_config(folder, trust_remote_code=trust)
        if self.task == "causal" and config.architectures and config.architectures[0].endswith(_MASKED):
            raise ModelLoadError(
                f"{model_id} is a masked language model ({config.architectures[0]}), whose tokens see what they are to "
                "predict; expected a causal one: use the adapter hf_mlm, or auto"
            )
        if dtype == "auto":
            dtype = "float32" if device == "cpu" else "auto"
        wanted = dtype if dtype == "auto" else checkpoint.require_known_dtype(dtype)
        if not list(folder.glob("*.safetensors")) and not list(folder.glob("pytorch_model*.bin")):
            checkpoint._files(folder)
        try:
            with _quiet_transformers():
                model, info = self.auto_class.from_pretrained(
                    folder,
                    config=config,
                    dtype=wanted,
                    trust_remote_code=trust,
                    local_files_only=True,
                    output_loading_info=True,
                    **{**kwargs, "ignore_mismatched_sizes": True},  # refused below, and by name
                )
        except Exception as error:  # every way in which loading fails is the same finding: the file cannot be used
            message = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelLoadError(f"{model_id} cannot be loaded as {self.auto_class_name}: {message}") from error
        _refuse_made_up(model_id, info)
        return model.to(device).eval()

    def describe(self, model: Any) -> dict[str, Any]:
        """Return n_layer, heads_per_layer, mlp_dims, tying, model_type, model_class and a few sizes."""
        config = getattr(model, "config", None)

        def read(*names: str) -> Any:
            return next((getattr(config, n) for n in names if getattr(config, n, None) is not None), None)

        layers = read("num_hidden_layers", "num_layers", "n_layer")
        heads = read("num_attention_heads", "n_head", "num_heads")
        hidden = read("hidden_size", "n_embd", "d_model")
        inner = read("intermediate_size", "n_inner", "d_ff") or (4 * hidden if hidden else None)
        return {
            "n_layer": layers,
            "heads_per_layer": [heads] * layers if layers and heads else None,
            "mlp_dims": [inner] * layers if layers and inner else None,
            "tying": {first: others for first, *others in state.tie_groups(model)},
            "model_type": read("model_type"),
            "model_class": type(model).__name__,
            "hidden_size": hidden,
            "vocab_size": read("vocab_size"),
            "max_position_embeddings": read("max_position_embeddings", "n_positions"),
            "parameters": sum(p.numel() for p in model.parameters()),
        }

    def snapshot(self, model: Any) -> bytes:
        """Return every parameter and buffer as a safetensors blob."""
        return state.snapshot_bytes(model)

    def restore(self, model: Any, snapshot: bytes) -> None:
        """Bring every parameter and buffer back, bit for bit, ties included."""
        state.restore_bytes(model, snapshot)

    def snapshot_chunked(self, model: Any, folder: Path) -> Path:
        """Write every parameter and buffer into shards under `folder`."""
        return state.snapshot_files(model, folder / "snapshot")

    def restore_chunked(self, model: Any, path: Path) -> None:
        """Bring back what `snapshot_chunked` wrote."""
        state.restore_files(model, path)

    def tokenizer(self, model_id: str) -> Any:
        """Return the checkpoint's tokenizer, or None where it has no tokenizer files."""
        from transformers import AutoTokenizer

        folder = checkpoint.resolve_folder(model_id)
        if not any(folder.glob("tokenizer*")) and not any(folder.glob("*.model")) and not any(folder.glob("vocab.*")):
            return None
        try:
            with _quiet_transformers():
                return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # as in load_model: whatever went wrong, the tokenizer cannot be used
            message = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelLoadError(f"the tokenizer of {model_id} cannot be read: {message}") from error

    def save(self, model: Any, folder: Path) -> None:
        """Write the model with `save_pretrained` (safetensors)."""
        if not hasattr(model, "save_pretrained"):
            raise AdapterError(f"{type(model).__name__} has no save_pretrained; expected a transformers model")
        with _quiet_transformers():
            model.save_pretrained(folder)


class HF_MLM_Adapter(HF_Causal_Adapter):
    """Masked language models such as BERT."""

    name = "hf_mlm"
    task = "mlm"
    metric_kind = "ppl_mlm"
    auto_class_name = "AutoModelForMaskedLM"
    architecture_suffixes = _MASKED


class HF_Seq2Seq_Adapter(HF_Causal_Adapter):
    """Sequence-to-sequence models such as T5."""

    name = "hf_seq2seq"
    task = "seq2seq"
    metric_kind = "ppl_seq2seq"
    auto_class_name = "AutoModelForSeq2SeqLM"
    architecture_suffixes = ("ForConditionalGeneration",)


def _refuse_made_up(model_id: str, info: dict[str, Any]) -> None:
    """Refuse a model for which the library initialised tensors that the checkpoint did not have."""
    findings: list[dict[str, object]] = [
        {"code": "tensor_missing", "tensor": str(name), "message": f"{name} is missing"}
        for name in sorted(info.get("missing_keys") or ())
    ]
    for entry in sorted(info.get("mismatched_keys") or (), key=str):
        name = entry[0] if isinstance(entry, (tuple, list)) else entry
        findings.append({"code": "tensor_shape", "tensor": str(name), "message": f"{name} has the wrong shape"})
    if findings:
        named = ", ".join(str(f["tensor"]) for f in findings[:3])
        raise CheckpointDamagedError(
            f"{model_id} lacks {len(findings)} tensor(s) that its architecture needs ({named}); copy the checkpoint again",
            findings,
        )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep the library's notices and progress bars off the terminal; what matters of them we check ourselves."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
