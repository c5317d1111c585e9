"""Checkpoints whose files mislead, after public reports: certified on a few windows, with the verdict each must get."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from certification import Certify, reread
from invarlock.certificate.verify import verify_certificate
from invarlock.core.exceptions import ModelLoadError

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


def _copy(source: Path, folder: Path, **config: object) -> Path:
    shutil.copytree(source, folder)
    return _configure(folder, **config)


def _configure(folder: Path, **config: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | config), encoding="utf-8")
    return folder


def _shard(folder: Path, tensors: Tensors, twice: Tensors, where: Mapping[str, str] | None = None) -> None:
    """Write two shards, `twice` in the first too, and the index; `where` stands above what the index would say."""
    names = sorted(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for file, half, more in zip(SHARDS, halves, (twice, {}), strict=True):
        save_file({name: tensors[name] for name in half} | more, folder / file, metadata={"format": "pt"})
    at = {name: file for file, half in zip(SHARDS, halves, strict=True) for name in half} | dict(where or {})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": at}), encoding="utf-8")


NAME = "model.norm.weight"  # in the second shard


def _other(tensors: Tensors) -> Tensors:
    return {NAME: tensors[NAME] * 2}


def _stale_single(folder: Path, tensors: Tensors) -> None:
    _shard(folder, tensors, {})


def _leftover_shards(folder: Path, tensors: Tensors) -> None:
    _shard(folder, tensors, {})
    (folder / INDEX).unlink()


def _two_values(folder: Path, tensors: Tensors) -> None:
    (folder / "model.safetensors").unlink()
    _shard(folder, tensors, _other(tensors), {NAME: SHARDS[0]})


def _wrong_map(folder: Path, tensors: Tensors) -> None:
    (folder / "model.safetensors").unlink()
    _shard(folder, tensors, {}, {NAME: SHARDS[0]})


def _stale_pickle(folder: Path, tensors: Tensors) -> None:
    torch.save(tensors | _other(tensors), folder / "pytorch_model.bin")


def _named_single(folder: Path, tensors: Tensors) -> None:
    save_file(tensors | _other(tensors), folder / "ours.safetensors", metadata={"format": "pt"})
    _configure(folder, transformers_weights="ours.safetensors")


def _nameless(folder: Path, tensors: Tensors) -> None:
    _configure(folder, transformers_weights="ours.safetensors")


def _shards_of_ranks(folder: Path, tensors: Tensors) -> None:
    """What training in several processes leaves, which is read before all other files."""
    save_file(tensors | _other(tensors), folder / "shard-00001-model-00001-of-00001.safetensors")


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (_stale_single, "holds two sets of weights: model-00001-of-00002.safetensors.* and model.safetensors"),
        (_leftover_shards, "holds two sets of weights: model.safetensors and model-00001"),
        (_two_values, f"{NAME} stands in {SHARDS[0]} and in {SHARDS[1]} with different values"),
        (_wrong_map, f"says that {NAME} is in {SHARDS[0]}, but it is in {SHARDS[1]}"),
        (_stale_pickle, rf"{NAME} stands in pytorch_model\*.bin and in model.safetensors with different values"),
        (_named_single, "holds two sets of weights: ours.safetensors and model.safetensors"),
        (_nameless, "transformers_weights is 'ours.safetensors'; expected the name of a file beside it"),
        (_shards_of_ranks, "holds two sets of weights: model.safetensors and shard-00001"),
    ],
    ids=lambda value: getattr(value, "__name__", "").strip("_"),
)
def test_files_that_another_loader_reads_otherwise_are_refused_by_name(
    build: Callable[[Path, Tensors], None], said: str, llama_model: Path, tmp_path: Path, certify_models: Certify
) -> None:
    subject = _copy(llama_model, tmp_path / "subject")
    build(subject, load_file(llama_model / "model.safetensors"))
    with pytest.raises(ModelLoadError, match=said):
        certify_models(subject, llama_model)


def test_a_tensor_stored_twice_with_the_same_bits_passes(
    llama_model: Path, tmp_path: Path, certify_models: Certify
) -> None:
    subject = _copy(llama_model, tmp_path / "subject")
    (subject / "model.safetensors").unlink()
    tensors = load_file(llama_model / "model.safetensors")
    _shard(subject, tensors, {NAME: tensors[NAME].clone()})
    assert certify_models(subject, llama_model).certificate["verdict"] == {"status": "PASS", "reasons": []}


def test_the_file_that_a_configuration_names_is_what_is_read(
    llama_model: Path, tmp_path: Path, certify_models: Certify
) -> None:
    subject = _copy(llama_model, tmp_path / "subject")
    _named_single(subject, load_file(subject / "model.safetensors"))
    (subject / "model.safetensors").unlink()
    found = certify_models(subject, llama_model)
    assert found.status == "FAIL" and found.certificate["divergence"]["kl_mean"] > 0.01


def test_pickled_weights_of_the_same_values_are_no_second_set(
    llama_model: Path, tmp_path: Path, certify_models: Certify
) -> None:
    """As many models ship: the shorter type of the two decides."""
    subject = _copy(llama_model, tmp_path / "subject")
    tensors = load_file(subject / "model.safetensors")
    torch.save({name: tensor.float() for name, tensor in tensors.items()}, subject / "pytorch_model.bin")
    assert certify_models(subject, llama_model).certificate["verdict"] == {"status": "PASS", "reasons": []}


def test_weights_beside_those_that_are_read_are_said(
    llama_model: Path, tmp_path: Path, certify_models: Certify
) -> None:
    """Under other names, or an option of the loader: they may be another model."""
    subject = _copy(llama_model, tmp_path / "subject")
    tensors = load_file(subject / "model.safetensors")
    save_file({f"layers.{name}": tensor * 2 for name, tensor in tensors.items()}, subject / "consolidated.safetensors")
    save_file(tensors | _other(tensors), subject / "model.fp16.safetensors", metadata={"format": "pt"})
    found = certify_models(subject, llama_model)
    assert found.status == "PASS"
    (note,) = [note for note in found.notes if "not looked at" in note]
    assert "consolidated.safetensors, model.fp16.safetensors beside the weights" in note


def _roberta(bert: Path, folder: Path) -> Path:
    """The small BERT as a RoBERTa: the same function, with a position table two rows longer, counted from the padding."""
    kind = {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "type_vocab_size": 1}
    _copy(bert, folder, **kind, max_position_embeddings=130, pad_token_id=1)
    renames = {
        "bert.": "roberta.",
        "cls.predictions.transform.dense": "lm_head.dense",
        "cls.predictions.transform.LayerNorm": "lm_head.layer_norm",
        "cls.predictions.bias": "lm_head.bias",
    }
    new: Tensors = {}
    for name, tensor in load_file(bert / "model.safetensors").items():
        if name.endswith("position_embeddings.weight"):
            tensor = torch.cat([torch.zeros(2, tensor.shape[1], dtype=tensor.dtype), tensor])
        if name.endswith("token_type_embeddings.weight"):
            tensor = tensor[:1]
        for old, replacement in renames.items():
            name = name.replace(old, replacement, 1)
        if "decoder" not in name:
            new[name] = tensor.contiguous()
    save_file(new, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_padding_id_that_moves_every_position_fails_by_name(
    model_folder: Callable[[str], Path], tmp_path: Path, certify_models: Certify
) -> None:
    baseline = _roberta(model_folder("bert"), tmp_path / "baseline")
    subject = _copy(baseline, tmp_path / "subject", pad_token_id=0)
    # windows as long as the position table allows: two rows of it stand before the first position
    certificate = certify_models(subject, baseline, dataset={"seq_len": 128}).certificate
    assert certificate["verdict"]["status"] == "FAIL"
    assert "pad_token_id is 0; the baseline has 1" in certificate["verdict"]["reasons"][0]["message"]


def _usage_codes(certificate: Mapping[str, Any]) -> set[str]:
    return {finding["code"] for finding in certificate["invariants"]["warnings"]}


@pytest.mark.parametrize("intent", ["preserve", "finetune"])
def test_a_longer_limit_on_rotary_positions_is_a_note(
    intent: str, llama_model: Path, tmp_path: Path, certify_models: Certify
) -> None:
    subject = _copy(llama_model, tmp_path / "subject", max_position_embeddings=2048)
    certificate = certify_models(subject, llama_model, intent=intent).certificate
    assert certificate["verdict"]["status"] == "PASS"
    message = "configuration max_position_embeddings is 2048; the baseline has 256 (only warns)"
    assert certificate["invariants"]["message"] == message
    assert verify_certificate(reread(certificate)).passed


def test_the_same_weights_under_another_class_are_two_architectures_and_pass(
    llama_model: Path, tmp_path: Path, certify_models: Certify
) -> None:
    kind = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    certificate = certify_models(_copy(llama_model, tmp_path / "subject", **kind), llama_model).certificate
    assert certificate["verdict"]["status"] == "PASS"
    said = [finding["message"] for finding in certificate["invariants"]["warnings"]]
    assert said == ["two different architectures: LlamaForCausalLM and MistralForCausalLM"]


@pytest.mark.parametrize(("intent", "status"), [("preserve", "FAIL"), ("finetune", "PASS")])
def test_a_lost_stop_token_is_in_the_certificate_and_follows_again(
    intent: str, status: str, llama_model: Path, tmp_path: Path, certify_models: Certify
) -> None:
    baseline, subject = (_copy(llama_model, tmp_path / name) for name in ("baseline", "subject"))
    for folder, stops in ((baseline, [0, 5]), (subject, [0])):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}), encoding="utf-8")
    certificate = certify_models(subject, baseline, intent=intent).certificate
    said = "eos_token_id is 0 (generation_config.json); the baseline has [0, 5]"
    assert certificate["verdict"]["status"] == status
    assert certificate["invariants"]["message"].startswith(said)
    assert verify_certificate(reread(certificate)).intact
    forged = reread(certificate)
    forged["structure"]["subject_usage"]["generation"]["eos_token_id"] = [0, 5]
    assert not verify_certificate(forged).intact


def test_a_subject_without_a_tokenizer_is_not_shown_as_checked(
    llama_model: Path, tmp_path: Path, certify_models: Certify
) -> None:
    subject = _copy(llama_model, tmp_path / "subject")
    for path in subject.glob("tokenizer*"):
        path.unlink()
    certificate = certify_models(subject, llama_model).certificate
    assert _usage_codes(certificate) == {"tokenizer_not_evaluated"}
    assert "not evaluated" in certificate["invariants"]["message"]
