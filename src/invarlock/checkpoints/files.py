"""A checkpoint as files: where it is, what it should hold, what it holds. Nothing here builds a model with weights.

What an architecture expects is read off the model class itself, built on the `meta` device from the configuration: names,
shapes, ties, ignored buffers and normalisation layers. So there is no table of architectures to keep.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from invarlock.core.exceptions import ConfigError, ModelLoadError
from invarlock.core.network import network_allowed
from invarlock.evidence.model import Structure, TensorFacts

__all__ = [
    "Layout",
    "behaviour",
    "layout_of",
    "live_structure",
    "load_config",
    "read_structure",
    "require_known_dtype",
    "resolve_folder",
]

_INDEX = "model.safetensors.index.json"
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.py", "*.jinja"]
_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
#: buffers that earlier releases of the library stored and later ones compute
_OLD_BUFFERS = (r"(^|\.)(masked_bias|rotary_emb\.inv_freq|position_ids)$", r"(^|\.)(attn|attention)\.bias$")
_OLD_NAMES = ((r"\bgamma$", "weight"), (r"\bbeta$", "bias"))
#: configuration keys that do not change what the network computes
_INERT = re.compile(
    r"^(_.*|architectures|dtype|torch_dtype|transformers_version|use_cache|.*dropout.*|.*_pdrop|initializer_.*|"
    r"id2label|label2id|num_labels|problem_type|task_specific_params|summary_.*|output_.*|return_dict.*|"
    r"(bos|eos|pad|sep|cls|mask|unk|decoder_start|forced_bos|forced_eos)_token_id|gradient_checkpointing|"
    r"quantization_config|attn_implementation|chunk_size_feed_forward|pretraining_tp|finetuning_task|"
    r"classifier_.*|layerdrop|.*_layerdrop|auto_map|custom_pipelines|name_or_path|"
    r"n_inner_default|reorder_and_upcast_attn|is_encoder_decoder_default|tokenizer_class|prefix|max_length|min_length)$"
)


@dataclass(frozen=True)
class Layout:
    """What an architecture expects. Names are the model's own; `alias` maps a tied name to the one it shares with."""

    shapes: dict[str, tuple[int, ...]]
    alias: dict[str, str]
    ignored: tuple[str, ...]
    prefix: str
    norms: tuple[str, ...]
    buffers: tuple[str, ...]
    embedding: str | None
    output: str | None
    converted: bool  # the library rewrites tensors while loading; only the loaded model tells what is missing
    renames: tuple[tuple[str, str], ...]  # patterns of names in files and what the library makes of them

    def canonical(self, name: str) -> str:
        """Return the model's own name for a name found in a file."""
        candidates = [name, f"{self.prefix}.{name}", name.removeprefix(f"{self.prefix}.")]
        for pattern, replacement in self.renames:
            candidates += [re.sub(pattern, replacement, candidate) for candidate in candidates]
        for candidate in candidates:
            if candidate in self.shapes or candidate in self.alias:
                return candidate
        return name

    def is_ignored(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self.ignored)


