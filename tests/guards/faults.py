"""Ways to damage a model in place, each returning the names of what it damaged, and edits that harm nobody."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from invarlock.guards.families import WeightMatrix, weight_matrices


def weights(model: Any) -> dict[str, WeightMatrix]:
    return {weight.name: weight for weight in weight_matrices(model)}


def in_family(model: Any, family: str, index: int = 1, *, square: bool = False) -> WeightMatrix:
    found = [w for w in weight_matrices(model) if w.family == family and w.role == "linear"]
    return [w for w in found if not square or w.shape[0] == w.shape[1]][index]


Change = Callable[[torch.Tensor], torch.Tensor]


def _edit(family: str, change: Change, square: bool = False) -> Callable[[Any], set[str]]:
    def apply(model: Any) -> set[str]:
        weight = in_family(model, family, square=square)
        tensor = weight.tensor()
        tensor.copy_(change(tensor.clone()))
        return {weight.name}

    return apply


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def _zero_rows(rows: slice) -> Change:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[rows] = 0
        return tensor

    return change


def _negate_row(tensor: torch.Tensor) -> torch.Tensor:
    tensor[3] *= -1
    return tensor


def _shuffle_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[torch.randperm(len(tensor), generator=_generator())]


def _embedding(change: Change) -> Callable[[Any], set[str]]:
    def apply(model: Any) -> set[str]:
        weight = next(w for w in weight_matrices(model) if w.role != "linear")
        weight.tensor().copy_(change(weight.tensor().clone()))
        return {weight.name}

    return apply


def _reinitialise(tensor: torch.Tensor) -> torch.Tensor:
    return torch.randn(tensor.shape, generator=_generator()) * tensor.std()


def swap_layers(model: Any) -> set[str]:
    attention = [w for w in weight_matrices(model) if w.family == "attn" and w.role == "linear"]
    first = attention[0]
    second = next(w for w in attention if w.layer == 1 and w.shape == first.shape)
    kept = first.tensor().clone()
    first.tensor().copy_(second.tensor())
    second.tensor().copy_(kept)
    return {first.name, second.name}


FAULTS: dict[str, Callable[[Any], set[str]]] = {
    "zeroed": _edit("ffn", lambda t: t * 0),
    "scaled x8": _edit("attn", lambda t: t * 8),
    "scaled /8": _edit("ffn", lambda t: t / 8),
    "sign flipped": _edit("attn", lambda t: -t),
    "transposed": _edit("attn", lambda t: t.T.clone(), square=True),
    "rows shuffled": _edit("ffn", _shuffle_rows),
    "layers swapped": swap_layers,
    "one head zeroed": _edit("attn", _zero_rows(slice(0, 16))),
    "one row negated": _edit("ffn", _negate_row),
    "x1.5 on one": _edit("ffn", lambda t: t * 1.5),
    "embedding re-initialised": _embedding(_reinitialise),
    "embedding rows zeroed": _embedding(_zero_rows(slice(10, 14))),
}


def round_to(model: Any, bits: int) -> None:
    """Round every matrix to the nearest of 2^bits levels a row."""
    for weight in weight_matrices(model):
        tensor = weight.tensor()
        scale = tensor.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
        tensor.copy_((tensor / scale).round() * scale)


def prune(model: Any, fraction: float = 0.1) -> None:
    """Zero the smallest elements of every matrix."""
    for weight in weight_matrices(model):
        tensor = weight.tensor()
        if tensor.numel() > 1000:
            tensor[tensor.abs() <= tensor.abs().flatten().kthvalue(int(fraction * tensor.numel())).values] = 0
