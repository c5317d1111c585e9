"""Adapters that choose the right one for a checkpoint by its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from invarlock.adapters.hf import HF_Adapter, HF_Causal_Adapter, HF_MLM_Adapter, HF_Seq2Seq_Adapter
from invarlock.adapters.onnx import HF_Causal_ONNX_Adapter
from invarlock.adapters.packed import HF_AWQ_Adapter, HF_BNB_Adapter, HF_GPTQ_Adapter
from invarlock.checkpoints.behaviour import load_config
from invarlock.checkpoints.files import format_of, resolve_folder
from invarlock.core import settings
from invarlock.core.exceptions import AdapterError

if TYPE_CHECKING:
    from transformers import AutoModel, PreTrainedModel

__all__ = ["HF_Auto_Adapter", "HF_Causal_Auto_Adapter"]


class HF_Auto_Adapter(HF_Adapter):
    """Picks the first adapter of `packed` and `candidates` whose kind matches the checkpoint, to load it."""

    name = "hf_auto"
    packed: ClassVar[tuple[type[HF_Causal_Adapter], ...]] = (HF_BNB_Adapter, HF_GPTQ_Adapter, HF_AWQ_Adapter)
    candidates: ClassVar[tuple[type[HF_Causal_Adapter], ...]] = (
        HF_Causal_Adapter,
        HF_Seq2Seq_Adapter,
        HF_MLM_Adapter,
    )

    def __init__(self) -> None:
        super().__init__()
        self._chosen: HF_Causal_Adapter | None = None

    def select(self, model_id: str, *, trust_remote_code: bool = False) -> HF_Causal_Adapter:
        """Return the adapter for a checkpoint; AdapterError where none fits."""
        folder = resolve_folder(model_id)
        config = load_config(folder, trust_remote_code=trust_remote_code)
        graph: tuple[type[HF_Causal_Adapter], ...] = (HF_Causal_ONNX_Adapter,) if format_of(folder) == "onnx" else ()
        for candidate in (*graph, *self.packed, *self.candidates):
            adapter = candidate()
            if adapter.matches(config):
                self._chosen = adapter
                return adapter
        kinds = ", ".join(candidate.name for candidate in self.candidates)
        images = hasattr(config, "vision_config") or hasattr(config, "audio_config")
        advice = "; save its text backbone as a causal model and certify that" if images else ""
        raise AdapterError(
            f"{model_id} is a {config.architectures}; {self.name} expects a model for one of: {kinds}{advice}"
        )

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
    def auto_class(self) -> type[AutoModel]:
        return self.chosen.auto_class

    def can_handle(self, model_id: str) -> bool:
        return any(candidate().can_handle(model_id) for candidate in self.candidates)

    def load_model(
        self,
        model_id: str,
        device: str = "auto",
        *,
        trust_remote_code: bool | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> PreTrainedModel:
        """Select by configuration, then load."""
        trust = settings.flag("INVARLOCK_TRUST_REMOTE_CODE") if trust_remote_code is None else trust_remote_code
        chosen = self.select(str(resolve_folder(model_id, revision)), trust_remote_code=trust)
        return chosen.load_model(model_id, device, trust_remote_code=trust, revision=revision, **options)

    def run_natively(self, model: PreTrainedModel, token_ids: Sequence[int]) -> None:
        """Have the runtime of the format that was loaded last execute the model, where there is one."""
        self.chosen.run_natively(model, token_ids)


class HF_Causal_Auto_Adapter(HF_Auto_Adapter):
    """Automatic selection restricted to causal language models."""

    name = "hf_causal_auto"
    candidates = (HF_Causal_Adapter,)
