"""A checkpoint's configuration, and the part of it that changes what the network computes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invarlock.checkpoints.sanity import check_config, check_folder
from invarlock.checkpoints.tokenizer import tokenizer_usage
from invarlock.core.exceptions import ModelLoadError
from invarlock.core.files import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = ["REBUILT", "behaviour", "load_config", "usable_length", "usage"]

#: stands beside a configuration and a tokenizer that were made out of the metadata of one weights file
REBUILT = "gguf.json"
_INERT = re.compile(
    r"^(_.*|architectures|dtype|torch_dtype|transformers_version|use_cache|.*dropout.*|.*_pdrop|initializer_.*|"
    r"id2label|label2id|num_labels|problem_type|task_specific_params|summary_.*|output_.*|return_dict.*|"
    r"(bos|eos|pad|sep|cls|mask|unk|decoder_start|forced_bos|forced_eos)_token_id|gradient_checkpointing|"
    r"quantization_config|attn_implementation|chunk_size_feed_forward|pretraining_tp|finetuning_task|"
    r"classifier_.*|layerdrop|.*_layerdrop|auto_map|custom_pipelines|name_or_path|"
    r"n_inner_default|reorder_and_upcast_attn|is_encoder_decoder_default|tokenizer_class|prefix|max_length|min_length|"
    r"transformers_weights)$"
)
#: architectures whose positions count from the padding token's id, and whose first row is the one after it
_PADDED_POSITIONS = re.compile(
    r"roberta|camembert|xmod|longformer|luke|mpnet|data2vec-text|ibert|^esm$|layoutlmv3|lilt|markuplm"
)
#: those whose positions are computed from it, without a table that they fill
_PADDED = re.compile(_PADDED_POSITIONS.pattern + r"|m2m_100|nllb|fsmt|speech_to_text|xglm")
#: what configurations call the most tokens that a model takes
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_encoder_position_embeddings")
#: which tokens have a part, and what ends a text
_ROLES = re.compile(r"(bos|eos|pad|unk|sep|cls|mask|decoder_start|forced_bos|forced_eos)_token_id$|stop_strings$")
#: what a generation configuration leaves out, and what the library then takes
_SAMPLING: dict[str, Any] = {
    "do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None, "typical_p": 1.0, "num_beams": 1,
    "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": None,
    "begin_suppress_tokens": None, "forced_decoder_ids": None, "bad_words_ids": None, "max_new_tokens": None,
}  # fmt: skip
#: what a save writes into it and no text depends on
_UNSAMPLED = re.compile(
    r"^(_.*|transformers_version|use_cache|cache_.*|output_.*|return_dict.*|.*assistant.*|compile_.*)$"
)
#: further settings with what is taken where the file says nothing
_AT_REST: dict[str, Any] = {
    "max_length": 20, "min_length": 0, "early_stopping": False, "num_return_sequences": 1, "num_beam_groups": 1,
    "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "diversity_penalty": 0.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "remove_invalid_values": False, "renormalize_logits": False,
}  # fmt: skip


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return the checkpoint's configuration object; ModelLoadError where it is missing or unreadable."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if not (folder / "config.json").exists():
        raise ModelLoadError(f"{folder} has no config.json; expected a Hugging Face checkpoint folder")
    check_folder(folder)
    kind = check_config(folder).get("model_type")
    if kind is not None and kind not in CONFIG_MAPPING and not trust_remote_code:
        what = f"{folder}/config.json names the model_type {kind!r}, which the installed transformers does not know"
        raise ModelLoadError(f"{what}: pip install -U transformers, or trust_remote_code where code comes with it")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # any failure to read it is the same finding
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelLoadError(f"{folder}/config.json cannot be used: {reason}") from error


def behaviour(config: PretrainedConfig) -> dict[str, Any]:
    """Return the configuration values that change what the network computes, with the library's defaults filled in."""
    found = _without_inert(_values(config))
    if _PADDED.search(str(config.model_type)):
        found["pad_token_id"] = config.pad_token_id
    return found


def usable_length(config: PretrainedConfig) -> int | None:
    """Return how many tokens a window may have; None where positions are relative and set no limit."""
    text = config.get_text_config()
    names = _LENGTHS[:1] if hasattr(text, "relative_attention_num_buckets") else _LENGTHS
    longest = next((found for name in names if (found := getattr(text, name, None)) is not None), None)
    if not isinstance(longest, int) or longest < 1:
        return None
    offset = (text.pad_token_id or 0) + 1 if _PADDED_POSITIONS.search(str(text.model_type)) else 0
    return longest - offset


