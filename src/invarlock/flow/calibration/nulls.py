"""Edits that harm nobody, made on a live model: what a guard sees under them is what its thresholds must let through."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from invarlock.core.api import AdapterLike, ModelLike
from invarlock.edits.rtn import RTNQuantEdit
from invarlock.guards.families import weight_matrices

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


def _added(change: Callable[[Tensor, Generator], Tensor], family: str | None = None) -> Apply:
    """Add what `change` draws for a matrix to every linear one, or to those of a family."""

    def apply(model: ModelLike, adapter: AdapterLike, rng: Generator) -> None:
        for weight in weight_matrices(model, adapter):
            if weight.role == "linear" and family in (None, weight.family):
                tensor = weight.tensor()
                tensor.add_(change(tensor, rng))

    return apply


def _noisy(relative: float) -> Apply:
    """Independent noise, its deviation `relative` times the matrix's."""
    return _added(lambda tensor, rng: _normal(tuple(tensor.shape), rng, tensor) * (relative * tensor.std()))


def _adapted(relative: float, rank: int) -> Apply:
    """A merged adapter of low rank on every attention matrix, ||dW|| = `relative` ||W||."""

    def change(tensor: Tensor, rng: Generator) -> Tensor:
        rows, columns = tensor.shape
        drawn: Tensor = _normal((rows, rank), rng, tensor) @ _normal((rank, columns), rng, tensor)
        return drawn * float(relative * tensor.norm() / drawn.norm())

    return _added(change, "attn")


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