def resolve_folder(model_id: str, revision: str | None = None) -> Path:
    """Return the local folder of a checkpoint: the path itself, or the hub's cached (or downloaded) copy."""
    model_id = str(model_id)
    path = Path(model_id).expanduser()
    if not model_id.strip():
        raise ModelLoadError("the model id is empty; expected a checkpoint folder or a hub id such as org/name")
    if path.is_dir():
        if not any(path.iterdir()):
            raise ModelLoadError(f"folder {path} is empty; expected config.json and *.safetensors")
        return path
    if path.exists():
        raise ModelLoadError(f"{path} is a file; expected a folder with config.json and *.safetensors")
    if path.is_absolute() or model_id.startswith((".", "~")) or model_id.count("/") > 1:
        raise ModelLoadError(f"no such folder: {path}; expected a checkpoint folder or a hub id such as org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(
            snapshot_download(
                model_id, revision=revision, local_files_only=not network_allowed(), allow_patterns=_WANTED
            )
        )
    except HFValidationError:
        raise ModelLoadError(f"{model_id!r} is neither a folder nor a valid hub id such as org/name") from None
    except Exception as error:  # hub errors have many roots; each is a model that could not be had
        if network_allowed():
            raise ModelLoadError(f"hub id {model_id!r} could not be downloaded: {_first_line(error)}") from error
        raise ModelLoadError(
            f"{model_id!r} is no folder here and not in the local hub cache; give a folder, or set "
            "INVARLOCK_ALLOW_NETWORK=1 to download it"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the checkpoint's configuration object; ModelLoadError where it is missing or unreadable."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"{folder} has no config.json; expected a Hugging Face checkpoint folder")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # any failure to read it is the same finding
        raise ModelLoadError(f"{folder}/config.json cannot be used: {_first_line(error)}") from error


def behaviour(config: Any) -> dict[str, Any]:
    """Return the configuration values that change what the network computes, with the library's defaults filled in."""
    return _without_inert(json.loads(json.dumps(config.to_dict(), default=str)))


def _without_inert(values: dict[str, Any]) -> dict[str, Any]:
    """Drop inert keys, those of nested configurations too: some keep an attention's or an encoder's settings in one."""
    return {
        key: _without_inert(values[key]) if isinstance(values[key], dict) else values[key]
        for key in sorted(values)
        if not _INERT.match(key)
    }


def layout_of(config: Any, auto_class: Any) -> Layout | None:
    """Build the architecture without weights and read its layout; None where the class is not in the library."""
    try:
        with torch.device("meta"):
            model = auto_class.from_config(config)
    except (ValueError, KeyError, ImportError):
        return None  # code that ships with the checkpoint, or a class that this task has no head for
    return _layout_of_model(model)


def _layout_of_model(model: Any) -> Layout:
    alias = dict(getattr(model, "all_tied_weights_keys", None) or {})
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in alias}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    steps = _loading_steps(model)
    return Layout(
        shapes=shapes,
        alias=alias,
        ignored=(*ignored, *_OLD_BUFFERS),
        prefix=model.base_model_prefix,
        norms=tuple(_norm_weights(model)),
        buffers=tuple(name for name, _ in model.named_buffers()),
        embedding=_name_of(model, inputs),
        output=_name_of(model, outputs),
        converted="converts" in steps,
        renames=(*_OLD_NAMES, *(step for step in steps if isinstance(step, tuple))),
    )


