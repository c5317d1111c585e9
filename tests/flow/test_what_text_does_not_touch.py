"""A PASS speaks for what the text touched: rows and experts that it did not are compared alone, or said to be unseen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from certification import Certify, gates
from invarlock.certificate.verify import verify_certificate
from invarlock.guards.routing import expert_of, not_exercised

Change = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture
def rewritten(tmp_path: Path) -> Callable[[Path, Change], Path]:
    def rewrite(source: Path, change: Change) -> Path:
        folder = tmp_path / "subject"
        shutil.copytree(source, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return rewrite


@pytest.mark.slow
def test_rows_that_no_text_uses_are_named_with_their_tokens(
    llama_model: Path, rewritten: Callable[[Path, Change], Path], certify_models: Certify
) -> None:
    """The rows of two special tokens under each other's ids, and one of an ordinary token overwritten."""

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        table = tensors["model.embed_tokens.weight"]
        table[[0, 4090]] = table[[4090, 0]]
        table[4091] = table[4091].flip(0)

    found = certify_models(rewritten(llama_model, swap), llama_model).certificate
    reasons = {reason["code"]: reason["message"] for reason in found["verdict"]["reasons"]}
    assert found["verdict"]["status"] == "FAIL"
    assert "(2 of 4096): 0 '<|endoftext|>' (that of 4090 " in reasons["rows_moved"]
    assert "with other values (1 of 4096): 4091 " in reasons["rows_overwritten"]
    seen = found["data"]["vocabulary_seen"]
    assert seen["size"] == 4096 and 0 < seen["seen"] == round(seen["share"] * 4096) < 4096
    assert 0 < seen["unseen_mass"] < 1
    assert verify_certificate(found).intact


@pytest.fixture(scope="module")
def mixture(llama_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of four experts whose last one no token reaches: its score is 0, and that of one of two others is above."""
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("mixture") / "model"
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(
        vocab_size=4096, **sizes, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=1, bos_token_id=0
    )
    model = MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter[1], parameter[3] = -parameter[0], 0.0
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama_model / file, folder / file)
    return folder


@pytest.mark.slow
def test_an_expert_that_no_token_reached_is_said_and_its_damage_fails(
    mixture: Path, rewritten: Callable[[Path, Change], Path], certify_models: Certify
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in sorted(tensors) if ".1." in name and "experts.3." in name)
        tensors[name] = tensors[name].flip(0).contiguous()

    itself = certify_models(mixture, mixture).certificate
    assert itself["verdict"]["status"] == "PASS" and gates(itself)["experts_exercised"] == "pass"
    assert all(counts[3] == 0 < sum(counts) for counts in itself["experts"]["subject"].values())
    found = certify_models(rewritten(mixture, spoil), mixture).certificate
    gate = next(gate for gate in found["gates"] if gate["name"] == "experts_exercised")
    assert found["primary_metric"]["ratio_vs_baseline"] == 1.0 and gate["decision"] == "fail"
    assert (
        gate["reason"].startswith("experts not exercised: ") and "weights stand out: model.layers.1." in gate["reason"]
    )
    assert "[3]" in gate["reason"]
    assert verify_certificate(found).intact


def test_experts_are_told_from_names_of_stacks_and_of_single_modules() -> None:
    assert expert_of("model.layers.1.mlp.experts.down_proj[3]") == ("model.layers.1.mlp", 3)
    assert expert_of("model.layers.0.block_sparse_moe.experts.12.w1.weight") == ("model.layers.0.block_sparse_moe", 12)
    assert expert_of("model.layers.0.mlp.gate.weight") is None
    assert not_exercised({"b": [0, 4, 0]}, {"b": [0, 0, 7]}) == {("b", 0)}


@pytest.mark.slow
def test_a_tokenizer_that_encodes_otherwise_is_counted_by_documents(
    llama_model: Path, tmp_path: Path, certify_models: Certify
) -> None:
    subject = tmp_path / "subject"
    shutil.copytree(llama_model, subject)
    path = subject / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    state["normalizer"] = {"type": "Replace", "pattern": {"String": "yield"}, "content": "return"}
    path.write_text(json.dumps(state), encoding="utf-8")
    found = certify_models(subject, llama_model).certificate
    message = next(r["message"] for r in found["verdict"]["reasons"] if r["code"] == "E002")
    encoded = found["structure"]["subject_usage"]["encoded"]
    assert 0 < encoded["differing"] < encoded["documents"]
    assert message.endswith(
        f"it encodes {encoded['differing']} of {encoded['documents']} documents otherwise than the baseline's, "
        f"the first {encoded['first']!r}"
    )