def usage(folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """Return how the checkpoint's files say that the model is used, beside what it computes.

    `config` and `generation` map roles of tokens to ids, by the file that says so: a checkpoint without
    generation_config.json generates with the roles of config.json. `at_default` names the keys of `behaviour` that have
    their class's default. `tokenizer` and `chat_template` are absent where there is nothing to read them from.
    """
    values, path = _values(config), folder / "generation_config.json"
    roles = {key: value for key, value in values.items() if _ROLES.match(key)}
    generation = _read(path)
    said = generation if path.is_file() else roles
    found: dict[str, Any] = {
        "architecture": next(iter(config.architectures or ()), None) or config.model_type,
        "config": {key: _one(value) for key, value in roles.items()},
        "generation": {key: _one(said.get(key)) for key in roles.keys() | said.keys() if _ROLES.match(key)},
        "sampling": _sampling(generation),
        "at_default": _at_default(config),
    }
    template = _chat_template(folder, tokenizer)
    if tokenizer is not None:
        found["tokenizer"] = tokenizer_usage(tokenizer)
    if (folder / REBUILT).is_file():
        # metadata have one end of the text, no file about generation, and roles that the converter left out
        found = {key: value for key, value in found.items() if key not in ("config", "generation", "sampling")}
        found["rebuilt"] = "gguf"
    if tokenizer is not None or template:
        found["chat_template"] = _summary(template)
    return found


def _sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of generation: the common ones always, the others where they are not at their defaults."""
    said = {key: value for key, value in generation.items() if value is not None}
    others = {
        key: value
        for key, value in said.items()
        if key not in _SAMPLING and not _UNSAMPLED.match(key) and not _ROLES.match(key) and value != _AT_REST.get(key)
    }
    return {key: said.get(key, default) for key, default in _SAMPLING.items()} | others


def _at_default(config: PretrainedConfig) -> list[str]:
    try:
        default = behaviour(type(config)())
    except (TypeError, ValueError, AttributeError):  # code that ships with a checkpoint may have no defaults
        return []
    return [key for key, value in behaviour(config).items() if key in default and default[key] == value]


def _values(config: PretrainedConfig) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    return values


def _one(value: object) -> object:
    """Return a token id; a list of one says the same, and the order of several says nothing."""
    if isinstance(value, list):
        return value[0] if len(value) == 1 else sorted(value)
    return value


def _read(path: Path) -> dict[str, Any]:
    """Return what a JSON file beside the weights says; {} where there is none. ModelLoadError where it is broken."""
    if not path.is_file():
        return {}
    found = read_json(path, "a JSON object; copy the checkpoint again", ModelLoadError, "checkpoint")
    if not isinstance(found, dict):
        raise ModelLoadError(f"{path} cannot be read (it holds a {type(found).__name__}); copy the checkpoint again")
    return found


def _chat_template(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, str]:
    """Return the chat templates by name: as the tokenizer has them, else from whichever file does."""
    loaded = getattr(tokenizer, "chat_template", None)
    if loaded:
        return dict(loaded) if isinstance(loaded, dict) else {"default": loaded}
    beside = [*folder.glob("chat_template.jinja"), *folder.glob("additional_chat_templates/*.jinja")]
    if beside:
        names = {path: "default" if path.parent == folder else path.stem for path in beside}
        return {name: path.read_text(encoding="utf-8") for path, name in names.items()}
    for name in ("chat_template.json", "tokenizer_config.json"):
        given = _read(folder / name).get("chat_template")
        if given:
            return {"default": given} if isinstance(given, str) else {t["name"]: t["template"] for t in given}
    return {}


def _summary(templates: dict[str, str]) -> dict[str, str] | None:
    """Return the digest and the first line of chat templates; None where there is none."""
    if not templates:
        return None
    text = json.dumps({name: template.rstrip("\n") for name, template in templates.items()}, sort_keys=True)
    first = next(iter(templates.values())).strip().splitlines()
    return {"digest": hashlib.sha256(text.encode()).hexdigest()[:16], "first_line": first[0][:60] if first else ""}


def _without_inert(values: dict[str, Any]) -> dict[str, Any]:
    """Drop inert keys, those of nested configurations too: some keep an attention's or an encoder's settings in one."""
    return {
        key: _without_inert(values[key]) if isinstance(values[key], dict) else values[key]
        for key in sorted(values)
        if not _INERT.match(key)
    }
