"""Watching activations: which modules to watch, and hooks that hand over the outputs of sampled windows.

Hooks hand over one window at a time, so that nothing is stored and the result does not depend on the batch size.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from invarlock.guards.families import classify, is_expert_stack

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Sampler", "each_row", "forward_sampled", "hook_outputs", "pick_indices", "watched_modules"]

_SINGLE_EXPERT = re.compile(r"experts\.\d+(\.|$)")  # sees the tokens routed to it, no whole window

Receiver = Callable[[str, "Tensor"], None]


class Sampler(Protocol):
    """What the forward loop sets before each batch: is it wanted, and which of its rows [B] (None: all)."""

    take: bool
    rows: Any


def pick_indices(total: int, count: int, policy: str) -> list[int]:
    """Choose `count` of range(total) by `policy`: evenly_spaced (first and last included), first or last."""
    if policy in ("first", "last"):
        return list(range(total))[:count] if policy == "first" else list(range(total))[-count:]
    return sorted({round(k * (total - 1) / max(count - 1, 1)) for k in range(count)}) if total else []


def watched_modules(model: Any, adapter: Any = None) -> dict[str, str]:
    """Map the modules whose outputs are watched to their families: linear-like layers, stacks of experts and the
    input embedding, in the model's order. The output layer is left out: the loop applies it piece by piece.
    """
    if not hasattr(model, "named_modules"):
        return {}  # an inference session and the like: there is nothing to hook
    overrides = dict(adapter.module_families(model)) if hasattr(adapter, "module_families") else {}
    head = _accessor(model, "get_output_embeddings")
    embedding = getattr(_accessor(model, "get_input_embeddings"), "weight", None)
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        kind, weight = type(module).__name__, getattr(module, "weight", None)
        embeds = kind == "Embedding" and weight is embedding  # T5 reads a shared weight through other modules
        linear = ("Linear" in kind or kind == "Conv1D") and not _SINGLE_EXPERT.search(path)
        if module is head or not (linear or embeds or _holds_experts(path, module)):
            continue
        name = f"{path}.weight"
        family = classify(name, tuple(getattr(weight, "shape", ())))[0]
        found[path] = overrides.get(name) or overrides.get(path) or family
    return found


@contextlib.contextmanager
def hook_outputs(model: Any, paths: Iterable[str], sampler: Sampler, receive: Receiver) -> Iterator[None]:
    """Call `receive(path, output [T, F])` for every sampled window while the context is open.

    Outputs that are not one row of tokens a window (those of a single expert that saw some tokens) are passed over.
    """
    modules = dict(model.named_modules()) if hasattr(model, "named_modules") else {}

    def hook_for(path: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            if sampler.take:
                for window in _windows(output, sampler.rows):
                    receive(path, window)

        return hook

    handles = [modules[path].register_forward_hook(hook_for(path)) for path in paths if path in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def each_row(batches: Any) -> Iterator[dict[str, list[int]]]:
    """Yield the windows of calibration batches, as lists [T] or [B, T], one by one and without their padding."""
    for index in range(len(batches)):
        batch = batches[index]
        ids = np.atleast_2d(np.asarray(batch["input_ids"]))
        mask = batch.get("attention_mask")
        kept = np.ones_like(ids) if mask is None else np.atleast_2d(np.asarray(mask))
        labels = batch.get("labels")
        rows = [None] * len(ids) if labels is None else np.atleast_2d(np.asarray(labels))
        for tokens, seen, row in zip(ids, kept, rows, strict=True):
            window = {"input_ids": tokens[seen != 0].tolist()}
            if row is not None:
                aligned = len(row) == len(tokens)
                window["labels"] = (row[seen != 0] if aligned else row).tolist()
            yield window


def forward_sampled(model: Any, windows: Sequence[Mapping[str, list[int]]]) -> None:
    """Run the model over windows, one by one, for the sake of the hooks on it."""
    import torch

    if not hasattr(model, "named_modules"):
        return
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    pairs = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    training = bool(model.training)
    model.eval()
    try:
        with torch.inference_mode():
            for window in windows:
                inputs = {"input_ids": torch.tensor([window["input_ids"]], device=device)}
                if pairs:
                    target = [token for token in window.get("labels", window["input_ids"]) if token >= 0]
                    inputs["decoder_input_ids"] = torch.tensor([target], device=device)
                model(**inputs)
    finally:
        model.train(training)


def _holds_experts(path: str, module: Any) -> bool:
    """Say whether the output of a module is that of all its experts together."""
    if type(getattr(module, "experts", None)).__name__ == "ModuleList":
        return True
    return any(is_expert_stack(f"{path}.{name}", p.ndim) for name, p in module.named_parameters(recurse=False))


def _accessor(model: Any, name: str) -> Any:
    method = getattr(model, name, None)
    return method() if callable(method) else None


def _windows(output: Any, rows: Any) -> Iterator[Tensor]:
    tensor = output[0] if isinstance(output, tuple) else output
    if not hasattr(tensor, "ndim") or not tensor.is_floating_point():
        return
    count = None if rows is None else len(rows)
    if tensor.ndim == 2 and count and tensor.shape[0] % count == 0 and tensor.shape[0] > count:
        tensor = tensor.reshape(count, -1, tensor.shape[-1])  # tokens of a batch in one row, as experts see them
    if tensor.ndim != 3 or (count is not None and tensor.shape[0] != count):
        return
    for index in range(tensor.shape[0]):
        if rows is None or rows[index]:
            yield tensor[index]
