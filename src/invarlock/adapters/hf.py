"""Adapters for Hugging Face checkpoints: causal, masked and sequence-to-sequence language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from packaging.version import Version

from invarlock.adapters import native, state
from invarlock.checkpoints.behaviour import load_config
from invarlock.checkpoints.files import beside_facts, open_checkpoint, resolve_folder
from invarlock.checkpoints.gguf import gguf_facts
from invarlock.checkpoints.lora import adapter_facts
from invarlock.checkpoints.packed import packing_facts
from invarlock.checkpoints.quiet import quiet_transformers
from invarlock.checkpoints.shards import SafetensorsFolder
from invarlock.checkpoints.side import Loading, Origin
from invarlock.core import settings
from invarlock.core.api import ModelAdapter, ModelLike
from invarlock.core.device import require_extra, resolve_device
from invarlock.core.exceptions import AdapterError, CheckpointDamagedError, ConfigError, ModelLoadError
from invarlock.core.files import first_line, kept_folder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["HF_Adapter", "HF_Causal_Adapter", "HF_MLM_Adapter", "HF_Seq2Seq_Adapter"]

_DTYPES = ("auto", "stored", "float32", "float16", "bfloat16")
_TOKENIZER = ("tokenizer*", "*.model", "vocab.*")
#: where each model that is still in memory came from, whichever adapter loaded it
_origins: WeakKeyDictionary[ModelLike, Origin] = WeakKeyDictionary()
_MASKED = ("ForMaskedLM", "ForPreTraining")


class HF_Adapter(ModelAdapter):
    """What the adapters of every kind of Hugging Face checkpoint share: all but choosing the class and loading."""

    def __init__(self) -> None:
        require_extra(type(self).__name__, "adapters", "torch", "transformers")

    def origin(self, model: ModelLike) -> Origin | None:
        """Return where a model in memory was loaded from, or None where no adapter of this package loaded it."""
        return _origins.get(model)

    def describe(self, model: ModelLike) -> dict[str, Any]:
        """Return n_layer, heads_per_layer, mlp_dims, tying, model_type, model_class and a few sizes."""
        config = getattr(model, "config", None)

        def read(*names: str) -> Any:
            return next((getattr(config, n) for n in names if getattr(config, n, None) is not None), None)

        layers = read("num_hidden_layers", "num_layers", "n_layer")
        heads = read("num_attention_heads", "n_head", "num_heads")
        hidden = read("hidden_size", "n_embd", "d_model")
        inner = read("intermediate_size", "n_inner", "d_ff") or (4 * hidden if hidden else None)
        origin = _origins.get(model)
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
            **(_reading_facts(origin.folder) if origin else {}),
            **native.execution_facts(model),
        }

    def run_natively(self, model: PreTrainedModel, token_ids: Sequence[int]) -> None:
        """Let the runtime of a packed model's format execute it, where there is one: see `native.attach`."""
        origin = _origins.get(model)
        if origin is not None and not model.config.is_encoder_decoder:
            native.attach(model, origin.folder, token_ids, **{_dtype_keyword(): model.dtype})

    def snapshot(self, model: ModelLike) -> bytes:
        """Return every parameter and buffer as a safetensors blob."""
        return state.snapshot_bytes(model)

    def restore(self, model: ModelLike, snapshot: bytes) -> None:
        """Bring every parameter and buffer back, bit for bit, ties included."""
        state.restore_bytes(model, snapshot)

    def snapshot_chunked(self, model: ModelLike, folder: Path) -> Path:
        """Write every parameter and buffer into shards under `folder`."""
        return state.snapshot_files(model, folder / "snapshot")

    def restore_chunked(self, model: ModelLike, path: Path) -> None:
        """Bring back what `snapshot_chunked` wrote."""
        state.restore_files(model, path)

    def tokenizer(self, model_id: str) -> PreTrainedTokenizerBase | None:
        """Return the checkpoint's tokenizer, or None where it has no tokenizer files."""
        from transformers import AutoTokenizer

        folder = resolve_folder(model_id)
        if not any(any(folder.glob(pattern)) for pattern in _TOKENIZER):
            return None
        try:
            with quiet_transformers():
                return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # as in load_model: whatever went wrong, the tokenizer cannot be used
            what = f"the tokenizer of {model_id} cannot be read: {type(error).__name__}: {first_line(error)}"
            raise ModelLoadError(f"{what}; expected the files as they were saved: copy them again") from error

    def save(self, model: ModelLike, folder: Path) -> None:
        """Write the model with `save_pretrained` (safetensors)."""
        if not hasattr(model, "save_pretrained"):
            raise AdapterError(f"{type(model).__name__} has no save_pretrained; expected a transformers model")
        with quiet_transformers():
            model.save_pretrained(folder)


