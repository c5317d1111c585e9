"""The edit that changes nothing: how a baseline is measured with the same steps as a subject."""

from __future__ import annotations

from typing import Any

from invarlock.core.api import AdapterLike, ModelEdit, ModelLike

__all__ = ["NoopEdit"]


class NoopEdit(ModelEdit):
    """Leaves the model as it is."""

    name = "noop"

    def apply(self, model: ModelLike, adapter: AdapterLike, **config: object) -> dict[str, Any]:
        """Change nothing; `config` is recorded and ignored."""
        return {"name": self.name, "plan": config, "deltas": {"params_changed": 0, "layers_modified": 0}, "modules": []}
