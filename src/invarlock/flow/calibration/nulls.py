"""Edits that harm nobody, made on a live model: what a guard sees under them is what its thresholds must let through."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from invarlock.core.api import AdapterLike, ModelLike
from invarlock.edits.rtn import RTNQuantEdit
from invarlock.guards.families import WeightMatrix, weight_matrices

if TYPE_CHECKING:
    from torch import Generator, Tensor

__all__ = ["NULL_EDITS", "Apply", "restored"]

Apply: TypeAlias = "Callable[[ModelLike, AdapterLike, Generator], None]"


def _bfloat16(model: ModelLike, adapter: AdapterLike, rng: Generator) -> None:
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def _quantized(bitwidth: int, **options: Any) -> Apply:
    def apply(model: ModelLike, adapter: AdapterLike, rng: Generator) -> None:
        RTNQuantEdit(bitwidth=bitwidth, **options).apply(model, adapter)

    return apply


def _linear(model: ModelLike, adapter: AdapterLike) -> Iterator[WeightMatrix]:
    return (weight for weight in weight_matrices(model, adapter) if weight.role == "linear")


def _noisy(relative: float) -> Apply:
    """Independent noise, its deviation `relative` times the matrix's."""

    def apply(model: ModelLike, adapter: AdapterLike, rng: Generator) -> None:
        for weight in _linear(model, adapter):
            tensor = weight.tensor()
            tensor.add_(_normal(tuple(tensor.shape), rng, tensor) * (relative * tensor.std()))

    return apply


def _adapted(relative: float, rank: int) -> Apply:
    """A merged adapter of low rank on every attention matrix, ||dW|| = `relative` ||W||."""

    def apply(model: ModelLike, adapter: AdapterLike, rng: Generator) -> None:
        for weight in _linear(model, adapter):
            if weight.family == "attn":
                tensor = weight.tensor()
                rows, columns = tensor.shape
                change = _normal((rows, rank), rng, tensor) @ _normal((rank, columns), rng, tensor)
                tensor.add_(change * (relative * tensor.norm() / change.norm()))

    return apply


def _normal(shape: tuple[int, ...], rng: Generator, like: Tensor) -> Tensor:
    import torch

    return torch.randn(math.prod(shape), generator=rng).reshape(shape).to(like)


#: name -> (edit, whether another seed makes another edit)
NULL_EDITS: dict[str, tuple[Apply, bool]] = {
    "bfloat16": (_bfloat16, False),
    "int8 a channel": (_quantized(8), False),
    "int8 a group of 64": (_quantized(8, group_size=64), False),
    "int8 a group of 32": (_quantized(8, group_size=32), False),
    "int4 a group of 32": (_quantized(4, group_size=32), False),
    "noise of 0.3 %": (_noisy(0.003), True),
    "noise of 1 %": (_noisy(0.01), True),
    "LoRA of rank 4, 1 %": (_adapted(0.01, 4), True),
    "LoRA of rank 8, 2 %": (_adapted(0.02, 8), True),
}


def restored(model: ModelLike) -> Callable[[], None]:
    """Copy every parameter and return a function that puts the copies back."""
    import torch

    kept = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]

    def restore() -> None:
        with torch.no_grad():
            for parameter, copy in kept:
                parameter.copy_(copy)

    return restore
