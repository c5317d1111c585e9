"""Adapters that choose the right one for a checkpoint by its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from invarlock.adapters.hf import HF_Causal_Adapter, HF_MLM_Adapter, HF_Seq2Seq_Adapter
from invarlock.checkpoints import files as checkpoint
from invarlock.core import settings
from invarlock.core.api import ModelAdapter
from invarlock.core.exceptions import AdapterError

__all__ = ["HF_Auto_Adapter", "HF_Causal_Auto_Adapter"]


class HF_Auto_Adapter(ModelAdapter):
    """Picks the first adapter of `candidates` whose kind matches the checkpoint, and passes every call on to it."""

    name = "hf_auto"
    candidates: ClassVar[tuple[type[HF_Causal_Adapter], ...]] = (
        HF_Causal_Adapter,
        HF_Seq2Seq_Adapter,
        HF_MLM_Adapter,
    )

    def __init__(self) -> None:
        self._chosen: HF_Causal_Adapter | None = None

    def select(self, model_id: str, *, trust_remote_code: bool = False) -> HF_Causal_Adapter:
        """Return the adapter for a checkpoint; AdapterError where none fits."""
        config = checkpoint.load_config(checkpoint.resolve_folder(model_id), trust_remote_code=trust_remote_code)
        for candidate in self.candidates:
            adapter = candidate()
            if adapter.matches(config):
                self._chosen = adapter
                return adapter
        kinds = ", ".join(candidate.name for candidate in self.candidates)
        raise AdapterError(f"{model_id} is a {config.architectures}; {self.name} expects a model for one of: {kinds}")

    @property
    def chosen(self) -> HF_Causal_Adapter:
        """The adapter picked by the last `select` or `load_model`; causal before the first."""
        return self._chosen or self.candidates[0]()

    @property
    def task(self) -> str:
        return self.chosen.task

    @property
    def metric_kind(self) -> str:
        return self.chosen.metric_kind

    @property
    def auto_class(self) -> Any:
        return self.chosen.auto_class

    def can_handle(self, model_id: str) -> bool:
        return any(candidate().can_handle(model_id) for candidate in self.candidates)

    def load_model(self, model_id: str, device: str = "auto", **kwargs: Any) -> Any:
        """Select by configuration, then load."""
        trust = bool(kwargs.setdefault("trust_remote_code", settings.flag("INVARLOCK_TRUST_REMOTE_CODE")))
        folder = str(checkpoint.resolve_folder(model_id, kwargs.pop("revision", None)))
        return self.select(folder, trust_remote_code=trust).load_model(folder, device, **kwargs)

    def describe(self, model: Any) -> dict[str, Any]:
        return self.chosen.describe(model)

    def snapshot(self, model: Any) -> bytes:
        return self.chosen.snapshot(model)

    def restore(self, model: Any, snapshot: bytes) -> None:
        self.chosen.restore(model, snapshot)

    def snapshot_chunked(self, model: Any, folder: Path) -> Path:
        return self.chosen.snapshot_chunked(model, folder)

    def restore_chunked(self, model: Any, path: Path) -> None:
        self.chosen.restore_chunked(model, path)

    def tokenizer(self, model_id: str) -> Any:
        return self.chosen.tokenizer(model_id)

    def save(self, model: Any, folder: Path) -> None:
        self.chosen.save(model, folder)


class HF_Causal_Auto_Adapter(HF_Auto_Adapter):
    """Automatic selection restricted to causal language models."""

    name = "hf_causal_auto"
    candidates = (HF_Causal_Adapter,)