class HF_Causal_Adapter(HF_Adapter):
    """Causal language models such as GPT-2 and Llama."""

    name = "hf_causal"
    task: ClassVar[str] = "causal"
    metric_kind: ClassVar[str] = "ppl_causal"
    auto_class_name: ClassVar[str] = "AutoModelForCausalLM"
    architecture_suffixes: ClassVar[tuple[str, ...]] = ("ForCausalLM", "LMHeadModel")

    @property
    def auto_class(self) -> type[AutoModel]:
        import transformers

        found: type[AutoModel] = getattr(transformers, self.auto_class_name)
        return found

    def _class_of(self, config: PretrainedConfig, trust: bool) -> type[PreTrainedModel]:
        """Return the class of the model itself: the automatic ones take no tensors without a folder."""
        import torch

        with torch.device("meta"):
            return type(self.auto_class.from_config(config, trust_remote_code=trust))

    def can_handle(self, model_id: str) -> bool:
        """Say whether the configuration names an architecture of this kind."""
        try:
            return self.matches(load_config(resolve_folder(model_id)))
        except ModelLoadError:
            return False

    def matches(self, config: PretrainedConfig) -> bool:
        """Say whether `config.architectures` is of this kind (an absent list counts for causal models only)."""
        names = config.architectures or []
        if config.is_encoder_decoder != (self.task == "seq2seq") and self.task != "causal":
            return False  # a model of images and text has the suffix of one from text to text
        return any(name.endswith(self.architecture_suffixes) for name in names) or (
            not names and self.task == "causal" and not config.is_encoder_decoder
        )

    def load_model(
        self,
        model_id: str,
        device: str = "auto",
        *,
        dtype: str | None = None,
        torch_dtype: str | None = None,
        trust_remote_code: bool | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> PreTrainedModel:
        """Load a checkpoint in evaluation mode.

        dtype, alias torch_dtype (`auto`, `stored`, float32, float16, bfloat16): auto computes in float32 on the CPU, where
        half precision is slow and coarse, and in the checkpoint's own type elsewhere; stored always in that one.
        options go to `from_pretrained`. Raises ModelLoadError, and
        CheckpointDamagedError where tensors are missing or mis-shaped instead of making them up.
        """
        device = resolve_device(device)
        trust = settings.flag("INVARLOCK_TRUST_REMOTE_CODE") if trust_remote_code is None else trust_remote_code
        loading = Loading(str(dtype or torch_dtype or "auto"), trust, revision, options)
        wanted = _torch_dtype(loading.dtype, device)
        folder = resolve_folder(model_id, revision)
        config = load_config(folder, trust_remote_code=trust)
        if self.task == "causal" and config.architectures and config.architectures[0].endswith(_MASKED):
            raise ModelLoadError(
                f"{model_id} is a masked language model ({config.architectures[0]}), whose tokens see what they are to "
                "predict; expected a causal one: use the adapter hf_mlm, or auto"
            )
        weights = open_checkpoint(folder)  # says what is missing
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # what it packed is dense here, or was never packed
        dense: dict[str, Any] = {}
        if not isinstance(weights, SafetensorsFolder):
            dense = {"state_dict": {name: _in_type(tensor, wanted) for name, tensor in weights.tensors()}}
        options = _placed(options, stays=bool(dense))
        try:
            with quiet_transformers():
                model, info = (self._class_of(config, trust) if dense else self.auto_class).from_pretrained(
                    None if dense else folder,
                    config=config,
                    **dense,
                    trust_remote_code=trust,
                    local_files_only=True,
                    output_loading_info=True,
                    **{_dtype_keyword(): wanted, **options, "ignore_mismatched_sizes": True},  # refused below, by name
                )
        except Exception as error:  # every way in which loading fails is the same finding: the file cannot be used
            message = f"{model_id} cannot be loaded as {self.auto_class_name}: {first_line(error)}"
            raise ModelLoadError(message) from error
        _refuse_made_up(model_id, info)
        model = (model if "device_map" in options else model.to(device)).eval()
        _origins[model] = Origin(str(model_id), folder, loading)
        return model


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


def _reading_facts(folder: Path) -> dict[str, Any]:
    """Return how a checkpoint was read and is executed; {} for one of plain weights alone."""
    parts = [facts(folder) for facts in (packing_facts, adapter_facts, gguf_facts, beside_facts)]
    notes = [note for part in parts for note in part.get("notes", ())]
    return {key: value for part in parts for key, value in part.items()} | ({"notes": notes} if notes else {})


def _placed(options: Mapping[str, Any], *, stays: bool) -> dict[str, Any]:
    """Return the options with where accelerate is to leave the weights. `device_map: disk` leaves all of them in their
    files. `stays`: they are in memory already, where the model is then built of them."""
    others = {key: value for key, value in options.items() if key not in ("device_map", "offload_folder")}
    if "device_map" not in options or stays:
        return others
    require_extra("device_map", "adapters", "accelerate")
    chosen, folder = options["device_map"], options.get("offload_folder")
    if folder is None:
        folder = str(kept_folder())
    return {**others, "device_map": {"": "disk"} if chosen == "disk" else chosen, "offload_folder": folder}


def _torch_dtype(name: str, device: str) -> str:
    """Return the type to load in as the library takes it; ConfigError for one that is not offered."""
    if name not in _DTYPES:
        raise ConfigError(f"dtype is {name!r}; expected auto, stored, float32, float16 or bfloat16")
    return {"auto": "float32" if device == "cpu" else "auto", "stored": "auto"}.get(name, name)


def _in_type(tensor: Tensor, name: str) -> Tensor:
    """Return a float tensor in the type that a model is loaded in, so that there is one copy of it."""
    import torch

    return tensor.to(getattr(torch, name)) if name != "auto" and tensor.is_floating_point() else tensor


def _dtype_keyword() -> str:
    """Return what `from_pretrained` calls the type, which is another name since 4.56."""
    return "dtype" if Version(metadata.version("transformers")) >= Version("4.56") else "torch_dtype"


def _refuse_made_up(model_id: str, info: Mapping[str, Any]) -> None:
    """Refuse a model for which the library initialised tensors that the checkpoint did not have."""
    missing = [("tensor_missing", str(name), "is missing") for name in sorted(info.get("missing_keys") or ())]
    misfits = sorted(
        str(entry[0]) if isinstance(entry, (tuple, list)) else entry for entry in info.get("mismatched_keys") or ()
    )
    wrong = [("tensor_shape", name, "has the wrong shape") for name in misfits]
    findings: list[dict[str, object]] = [
        {"code": code, "tensor": name, "message": f"{name} {what}"} for code, name, what in (*missing, *wrong)
    ]
    if findings:
        named = ", ".join(str(f["tensor"]) for f in findings[:3])
        raise CheckpointDamagedError(
            f"{model_id} lacks {len(findings)} tensor(s) that its architecture needs ({named}); copy the checkpoint again",
            findings,
        )
