"""Adapter folders (LoRA, DoRA and what else peft merges): the base and the adapter merged into one checkpoint.

peft itself merges, since it alone knows every kind; the result stands in a private folder until the program ends.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from invarlock.checkpoints.behaviour import load_config
from invarlock.checkpoints.headers import check_header, open_tensors
from invarlock.checkpoints.packed import PackedFolder
from invarlock.checkpoints.quiet import quiet_transformers
from invarlock.checkpoints.structure import live_structure
from invarlock.core.device import require_extra
from invarlock.core.exceptions import ModelLoadError
from invarlock.core.files import first_line, kept_folder, read_json

if TYPE_CHECKING:
    from torch import Tensor
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
#: settings under which what is added is another product than scale x B x A, and where an adapter's first factor is
_NO_PRODUCT = ("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "target_parameters")
_DOWN = ".lora_A.weight"
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
        products = _products(model, folder)
        adapted = PeftModel.from_pretrained(model, str(folder))
        with open_tensors(folder / _WEIGHTS) as file:
            odd = sorted(set(file.keys()) ^ set(get_peft_model_state_dict(adapted)))
        if odd:
            raise ModelLoadError(f"{len(odd)} of its tensors match nothing in the base or are missing, first {odd[0]}")
        model = adapted.merge_and_unload()
        _check_merge(model, folder, products)
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


class _Delta(NamedTuple):
    """What an adapter's own file says that is added to the weight of one module: scale x B x A."""

    scale: float
    down: Tensor
    up: Tensor

    def vector(self) -> Tensor:
        """Return what products are taken with: the same whenever it is asked for."""
        import torch

        return torch.randn(self.down.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def apply(self) -> Tensor:
        return self.scale * (self.up.double() @ (self.down.double() @ self.vector()))


def _deltas(folder: Path) -> Iterator[tuple[str, _Delta]]:
    """Yield (module path, what is added) of plain LoRA; nothing for kinds whose weights are no such product."""
    config = _config(folder)
    if config.get("peft_type") != "LORA" or any(config.get(key) for key in _NO_PRODUCT):
        return
    with open_tensors(folder / _WEIGHTS) as file:
        for name in (name for name in file.keys() if name.endswith(_DOWN)):  # noqa: SIM118 - safe_open is no mapping
            path = name.removesuffix(_DOWN).removeprefix("base_model.model.")
            down, up = (file.get_tensor(name.replace("lora_A", part)) for part in ("lora_A", "lora_B"))
            patterns = (config.get("alpha_pattern") or {}).items()
            alpha = next((a for key, a in patterns if re.match(rf"(.*\.)?({key})$", path)), config["lora_alpha"])
            if down.ndim == 2:
                yield path, _Delta(alpha / len(down) ** (0.5 if config.get("use_rslora") else 1), down, up)


def _products(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """Return the product of each adapted weight with a random vector: of a matrix, what is small to keep."""
    found = {}
    for path, delta in _deltas(folder):
        module = model.get_submodule(path)
        weight = module.weight.detach().double()
        found[path] = (weight.T if type(module).__name__ == "Conv1D" else weight) @ delta.vector()
    return found


def _check_merge(model: PreTrainedModel, folder: Path, before: Mapping[str, Tensor]) -> None:
    """Raise ModelLoadError where a weight did not move by what the adapter's own file says."""
    after = _products(model, folder)
    for path, delta in _deltas(folder):
        moved, wanted = after[path] - before[path], delta.apply()
        rounding = 1e-6 * float(before[path].norm())
        if not float((moved - wanted).norm()) <= 1e-2 * float(wanted.norm()) + rounding:
            ratio = float(moved @ wanted / (wanted @ wanted)) if float(wanted.norm()) else math.inf
            raise ModelLoadError(
                f"{path} moved by {ratio:.3g} times what the adapter says (scale {delta.scale:.3g}); expected 1: scale, "
                "target modules or the version of peft do not fit"
            )


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
