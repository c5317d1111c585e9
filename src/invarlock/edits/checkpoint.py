"""The edit that replaces the weights by those of another checkpoint: somebody else's edit, applied in memory."""

from __future__ import annotations

from typing import Any

from invarlock.core.api import ModelEdit
from invarlock.core.exceptions import EditError

__all__ = ["CheckpointEdit"]


class CheckpointEdit(ModelEdit):
    """Loads the weights of `path` into the live model.

    The two must have the same parameter names and shapes and compute the same from them (configuration): the weights
    alone would be another model than the checkpoint. EditError names the first difference.
    """

    name = "checkpoint"

    def __init__(self, path: str) -> None:
        self.path = str(path)

    def apply(self, model: Any, adapter: Any, **config: Any) -> dict[str, Any]:
        """Copy every parameter and buffer of the checkpoint into `model`; report which ones changed."""
        import torch

        path = str(config.get("path", self.path))
        device = next(model.parameters()).device
        other = adapter.load_model(path, device=str(device))
        _require_same_behaviour(model, other, path)
        theirs = dict(other.state_dict())
        ours = dict(model.state_dict())
        if theirs.keys() != ours.keys():
            odd = sorted(theirs.keys() ^ ours.keys())
            raise EditError(
                f"{path} and the model differ in {len(odd)} tensor name(s), first {odd[0]!r}; expected the same"
            )
        for name, tensor in ours.items():
            if theirs[name].shape != tensor.shape:
                raise EditError(f"{name} has shape {list(theirs[name].shape)} in {path}; expected {list(tensor.shape)}")
        changed = []
        with torch.no_grad():
            for name, tensor in ours.items():
                new = theirs[name].to(tensor.dtype)
                if not torch.equal(new, tensor):
                    changed.append(name)
                    tensor.copy_(new)
        sizes = sum(ours[name].numel() for name in changed)
        return {
            "name": self.name,
            "path": path,
            "deltas": {"params_changed": sizes, "layers_modified": len(changed)},
            "modules": changed,
        }


def _require_same_behaviour(model: Any, other: Any, path: str) -> None:
    from invarlock.checkpoints.files import behaviour

    if not (hasattr(model, "config") and hasattr(other, "config")):
        return
    ours, theirs = behaviour(model.config), behaviour(other.config)
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise EditError(
                f"{path} has configuration {key}={theirs.get(key)!r}; expected {ours.get(key)!r}, since this edit takes "
                "over weights alone: compare the two with `invarlock certify`"
            )
