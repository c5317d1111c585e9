"""Which files a checkpoint is: where its folder is, which format it has, and what it holds. No model gets weights here."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from invarlock.checkpoints import lora
from invarlock.checkpoints.base import Checkpoint, Format
from invarlock.checkpoints.gguf import GGUFFolder, unfolded, weights_file
from invarlock.checkpoints.gguf_header import read_header as read_gguf_header
from invarlock.checkpoints.headers import check_header
from invarlock.checkpoints.onnx import OnnxFolder
from invarlock.checkpoints.packed import PackedFolder, packing_facts
from invarlock.checkpoints.pickled import PickledFolder
from invarlock.checkpoints.sanity import check_config, check_depth, check_folder
from invarlock.checkpoints.shards import SafetensorsFolder
from invarlock.checkpoints.structure import Layout
from invarlock.core.exceptions import ModelLoadError
from invarlock.core.files import first_line, only_a_path
from invarlock.core.network import network_allowed
from invarlock.evidence.model import Structure

__all__ = [
    "FORMATS",
    "beside_facts",
    "format_of",
    "look_at_files",
    "open_checkpoint",
    "read_structure",
    "resolve_folder",
]

#: the formats that are read; the first that recognises a folder reads it
FORMATS: tuple[Format, ...] = (
    Format("gguf", GGUFFolder.recognises, GGUFFolder),
    Format("packed", PackedFolder.recognises, PackedFolder),
    Format("safetensors", SafetensorsFolder.recognises, SafetensorsFolder),
    Format("pickled", PickledFolder.recognises, PickledFolder),
    Format("onnx", OnnxFolder.recognises, OnnxFolder),
)
_OTHER_WEIGHTS = ("*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.bin")
#: what other tools, or other options, read in place of the weights
_BESIDE = (
    "consolidated*.safetensors", "consolidated*.pth", "model.*.safetensors", "pytorch_model.*.bin", "tf_model.h5",
    "flax_model.msgpack", "adapter_model.*", "*.gguf",
)  # fmt: skip
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.py", "*.jinja"]


def resolve_folder(model_id: str, revision: str | None = None, *, merge: bool = True) -> Path:
    """Return the local folder of a checkpoint: the path itself, or the hub's cached (or downloaded) copy. That of an
    adapter is the one in which it is merged into its base (without `merge` that of its base), that of a GGUF file the one
    with what it says in other files."""
    folder = _local_folder(model_id, revision)
    if (file := weights_file(folder)) is not None:
        return unfolded(file)
    if not lora.is_adapter(folder):
        return folder
    return lora.merged(folder, resolve_folder) if merge else lora.base_of(folder, partial(resolve_folder, merge=False))


def _local_folder(model_id: str, revision: str | None) -> Path:
    model_id = str(model_id)
    path = Path(os.path.expanduser(model_id))
    if not model_id.strip():
        raise ModelLoadError("the model id is empty; expected a checkpoint folder or a hub id such as org/name")
    if os.path.isdir(path):
        if not any(path.iterdir()):
            raise ModelLoadError(f"folder {path} is empty; expected config.json and *.safetensors")
        return path
    if os.path.isfile(path) and path.suffix == ".gguf":
        return path
    if os.path.exists(path):
        raise ModelLoadError(
            f"{path} is a file; expected a folder with config.json and *.safetensors, or a *.gguf file"
        )
    if only_a_path(model_id):
        raise ModelLoadError(f"no such folder: {path}; expected a checkpoint folder or a hub id such as org/name")
    return _from_hub(model_id, revision)


def _from_hub(model_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    allowed = network_allowed()
    try:
        return Path(
            snapshot_download(model_id, revision=revision, local_files_only=not allowed, allow_patterns=_WANTED)
        )
    except HFValidationError:
        raise ModelLoadError(f"{model_id!r} is neither a folder nor a valid hub id such as org/name") from None
    except Exception as error:  # hub errors have many roots; each is a model that could not be had
        if allowed:
            raise ModelLoadError(f"hub id {model_id!r} could not be downloaded: {first_line(error)}") from error
        raise ModelLoadError(
            f"{model_id!r} is no folder here and not in the local hub cache; give a folder, or set "
            "INVARLOCK_ALLOW_NETWORK=1 to download it"
        ) from error


def look_at_files(model_id: str) -> None:
    """Refuse what sizes, configuration and headers alone show to be no checkpoint; no library is loaded for it. A hub id is
    not looked up, and what merely lacks files is told by those who read them."""
    if not (only_a_path(model_id) or os.path.exists(os.path.expanduser(model_id))):
        return
    folder = _local_folder(model_id, None)
    if (file := weights_file(folder)) is not None:
        read_gguf_header(file)
        return
    check_folder(folder)
    config = check_config(folder) if (folder / "config.json").exists() else {}
    files = sorted(folder.glob("*.safetensors"))
    tensors = sum(map(check_header, files))
    if files:
        check_depth(folder, config, tensors)


def open_checkpoint(folder: Path, layout: Layout | None = None) -> Checkpoint:
    """Return the reader of a folder's weights; ModelLoadError where no format recognises it."""
    for form in FORMATS:
        if form.recognises(folder):
            return form.open(folder, layout)
    others = sorted(path.name for pattern in _OTHER_WEIGHTS for path in folder.glob(pattern))
    if others:
        method = packing_facts(folder).get("quantization_config_unused")
        raise ModelLoadError(
            f"{folder} holds {others[0]}{f' (quant_method {method!r})' if method else ''}, which is not read; give the model "
            "as safetensors (`model.save_pretrained(folder)`, a packed one after `model.dequantize()`)",
            code="UNSUPPORTED-FORMAT",
        )
    raise ModelLoadError(f"{folder} has no *.safetensors and no pytorch_model*.bin; expected model.safetensors")


def beside_facts(folder: Path) -> dict[str, Any]:
    """Return what a report says of weights that stand beside those that are read; {} where there are none."""
    if not SafetensorsFolder.recognises(folder):
        return {}
    read = {path.name for path in SafetensorsFolder(folder, None).files(absent_too=False)}
    others = sorted({path.name for pattern in _BESIDE for path in folder.glob(pattern)} - read)
    note = f"{', '.join(others[:4])} beside the weights was not looked at, and other tools may read it"
    return {"beside": others, "notes": [note]} if others else {}


def format_of(folder: Path) -> str | None:
    """Return the name of the format that reads a folder, or None where none does."""
    return next((form.name for form in FORMATS if form.recognises(folder)), None)


def read_structure(folder: Path, layout: Layout | None) -> Structure:
    """Stream the checkpoint's tensors once: names, shapes, types, digests, ties, non-finite values. Raises
    ModelLoadError for a file that is truncated or of no known format, naming it."""
    return open_checkpoint(folder, layout).structure()
