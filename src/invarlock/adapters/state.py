"""The state of a live model as bytes or files, and back, bit for bit. No pickle: safetensors.

Every parameter and buffer counts, non-persistent buffers too. Tensors that are one object under several names are stored
once; restoring makes them one object again, whatever an edit did to the tie.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from invarlock.core.api import ModelLike
from invarlock.core.exceptions import AdapterError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

__all__ = ["named_state", "restore_bytes", "restore_files", "snapshot_bytes", "snapshot_files", "tie_groups"]

_TIES, _BUFFERS = "ties", "buffers"
_SHARD_BYTES = 256 * 2**20


def named_state(model: ModelLike) -> Iterator[tuple[str, Tensor]]:
    """Yield every distinct parameter and buffer with its first name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def tie_groups(model: ModelLike) -> list[list[str]]:
    """Return the groups of names, two or more each, that share one parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _stored(model: ModelLike) -> Iterator[tuple[str, Tensor]]:
    """Yield what is written. Two views of one storage are written as two tensors: the format refuses shared memory."""
    seen: set[int] = set()
    for name, tensor in named_state(model):
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        yield name, plain.clone() if storage in seen else plain
        seen.add(storage)


def _metadata(model: ModelLike) -> dict[str, str]:
    return {_TIES: json.dumps(tie_groups(model)), _BUFFERS: json.dumps([name for name, _ in model.named_buffers()])}


def snapshot_bytes(model: ModelLike) -> bytes:
    """Return the whole state as one safetensors blob."""
    from safetensors.torch import save

    return bytes(save(dict(_stored(model)), metadata=_metadata(model)))


def restore_bytes(model: ModelLike, blob: bytes) -> None:
    """Bring the model back to what `snapshot_bytes` saw."""
    from safetensors.torch import load

    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    _restore(model, iter(load(blob).items()), header["__metadata__"])


def snapshot_files(model: ModelLike, folder: Path) -> Path:
    """Write the state as shards of about 256 MB into `folder`, so that only one shard is copied at a time."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    shard: dict[str, Tensor] = {}
    size = count = 0
    metadata = _metadata(model)
    for name, tensor in _stored(model):
        shard[name] = tensor
        size += tensor.numel() * tensor.element_size()
        if size >= _SHARD_BYTES:
            save_file(shard, folder / f"state-{count:05d}.safetensors", metadata=metadata)
            shard, size, count = {}, 0, count + 1
    save_file(shard, folder / f"state-{count:05d}.safetensors", metadata=metadata)
    return folder


def restore_files(model: ModelLike, folder: Path) -> None:
    """Bring the model back to what `snapshot_files` wrote."""
    files = sorted(folder.glob("state-*.safetensors"))
    if not files:
        raise AdapterError(f"no snapshot files in {folder}; expected state-*.safetensors")
    with safe_open(files[0], framework="pt") as first:
        metadata = first.metadata()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for path in files:
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                    yield name, shard.get_tensor(name)

    _restore(model, tensors(), metadata)


def _restore(model: ModelLike, tensors: Iterator[tuple[str, Tensor]], metadata: dict[str, str]) -> None:
    import torch

    seen = set()
    ties, buffers = json.loads(metadata[_TIES]), set(json.loads(metadata[_BUFFERS]))
    with torch.no_grad():
        for name, saved in tensors:
            seen.add(name)
            _put(model, name, saved, name in buffers)
        for first, *others in ties:
            module, leaf = _owner(model, first)
            shared = module._parameters[leaf]
            for other in others:
                module, leaf = _owner(model, other)
                module._parameters[leaf] = shared
    for name in {name for name, _ in named_state(model)} - seen:
        module, leaf = _owner(model, name)
        module._parameters.pop(leaf, None)
        module._buffers.pop(leaf, None)


def _owner(model: ModelLike, name: str) -> tuple[Module, str]:
    path, _, leaf = name.rpartition(".")
    try:
        return model.get_submodule(path), leaf
    except AttributeError as error:
        raise AdapterError(
            f"cannot restore {name!r}: the edit removed or replaced its module ({error}); load the model again"
        ) from None


def _put(model: ModelLike, name: str, saved: Tensor, is_buffer: bool) -> None:
    import torch

    module, leaf = _owner(model, name)
    table, other = (module._buffers, module._parameters) if is_buffer else (module._parameters, module._buffers)
    other.pop(leaf, None)
    current = table.get(leaf)
    if current is not None and current.shape == saved.shape and current.dtype == saved.dtype and not current.is_meta:
        current.data.copy_(saved)
        return
    device = current.device if current is not None and not current.is_meta else "cpu"
    fresh = saved.clone().to(device)
    grad = bool(current is not None and current.requires_grad)
    if is_buffer:
        module._buffers[leaf] = fresh
    else:
        module._parameters[leaf] = torch.nn.Parameter(fresh, requires_grad=grad)
