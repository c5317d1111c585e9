"""Edits of a saved checkpoint that change its weights and not its function, and damage to rows that no text touches.

Written over the names of tensors: Llama-likes, GPT-2, GPT-NeoX and T5; BERT's norms are read by what adds to them too, so
that their gains cannot move. Each returns the names of what it changed, or None where the architecture has no place for
it. Tensors are stored in single precision, so that what is preserved is preserved to rounding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

__all__ = ["fold_gains", "move_rows", "overwrite_rows", "rotate", "smooth", "store_head"]

Tensors = dict[str, torch.Tensor]
#: the norm of a layer, and the weights that alone read it
_READERS = (
    (r"input_layernorm$", r"(self_attn\.[qkv]_proj|attention\.query_key_value)$"),
    (r"post_attention_layernorm$", r"mlp\.(gate_proj|up_proj|dense_h_to_4h)$"),
    (r"ln_1$", r"attn\.c_attn$"),
    (r"ln_2$", r"mlp\.c_fc$"),
    (r"layer_norm$", r"(SelfAttention\.[qkv]|EncDecAttention\.q|DenseReluDense\.wi(_\d)?)$"),
)
#: embeddings, and the output layers that may be tied to them
_TABLES = {
    "model.embed_tokens.weight": "lm_head.weight", "gpt_neox.embed_in.weight": "embed_out.weight",
    "transformer.wte.weight": "lm_head.weight", "shared.weight": "lm_head.weight",
    "bert.embeddings.word_embeddings.weight": "cls.predictions.decoder.weight",
}  # fmt: skip
_LAYER = re.compile(r"^(.*\.(?:layers|h|block\.\d+\.layer)\.\d+)\.")


def smooth(folder: Path, rng: torch.Generator) -> set[str] | None:
    """Divide the gains (and biases) of every norm by a scale a channel, and multiply what reads them (SmoothQuant)."""
    return _scaled(folder, lambda gain: torch.exp(0.7 * torch.randn(gain.shape, generator=rng)))


def fold_gains(folder: Path, rng: torch.Generator) -> set[str] | None:
    """Move every norm's gain into what reads it: gains become 1."""
    return _scaled(folder, lambda gain: torch.where(gain.abs() > 1e-3, gain, torch.ones_like(gain)))


def store_head(folder: Path, rng: torch.Generator) -> set[str] | None:
    """Store the tied output layer beside the embedding, with the same bits. T5 scales what a tied one reads, so that its
    configuration stays."""
    tensors = _read(folder)
    table = next((name for name in _TABLES if name in tensors), None)
    if table is None or _TABLES[table] in tensors:
        return None
    tensors[_TABLES[table]] = tensors[table].clone()
    if "cls.predictions.bias" in tensors:
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    flag = {} if table == "shared.weight" else {"tie_word_embeddings": False}
    return _write(folder, tensors, {_TABLES[table]}, **flag)


def rotate(folder: Path, rng: torch.Generator) -> set[str] | None:
    """Rotate the residual stream (QuaRot, SpinQuant): needs norms without biases, whose gains were folded."""
    tensors = _read(folder)
    table = tensors.get("model.embed_tokens.weight")
    if table is None or not any(name.endswith("input_layernorm.weight") for name in tensors):
        return None
    fold_gains(folder, rng)
    tensors = _read(folder)
    head = tensors.get("lm_head.weight", table).clone() * tensors["model.norm.weight"]
    tensors["model.norm.weight"] = torch.ones_like(tensors["model.norm.weight"])
    turn = torch.linalg.qr(torch.randn(table.shape[1], table.shape[1], generator=rng, dtype=torch.float64))[0]

    def turned(matrix: torch.Tensor, *, output: bool) -> torch.Tensor:
        return ((turn.T @ matrix.double()) if output else (matrix.double() @ turn)).float()

    tensors["lm_head.weight"] = turned(head, output=False)
    tensors["model.embed_tokens.weight"] = turned(table, output=False)
    for name, tensor in tensors.items():
        if re.search(r"\.(q|k|v|gate|up)_proj\.weight$", name):
            tensors[name] = turned(tensor, output=False)
        elif re.search(r"\.(o|down)_proj\.weight$", name):
            tensors[name] = turned(tensor, output=True)
    return _write(folder, tensors, set(tensors), tie_word_embeddings=False)


def move_rows(folder: Path, rows: list[int]) -> set[str] | None:
    """Put the rows of the embedding under each other's ids, one further."""
    return _rows(folder, rows, lambda table: table.roll(1, 0))


def overwrite_rows(folder: Path, rows: list[int]) -> set[str] | None:
    """Fill rows of the embedding with the values of each in reverse: the same norm, another direction."""
    return _rows(folder, rows, lambda table: table.flip(1))


def _rows(folder: Path, rows: list[int], change: Callable[[torch.Tensor], torch.Tensor]) -> set[str] | None:
    tensors = _read(folder)
    name = next((name for name in _TABLES if name in tensors), None)
    if name is None or len(rows) < 2:
        return None
    tensors[name][rows] = change(tensors[name][rows].clone())
    return _write(folder, tensors, {name})


def _scaled(folder: Path, scale_of: Callable[[torch.Tensor], torch.Tensor]) -> set[str] | None:
    tensors = _read(folder)
    changed: set[str] = set()
    for name in sorted(tensors):
        layer = _LAYER.match(name)
        reading = next((readers for norm, readers in _READERS if re.search(norm, name.removesuffix(".weight"))), None)
        if layer is None or reading is None or not name.endswith(".weight"):
            continue
        scale = scale_of(tensors[name])
        tensors[name] = tensors[name] / scale
        bias = f"{name.removesuffix('.weight')}.bias"
        if bias in tensors:
            tensors[bias] = tensors[bias] / scale
        for reader in sorted(tensors):
            if reader.startswith(f"{layer[1]}.") and re.search(reading, reader.removesuffix(".weight")):
                by_column = "c_attn" not in reader and "c_fc" not in reader  # GPT-2 stores [in, out]
                tensors[reader] = tensors[reader] * (scale if by_column else scale[:, None])
                changed |= {name, reader}
    return _write(folder, tensors, changed) if changed else None


def _read(folder: Path) -> Tensors:
    stored = load_file(folder / "model.safetensors")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in stored.items()}


def _write(folder: Path, tensors: Tensors, changed: set[str], **config: object) -> set[str]:
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | config), encoding="utf-8")
    return changed
