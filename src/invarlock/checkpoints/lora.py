"""Adapter folders (LoRA, DoRA and what else peft merges): the base and the adapter merged into one checkpoint.

peft itself merges, since it alone knows every kind; the result stands in a private folder until the program ends.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invarlock.checkpoints.behaviour import load_config
from invarlock.checkpoints.headers import check_header, open_tensors
from invarlock.checkpoints.packed import PackedFolder
from invarlock.checkpoints.quiet import quiet_transformers
from invarlock.checkpoints.structure import live_structure
from invarlock.core.device import require_extra
from invarlock.core.exceptions import ModelLoadError
from invarlock.core.files import first_line, kept_folder, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["adapter_facts", "base_of", "is_adapter", "merged"]

_CONFIG, _WEIGHTS, _FACTS = "adapter_config.json", "adapter_model.safetensors", "merged_adapter.json"
_BASE_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json")
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
)
_at_work: list[Path] = []  # adapters whose bases are being found, one the base of the other
_done: dict[tuple[Path, int], Path] = {}  # by folder and age of the adapter


def is_adapter(folder: Path) -> bool:
    """Say whether a folder holds an adapter. Raises ModelLoadError where it holds base weights too: some tools read them
    with the adapter and some without."""
    if not (folder / _CONFIG).is_file():
        return False
    beside = sorted(path.name for pattern in _BASE_WEIGHTS for path in folder.glob(pattern))
    if beside:
        raise ModelLoadError(
            f"{folder} holds base weights ({beside[0]}) and an adapter ({_CONFIG}), and tools differ in which they use; "
            "merge the two, or keep the adapter in a folder of its own"
        )
    return True


def merged(folder: Path, find_base: Callable[[str], Path]) -> Path:
    """Return a folder with the adapter merged into its base, in float32; it is made once and removed at exit.

    `find_base` returns the folder of a hub id or path. Raises ModelLoadError where the base is not there, where the two
    do not fit, and for tensors of the adapter that match nothing in the base.
    """
    key = folder.resolve(), (folder / _CONFIG).stat().st_mtime_ns
    if key not in _done:
        base = base_of(folder, find_base)
        target = kept_folder()
        with quiet_transformers(), warnings.catch_warnings(action="ignore"):  # what matters of it is checked here
            _merge(folder, base, target)
        _done[key] = target
    return _done[key]


def adapter_facts(folder: Path) -> dict[str, Any]:
    """Return what a report says of a merged adapter: its kind, its base and the tensors that it changed."""
    path = folder / _FACTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _config(folder: Path) -> Any:
    return read_json(folder / _CONFIG, "the configuration of an adapter", ModelLoadError, "checkpoint")


def base_of(folder: Path, find_base: Callable[[str], Path]) -> Path:
    """Return the folder of an adapter's base. Errors of `merged`, but for those of the two not fitting."""
    require_extra(f"the adapter {folder}", "adapters", "torch", "transformers", "peft")
    try:
        name = _config(folder)["base_model_name_or_path"]
    except (KeyError, TypeError) as error:
        raise ModelLoadError(f"{folder}/{_CONFIG} names no base_model_name_or_path ({first_line(error)})") from None
    if not (folder / _WEIGHTS).is_file():
        raise ModelLoadError(f"{folder} has no {_WEIGHTS}; save the adapter with `save_pretrained`")
    check_header(folder / _WEIGHTS)
    beside = folder / str(name)
    if folder in _at_work or os.path.realpath(beside) == os.path.realpath(folder):
        raise ModelLoadError(f"the adapter {folder} is its own base; set base_model_name_or_path in {_CONFIG}")
    _at_work.append(folder)
    try:
        return find_base(str(beside) if os.path.isdir(beside) else str(name))
    except ModelLoadError as error:
        raise ModelLoadError(
            f"the base of the adapter {folder} cannot be found: {error}; set base_model_name_or_path in {_CONFIG}"
        ) from None
    finally:
        _at_work.remove(folder)


def _merge(folder: Path, base: Path, target: Path) -> None:
    from peft import PeftModel, get_peft_model_state_dict

    model = _load_base(base)
    before = {tensor.name: tensor.digest for tensor in live_structure(model).tensors}
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
        with open_tensors(folder / _WEIGHTS) as file:
            odd = sorted(set(file.keys()) ^ set(get_peft_model_state_dict(adapted)))
        if odd:
            raise ModelLoadError(f"{len(odd)} of its tensors match nothing in the base or are missing, first {odd[0]}")
        model = adapted.merge_and_unload()
    except Exception as error:  # peft's errors have many roots; each is an adapter that cannot be merged
        raise ModelLoadError(f"the adapter {folder} cannot be merged into {base}: {first_line(error)}") from error
    touched = [t.name for t in live_structure(model).tensors if before.get(t.name) != t.digest]
    for source, patterns in ((base, _TOKENIZER), (folder, _TOKENIZER)):
        for path in (path for pattern in patterns for path in source.glob(pattern) if path.suffix != ".safetensors"):
            shutil.copyfile(path, target / path.name)
    model.save_pretrained(target)
    notes = [] if touched else [f"merging the adapter {folder.name} changed no tensor of {base.name}"]
    kind = _config(folder).get("peft_type")
    facts = {"executed": "merged", "adapter": {"kind": kind, "base": base.name, "touched": touched}, "notes": notes}
    (target / _FACTS).write_text(json.dumps(facts), encoding="utf-8")


def _load_base(base: Path) -> PreTrainedModel:
    import transformers

    config = load_config(base)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if kind is None:
        raise ModelLoadError(f"the base {base} is a {config.architectures}, which transformers does not have")
    state = {"state_dict": dict(PackedFolder(base, None).tensors())} if PackedFolder.recognises(base) else {}
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return kind.from_pretrained(None if state else base, config=config, **state).float()
