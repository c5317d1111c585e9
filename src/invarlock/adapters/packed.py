"""Adapters for causal models that were packed by one family of tools; `auto` chooses them by `quantization_config`.

They load as `hf_causal` does, from the dense weights that the file stands for, and need no package of the format. What they
add is the promise: a checkpoint of another packing, or of none, is refused by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from invarlock.adapters.hf import HF_Causal_Adapter
from invarlock.checkpoints.behaviour import load_config
from invarlock.checkpoints.files import resolve_folder
from invarlock.core.exceptions import AdapterError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["HF_AWQ_Adapter", "HF_BNB_Adapter", "HF_GPTQ_Adapter"]


def _packing(config: PretrainedConfig) -> tuple[str | None, str]:
    """Return `quant_method` and, of AutoRound, the layout that it writes."""
    found = getattr(config, "quantization_config", None) or {}
    settings = found if isinstance(found, dict) else found.to_dict()
    return settings.get("quant_method"), str(settings.get("packing_format") or "")


class HF_GPTQ_Adapter(HF_Causal_Adapter):
    """Causal models packed by GPTQ, also as AutoRound writes it."""

    name = "hf_gptq"
    methods: ClassVar[tuple[str, ...]] = ("gptq", "auto-round")

    def matches(self, config: PretrainedConfig) -> bool:
        method, layout = _packing(config)
        its_layout = method != "auto-round" or ("awq" in layout) == ("awq" in self.methods)
        return super().matches(config) and method in self.methods and its_layout

    def load_model(self, model_id: str, device: str = "auto", **options: Any) -> PreTrainedModel:
        """See `HF_Causal_Adapter`. Raises AdapterError for a checkpoint of another packing."""
        config = load_config(
            resolve_folder(model_id, options.get("revision")),
            trust_remote_code=bool(options.get("trust_remote_code")),
        )
        if not self.matches(config):
            raise AdapterError(
                f"{model_id} has quant_method {_packing(config)[0]!r} and is a {config.architectures}; {self.name} expects "
                f"a causal model packed by {' or '.join(self.methods)}: use the adapter auto"
            )
        return super().load_model(model_id, device, **options)


class HF_AWQ_Adapter(HF_GPTQ_Adapter):
    """Causal models packed by AWQ, also as AutoRound writes it."""

    name = "hf_awq"
    methods = ("awq", "auto-round")


class HF_BNB_Adapter(HF_GPTQ_Adapter):
    """Causal models packed by bitsandbytes: int8, NF4 or FP4."""

    name = "hf_bnb"
    methods = ("bitsandbytes",)
