"""A checkpoint's configuration, and the part of it that changes what the network computes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invarlock.core.exceptions import ModelLoadError
from invarlock.core.files import first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["behaviour", "load_config"]

_INERT = re.compile(
    r"^(_.*|architectures|dtype|torch_dtype|transformers_version|use_cache|.*dropout.*|.*_pdrop|initializer_.*|"
    r"id2label|label2id|num_labels|problem_type|task_specific_params|summary_.*|output_.*|return_dict.*|"
    r"(bos|eos|pad|sep|cls|mask|unk|decoder_start|forced_bos|forced_eos)_token_id|gradient_checkpointing|"
    r"quantization_config|attn_implementation|chunk_size_feed_forward|pretraining_tp|finetuning_task|"
    r"classifier_.*|layerdrop|.*_layerdrop|auto_map|custom_pipelines|name_or_path|"
    r"n_inner_default|reorder_and_upcast_attn|is_encoder_decoder_default|tokenizer_class|prefix|max_length|min_length)$"
)


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return the checkpoint's configuration object; ModelLoadError where it is missing or unreadable."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"{folder} has no config.json; expected a Hugging Face checkpoint folder")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # any failure to read it is the same finding
        raise ModelLoadError(f"{folder}/config.json cannot be used: {first_line(error)}") from error


def behaviour(config: PretrainedConfig) -> dict[str, Any]:
    """Return the configuration values that change what the network computes, with the library's defaults filled in."""
    return _without_inert(json.loads(json.dumps(config.to_dict(), default=str)))


def _without_inert(values: dict[str, Any]) -> dict[str, Any]:
    """Drop inert keys, those of nested configurations too: some keep an attention's or an encoder's settings in one."""
    return {
        key: _without_inert(values[key]) if isinstance(values[key], dict) else values[key]
        for key in sorted(values)
        if not _INERT.match(key)
    }
