"""Models whose weights a loader left elsewhere (accelerate's `device_map`): on the CPU, on disk, or in the files themselves.

Such a parameter is on the `meta` device and has a shape alone; its module holds a hook that knows where the values are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

__all__ = ["named_weights", "value_of", "within_reach"]


def within_reach(owner: Module, parameter: Tensor) -> bool:
    """Say whether the values of a parameter of `owner` can be had."""
    return not parameter.is_meta or getattr(owner, "_hf_hook", None) is not None


def value_of(owner: Module, leaf: str) -> Tensor:
    """Return the values of a parameter of `owner`, fetched where the loader left them; the model stays as it is."""
    parameter: Tensor = getattr(owner, leaf)
    if not parameter.is_meta:
        return parameter.detach()
    from accelerate.utils import align_module_device

    with align_module_device(owner):
        fetched: Tensor = getattr(owner, leaf)
        return fetched.detach()


def named_weights(model: Module) -> Iterator[tuple[str, Module, Tensor]]:
    """Yield (name, owner, parameter) as `named_parameters` does, tied ones once. An offloading loader keeps no ties
    between what it left elsewhere: there the model's own declaration says what is tied."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if not (parameter.is_meta and name in tied):
            yield name, modules[name.rpartition(".")[0]], parameter
