"""The edit that replaces the weights by those of another checkpoint: somebody else's edit, applied in memory."""

from __future__ import annotations

from typing import Any

from invarlock.checkpoints.behaviour import behaviour
from invarlock.core.api import AdapterLike, ModelEdit, ModelLike
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

    def apply(self, model: ModelLike, adapter: AdapterLike, **config: object) -> dict[str, Any]:
        """Copy every parameter and buffer of the checkpoint into `model`; report which ones changed."""
        import torch

        path = str(config.get("path", self.path))
        other = adapter.load_model(path, device=str(next(model.parameters()).device))
        _require_same_behaviour(model, other, path)
        ours, theirs = model.state_dict(), other.state_dict()
        if odd := sorted(theirs.keys() ^ ours.keys()):
            message = f"{path} and the model differ in {len(odd)} tensor name(s), first {odd[0]!r}; expected the same"
            raise EditError(message)
        for name, tensor in ours.items():
            if theirs[name].shape != tensor.shape:
                raise EditError(f"{name} has shape {list(theirs[name].shape)} in {path}; expected {list(tensor.shape)}")
        changed = []
        with torch.no_grad():
            for name, tensor in ours.items():  # a tied tensor counts once: under its second name it has changed already
                if not torch.equal(theirs[name].to(tensor.dtype), tensor):
                    changed.append(name)
                    tensor.copy_(theirs[name])
        return {
            "name": self.name,
            "path": path,
            "plan": {"path": path},
            "deltas": {"params_changed": sum(ours[n].numel() for n in changed), "layers_modified": len(changed)},
            "modules": changed,
        }


def _require_same_behaviour(model: ModelLike, other: ModelLike, path: str) -> None:
    if not (hasattr(model, "config") and hasattr(other, "config")):
        return
    ours, theirs = behaviour(model.config), behaviour(other.config)
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise EditError(
                f"{path} has configuration {key}={theirs.get(key)!r}; expected {ours.get(key)!r}, since this edit takes "
                "over weights alone: compare the two with `invarlock certify`"
            )