def _loading_steps(model: Any) -> list[tuple[str, str] | str]:
    """Return what the library does to names while loading, (pattern, replacement), and "converts" for tensors."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # transformers 4 never rewrites tensors
        return []
    from transformers.core_model_loading import WeightRenaming

    found: list[tuple[str, str] | str] = []
    for step in get_model_conversion_mapping(model):
        if isinstance(step, WeightRenaming):
            targets = step.target_patterns
            found += zip(step.source_patterns, targets * len(step.source_patterns), strict=False)
        else:
            found.append("converts")
    return found


def _name_of(model: Any, module: Any) -> str | None:
    if module is None or not hasattr(module, "weight"):
        return None
    return next((f"{name}.weight" for name, found in model.named_modules() if found is module), None)


def _norm_weights(model: Any) -> Iterator[str]:
    for name, module in model.named_modules():
        if "norm" in type(module).__name__.lower():
            yield from (f"{name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False))


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise ModelLoadError(
                f"{index} cannot be read ({_first_line(error)}); expected a safetensors index"
            ) from None
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ModelLoadError(
                f"{folder} lacks {', '.join(absent[:3])}, which {_INDEX} names; copy the missing shards"
            )
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelLoadError(
            f"{folder} has no *.safetensors; expected model.safetensors (convert pickled weights with "
            "`model.save_pretrained(folder)`)"
        )
    return files


def read_structure(folder: Path, layout: Layout | None) -> Structure:
    """Stream the checkpoint's tensors once, one at a time: names, shapes, types, digests, non-finite values.

    Where two stored names stand for one tensor and differ, the one that is not the model's own name counts as
    unexpected: which of them is loaded nobody can tell. Raises ModelLoadError for a file that is truncated or no
    safetensors file, naming it.
    """
    rows: dict[str, TensorFacts] = {}
    stored_as: dict[str, str] = {}
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as shard:
                for stored in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                    name = layout.canonical(stored) if layout else stored
                    facts = _facts(name, shard.get_tensor(stored))
                    if name in rows and rows[name].digest != facts.digest:
                        other = stored_as[name] if stored == name else stored
                        rows[other] = (rows[name] if stored == name else facts).model_copy(update={"name": other})
                        if stored != name:
                            continue
                    rows[name], stored_as[name] = facts, stored
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(
                f"{path} cannot be read ({_first_line(error)}); it is truncated or not a safetensors file: copy it again"
            ) from error
    return _against_layout(rows, layout)


def _facts(name: str, tensor: torch.Tensor) -> TensorFacts:
    floating = tensor.is_floating_point()
    bad = 0
    if floating and not bool(torch.isfinite(tensor.sum() if tensor.dtype == torch.float64 else tensor.float().sum())):
        bad = int((~torch.isfinite(tensor.float())).sum())  # the sum may also overflow; the count decides
    dtype = _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    flat = tensor.detach().cpu().contiguous()
    sha = hashlib.sha256(f"{dtype}{list(tensor.shape)}".encode())
    if flat.numel():
        sha.update(flat.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # hashlib takes any buffer
    return TensorFacts(name=name, shape=list(tensor.shape), dtype=dtype, digest=sha.hexdigest()[:32], non_finite=bad)


def _against_layout(rows: dict[str, TensorFacts], layout: Layout | None) -> Structure:
    if layout is None:
        return Structure(source="file", tensors=[rows[name] for name in sorted(rows)])
    kept = {name: row for name, row in rows.items() if name in layout.shapes or not layout.is_ignored(name)}
    tied, missing, misshapen = [], [], []
    for name, partner in sorted(layout.alias.items()):
        here, there = kept.get(name), kept.get(partner)
        if here is None or (there is not None and here.digest == there.digest):
            kept.pop(name, None)
            tied.append([name, partner])
        elif there is None:  # stored once, under its other name
            kept[partner] = kept.pop(name).model_copy(update={"name": partner})
            tied.append([name, partner])
    for name, shape in layout.shapes.items():
        if name not in kept:
            missing.append(name)
        elif tuple(kept[name].shape) != shape:
            misshapen.append(f"{name}: got {kept[name].shape}, expected {list(shape)}")
    unexpected = sorted(name for name in kept if name not in layout.shapes and name not in layout.alias)
    return Structure(
        source="file",
        tensors=[kept[name] for name in sorted(kept)],
        missing=[] if layout.converted else sorted(missing),
        unexpected=[] if layout.converted else unexpected,
        misshapen=[] if layout.converted else sorted(misshapen),
        tied=tied,
        norms=sorted(layout.norms),
        buffers=sorted(layout.buffers),
        embedding_rows=_rows_of(kept, layout.embedding, layout.alias),
        output_rows=_rows_of(kept, layout.output, layout.alias),
    )


def _rows_of(rows: dict[str, TensorFacts], name: str | None, alias: dict[str, str]) -> int | None:
    row = rows.get(name or "") or rows.get(alias.get(name or "", ""))
    return row.shape[0] if row is not None and row.shape else None


def live_structure(model: Any, *, all_buffers: bool = False) -> Structure:
    """Read the same facts off a live model: parameters and persistent buffers under the model's own names.

    all_buffers: list also the buffers that no checkpoint stores, such as the frequencies of rotary positions.
    """
    first: dict[int, str] = {}
    tied, rows = [], {}
    extra = dict(model.named_buffers()) if all_buffers else {}
    for name, tensor in {**extra, **model.state_dict(keep_vars=True)}.items():
        other = first.setdefault(id(tensor), name)
        if other != name:
            tied.append([name, other])
        else:
            rows[name] = _facts(name, tensor)
    get_in, get_out = (getattr(model, f"get_{side}_embeddings", lambda: None) for side in ("input", "output"))
    sizes = [getattr(module(), "weight", None) for module in (get_in, get_out)]
    return Structure(
        source="model",
        tensors=[rows[name] for name in sorted(rows)],
        tied=tied,
        norms=sorted(_norm_weights(model)),
        buffers=sorted(name for name, _ in model.named_buffers()),
        embedding_rows=int(sizes[0].shape[0]) if sizes[0] is not None else None,
        output_rows=int(sizes[1].shape[0]) if sizes[1] is not None else None,
    )


def require_known_dtype(name: str) -> torch.dtype:
    """Return the torch type for `float32`, `float16` or `bfloat16`; ConfigError otherwise."""
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in known:
        raise ConfigError(f"dtype is {name!r}; expected auto, float32, float16 or bfloat16")
    return known[name]
