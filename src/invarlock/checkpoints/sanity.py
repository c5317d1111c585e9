"""Is a configuration one that a model can be built from? Asked of the file itself, before any library reads it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from invarlock.core.exceptions import ModelLoadError
from invarlock.core.files import read_json
from invarlock.core.reading import check_size, open_regular

__all__ = ["check_config", "check_depth", "check_folder"]

_LAYERS = re.compile(r"^(n_layers?|depth|(num_)?\w*_?layers)$")
#: what a key counts, and the least and the most that any model has
_BOUNDS = (
    (_LAYERS, 0, 10_000),
    (re.compile(r"^(hidden_size|n_embd|d_model|dim|d_kv|head_dim|\w*intermediate_size|d_ff|\w*ffn_dim)$"), 0, 10**7),
    (re.compile(r"^(vocab_size|\w+_vocab_size|n_heads?|num_(attention|key_value)_heads|n_head_kv|num_kv_heads)$"), 0, 10**8),
    (re.compile(r"^(num_\w*experts|n_\w*experts|num_experts_per_tok|num_labels)$"), 0, 10**5),
    (re.compile(r"^(max_position_embeddings|n_positions|n_ctx|max_\w*positions|max_seq_len)$"), -1, 10**8),
)  # fmt: skip
#: the type that a key must have; a class would fail on another with an error of its own
_TYPES: Mapping[str, tuple[type, ...]] = {
    "architectures": (list,), "model_type": (str,), "text_config": (dict,), "id2label": (dict,), "label2id": (dict,),
    "vocab_size": (int,), "quantization_config": (dict,), "auto_map": (dict,),
}  # fmt: skip
#: tables of labels, and the settings of a packing, whose keys (a `dim` of -1) are no sizes of a model
_NO_SIZES = ("id2label", "label2id", "quantization_config")
_MOST_ENTRIES = 100_000
_FEW = 64  # layers; below, more layers than tensors may be layers that share them
_IN_A_LAYER = 8192  # tensors: 384 experts of three packed matrices, with scales and zero points, are below 5,000
#: how large the files beside the weights may be
_BESIDE = {"*.json": "tokenizer", "*.txt": "tokenizer", "*.model": "tokenizer", "*.jinja": "checkpoint"}


def check_folder(folder: Path) -> None:
    """Raise ModelLoadError where a file that loaders will read whole is no regular file, or too large to be one of them."""
    for pattern, kind in _BESIDE.items():
        for path in sorted(folder.glob(pattern)):
            with open_regular(path, "a file of a checkpoint", ModelLoadError) as file:
                check_size(kind, str(path), ModelLoadError, size=file.seek(0, 2))


def check_config(folder: Path) -> dict[str, Any]:
    """Return what a folder's config.json says. Raises ModelLoadError naming a key of the wrong type, or a size that no
    model has."""
    path = folder / "config.json"
    found = read_json(path, "a model's configuration", ModelLoadError, "checkpoint")
    if not isinstance(found, dict):
        raise ModelLoadError(f"{path} holds a {type(found).__name__}; expected a JSON object")
    for key, value in _entries(found):
        if isinstance(value, (dict, list)) and len(value) > _MOST_ENTRIES:
            raise ModelLoadError(f"{path}: {key} has {len(value):,} entries; expected at most {_MOST_ENTRIES:,}")
        kinds = _TYPES.get(key)
        wrong = value is not None and kinds is not None and (not isinstance(value, kinds) or value is True)
        if wrong or (key == "architectures" and not all(isinstance(name, str) for name in value or ())):
            raise ModelLoadError(f"{path}: {key} is {_shown(value)}; expected {_expected(key)}")
        for pattern, least, most in _BOUNDS if type(value) is int else ():
            if pattern.match(key) and not least <= value <= most:
                raise ModelLoadError(f"{path}: {key} is {_shown(value)}; expected {least} to {most:,}")
    return found


def check_depth(folder: Path, config: Mapping[str, Any], tensors: int) -> None:
    """Raise ModelLoadError where a configuration names more layers than there are tensors to fill them, or far fewer than
    so many tensors need."""
    layers = max((value for key, value in _entries(config) if type(value) is int and _LAYERS.match(key)), default=0)
    if layers > max(_FEW, tensors) or 0 < layers * _IN_A_LAYER < tensors:
        raise ModelLoadError(
            f"{folder}/config.json names {layers:,} layers, and the files hold {tensors} tensors; one of them belongs to "
            "another model: copy the checkpoint again"
        )


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict) and key not in _NO_SIZES:
            yield from _entries(value)


def _expected(key: str) -> str:
    if key == "architectures":
        return "a list of class names"
    return {list: "a list", str: "text", dict: "a mapping", int: "a whole number"}[_TYPES[key][0]]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
