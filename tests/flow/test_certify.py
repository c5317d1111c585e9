"""Certification of real checkpoints: a model against itself passes, damage never does, and nothing is half-written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from certification import FEW, Certify, gates, reasons, reread
from invarlock.adapters.hf import HF_Causal_Adapter
from invarlock.certificate.verify import verify_certificate
from invarlock.core.exceptions import (
    CertificateError,
    CheckpointDamagedError,
    ConfigError,
    DataError,
    InvarlockError,
    ModelLoadError,
    PairingError,
)
from invarlock.core.files import read_json, write_json
from invarlock.flow.certify import CertifyOutcome, CertifyRequest, find_report

Tensors = dict[str, Any]
Rewrite = Callable[..., Path]
LAYER = "transformer.h.1.mlp.c_fc.weight"


def _is_perfect(outcome: CertifyOutcome) -> None:
    """PASS, a ratio of exactly 1, no findings, and verifiably so."""
    certificate = outcome.certificate
    metric = certificate["primary_metric"]
    assert certificate["verdict"] == {"status": "PASS", "reasons": []}
    assert metric["ratio_vs_baseline"] == 1.0
    assert (metric["ci"], metric["display_ci"]) == ([0.0, 0.0], [1.0, 1.0])
    assert (certificate["divergence"]["flip_rate"], certificate["divergence"]["kl_max"]) == (
        0.0,
        pytest.approx(0, abs=1e-4),
    )
    for guard in ("invariants", "spectral", "rmt", "variance"):
        assert (certificate[guard]["errors"], certificate[guard]["warnings"]) == ([], []), guard
    assert verify_certificate(reread(certificate)).passed


def _save(model: Any, folder: Path, tokenizer_from: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_from / name, folder / name)
    return folder


# --- a model against itself ------------------------------------------------------------------------------------------


def _with_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()


def _hub_names(tensors: Tensors) -> None:
    """As `gpt2` on the hub: no prefix, and the causal masks stored as buffers."""
    import torch

    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)
    tensors["h.0.attn.bias"] = torch.tril(torch.ones(256, 256)).view(1, 1, 256, 256)
    tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)


@pytest.mark.parametrize("change", [lambda tensors: None, _with_head, _hub_names], ids=["same", "head stored", "hub"])
def test_another_form_of_the_same_files_passes_perfectly(
    change: Callable[[Tensors], None],
    demo_model: Path,
    rewrite_tensors: Rewrite,
    passed: CertifyOutcome,
    certify_models: Certify,
) -> None:
    _is_perfect(certify_models(rewrite_tensors(demo_model, change), baseline_report=passed.source_report))


def test_a_model_saved_again_in_small_shards_passes_perfectly(
    copy_model: Callable[..., Path], llama_model: Path, certify_models: Certify
) -> None:
    sharded = copy_model(llama_model, max_shard_size="500KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    _is_perfect(certify_models(sharded, llama_model))


def test_the_same_values_in_a_wider_type_pass_perfectly(
    copy_model: Callable[..., Path], demo_model: Path, passed: CertifyOutcome, certify_models: Certify
) -> None:
    _is_perfect(certify_models(copy_model(demo_model, dtype="float32"), baseline_report=passed.source_report))


_COMMON = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "GPTNeoX": _COMMON,  # its head has another name in files
    "Qwen2": {**_GROUPED, "tie_word_embeddings": False},
    "Gemma": {**_GROUPED, "head_dim": 8},
    "Mixtral": {**_GROUPED, "num_local_experts": 2},  # its experts are put together while loading
    "Bloom": {"vocab_size": 4096, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_of_any_architecture_against_itself_passes_perfectly(
    architecture: str, demo_model: Path, tmp_path: Path, certify_models: Certify
) -> None:
    import torch
    import transformers

    config = getattr(transformers, f"{architecture}Config")(**ARCHITECTURES[architecture])
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    baseline = _save(model, tmp_path / "baseline", demo_model)
    subject = _save(model, tmp_path / "subject", demo_model, max_shard_size="100KB")
    _is_perfect(certify_models(subject, baseline, overrides={"sample": {"preview": 3, "final": 3}}))


@pytest.fixture(scope="module")
def one_document(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    path = tmp_path_factory.mktemp("one") / "one.jsonl"
    texts = [json.loads(line)["text"] for line in text_file.read_text(encoding="utf-8").splitlines()[:8]]
    path.write_text(json.dumps({"text": " ".join(texts)}) + "\n", encoding="utf-8")
    return path


def test_one_document_decides_about_the_same_weights_and_about_no_others(
    demo_model: Path, harmless: Path, one_document: Path, certify_models: Certify
) -> None:
    few = {"dataset": {"file": str(one_document)}, "overrides": {"sample": {"preview": 3, "final": 3}}}
    same = certify_models(demo_model, demo_model, **few)
    assert same.certificate["primary_metric"]["clusters"] == 1
    assert same.certificate["primary_metric"]["method"] == "identity"
    assert "the weights are the baseline's" in same.certificate["primary_metric"]["reason"]
    _is_perfect(same)
    other = certify_models(harmless, baseline_report=same.source_report, **few)
    assert other.status == "INCONCLUSIVE"
    undecided = ["PRIMARY_METRIC", "DIVERGENCE_KL", "TOKEN_FLIPS"]
    assert reasons(other.certificate) == [(code, None) for code in undecided]
    assert other.certificate["primary_metric"]["display_ci"] == [None, None]


# --- harmless and harmful edits --------------------------------------------------------------------------------------


def test_rounding_to_eight_bits_passes_on_measured_evidence(passed: CertifyOutcome) -> None:
    certificate = passed.certificate
    assert passed.status == "PASS"
    assert 0 < certificate["divergence"]["kl_mean"] < 0.02
    assert certificate["primary_metric"]["display_ci"][1] < 1.05
    assert certificate["weights"]["identical"] is False
    assert {"primary_metric", "divergence_kl", "token_flips", "spectral", "rmt", "pairing"} <= gates(certificate).keys()


def test_rounding_to_two_bits_fails_and_says_how_much_of_it_changed(failed: CertifyOutcome) -> None:
    assert failed.status == "FAIL"
    decided = gates(failed.certificate)
    assert decided["primary_metric"] == decided["divergence_kl"] == "fail"
    weights, message = failed.certificate["weights"], failed.certificate["verdict"]["reasons"][0]["message"]
    assert not weights["uniform"]  # the embedding of positions was not rounded
    found = re.search(
        r"all attn\.c_attn\.weight.* \((\d+) tensors\): 2-bit rounding.*; (\d+) of \d+ tensors changed, \d+ are as",
        message,
    )
    assert found is not None, message
    assert int(found[1]) <= len(weights["culprits"]) <= int(found[2])


def test_a_limit_inside_the_interval_is_inconclusive_and_says_what_would_decide(
    harmless: Path, passed: CertifyOutcome, certify_models: Certify
) -> None:
    before = passed.certificate["primary_metric"]
    limit = before["ratio_vs_baseline"] + 0.1 * (before["display_ci"][1] - before["ratio_vs_baseline"])
    near = {"metrics": {"pm_ratio": {"limit": limit, "hysteresis": 0.0}}}
    outcome = certify_models(harmless, baseline_report=passed.source_report, overrides=near)
    metric = outcome.certificate["primary_metric"]
    assert outcome.status == "INCONCLUSIVE"
    assert reasons(outcome.certificate) == [("PRIMARY_METRIC", None)]
    assert metric["minimum_detectable_effect"] > 1.0
    assert "the estimate lies at the limit" in metric["reason"] or metric["documents_needed"] > metric["clusters"]
    assert verify_certificate(reread(outcome.certificate)).verdict == "INCONCLUSIVE"


# --- damage ----------------------------------------------------------------------------------------------------------


def _nan(tensors: Tensors) -> None:
    tensors[LAYER][3, 5] = float("nan")


def _infinity(tensors: Tensors) -> None:
    tensors["transformer.ln_f.weight"][0] = float("inf")


def _missing(tensors: Tensors) -> None:
    del tensors[LAYER]


def _misshapen(tensors: Tensors) -> None:
    tensors[LAYER] = tensors[LAYER][:, :-4].contiguous()


def _untied(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].flip(0).contiguous()


def _stranger(tensors: Tensors) -> None:
    tensors["transformer.h.9.mlp.c_fc.weight"] = tensors[LAYER].clone()


DAMAGE: dict[str, tuple[Callable[[Tensors], None], str, str]] = {
    "NaN": (_nan, "non_finite", LAYER),
    "infinity": (_infinity, "non_finite", "transformer.ln_f.weight"),
    "missing": (_missing, "tensor_missing", LAYER),
    "mis-shaped": (_misshapen, "tensor_shape", LAYER),
    "untied": (_untied, "untied", "lm_head.weight"),
    "unknown tensor": (_stranger, "tensor_unexpected", "transformer.h.9.mlp.c_fc.weight"),
}


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, model_id: str, *rest: Any, **options: Any) -> Any:
        raise AssertionError(f"{model_id} was loaded; expected a refusal from the files alone")

    monkeypatch.setattr(HF_Causal_Adapter, "load_model", refuse)


def _is_refusal(certificate: dict[str, Any]) -> None:
    metric = certificate["primary_metric"]
    assert certificate["verdict"]["status"] == "FAIL"
    assert metric["decision"] == "not_evaluated"
    numbers = ("preview", "final", "ratio_vs_baseline", "log_ratio", "delta_pp", "std_error", "baseline_final")
    assert [metric[name] for name in numbers] == [None] * len(numbers)
    assert (metric["ci"], metric["display_ci"]) == ([None, None], [None, None])
    assert certificate["divergence"] is certificate["primary_metric_tail"] is certificate["spectral"] is None
    assert certificate["validation"] == {"invariants_pass": False, "primary_metric_acceptable": False,
                                         "hysteresis_applied": False}  # fmt: skip
    verified = verify_certificate(reread(certificate))
    assert (verified.intact, verified.verdict, verified.passed) == (True, "FAIL", False)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_subject_fails_by_name_before_any_model_is_loaded(
    name: str, demo_model: Path, rewrite_tensors: Rewrite, certify_models: Certify
) -> None:
    change, code, tensor = DAMAGE[name]
    outcome = certify_models(rewrite_tensors(demo_model, change), demo_model)
    assert (code, tensor) in reasons(outcome.certificate)
    assert outcome.edited_report is None
    _is_refusal(outcome.certificate)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("name", ["NaN", "infinity", "missing", "mis-shaped"])
def test_a_damaged_baseline_is_refused_even_against_itself(
    name: str, demo_model: Path, rewrite_tensors: Rewrite, certify_models: Certify, tmp_path: Path
) -> None:
    change, _, tensor = DAMAGE[name]
    broken = rewrite_tensors(demo_model, change)
    with pytest.raises(CheckpointDamagedError, match="the baseline .* is damaged") as caught:
        certify_models(broken, broken, out=tmp_path / "runs")
    assert tensor in [finding["tensor"] for finding in caught.value.findings]
    assert not (tmp_path / "runs").exists()


def test_shuffled_rows_fail_on_behaviour_and_are_named(
    demo_model: Path, rewrite_tensors: Rewrite, passed: CertifyOutcome, certify_models: Certify
) -> None:
    def shuffle(tensors: Tensors) -> None:
        tensors[LAYER] = tensors[LAYER].roll(7, 0).contiguous()

    outcome = certify_models(rewrite_tensors(demo_model, shuffle), baseline_report=passed.source_report)
    assert outcome.status == "FAIL"
    assert outcome.certificate["weights"]["culprits"][0] == LAYER
    assert any(LAYER in reason["message"] for reason in outcome.certificate["verdict"]["reasons"])


def test_a_model_that_overflows_only_when_it_runs_fails(
    demo_model: Path, copy_model: Callable[..., Path], passed: CertifyOutcome, certify_models: Certify
) -> None:
    def explode(model: Any) -> None:
        model.transformer.ln_f.weight.fill_(3e38)
        model.transformer.wte.weight.mul_(1e4)

    subject = copy_model(demo_model, explode, dtype="float32")
    outcome = certify_models(subject, baseline_report=passed.source_report)
    certificate = outcome.certificate
    assert outcome.status == "FAIL"
    assert gates(certificate)["primary_metric"] == gates(certificate)["divergence_kl"] == "fail"
    assert certificate["primary_metric"]["ratio_vs_baseline"] is None
    assert "primary_metric_acceptable" not in [name for name, good in certificate["validation"].items() if good]
    assert verify_certificate(reread(certificate)).verdict == "FAIL"


# --- tokenizers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with two words of its vocabulary exchanged."""
    folder = tmp_path_factory.mktemp("foreign") / "model"
    shutil.copytree(demo_model, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[1000:1002]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


@pytest.mark.usefixtures("no_loading")
def test_a_foreign_tokenizer_fails_in_dev_and_stops_in_ci(
    foreign: Path, demo_model: Path, certify_models: Certify, tmp_path: Path
) -> None:
    outcome = certify_models(foreign, demo_model)
    assert reasons(outcome.certificate) == [("E002", None)]
    _is_refusal(outcome.certificate)
    with pytest.raises(PairingError) as caught:
        certify_models(foreign, demo_model, profile="ci", out=tmp_path / "runs")
    assert caught.value.code == "E002"
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("no_loading")
def test_a_vocabulary_larger_than_the_embedding_is_refused(
    demo_model: Path, tmp_path: Path, certify_models: Certify
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo_model, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 4096, "content": "<|new|>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    outcome = certify_models(folder, demo_model)
    assert "vocabulary_size" in [code for code, _ in reasons(outcome.certificate)]
    _is_refusal(outcome.certificate)


# --- files that cannot be read, text that does not do ----------------------------------------------------------------


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _scribble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a tensor in sight")


def _lose_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _lose_a_shard(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {LAYER: "model-00001-of-00002.safetensors"}}
    write_json(folder / "model.safetensors.index.json", index)


def _lose_the_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()


UNREADABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (_truncate, "truncated or not a safetensors file"),
    "no tensors": (_scribble, "truncated or not a safetensors file"),
    "no weights": (_lose_the_weights, r"no \*\.safetensors"),
    "missing shard": (_lose_a_shard, "model-00001-of-00002.safetensors"),
    "no config.json": (_lose_the_configuration, "no config.json"),
}


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("name", UNREADABLE)
def test_a_checkpoint_that_cannot_be_read_is_a_load_error_in_one_line(
    name: str, demo_model: Path, tmp_path: Path, certify_models: Certify
) -> None:
    harm, message = UNREADABLE[name]
    folder = tmp_path / "model"
    shutil.copytree(demo_model, folder)
    harm(folder)
    with pytest.raises(ModelLoadError, match=message) as caught:
        certify_models(folder, demo_model, out=tmp_path / "runs")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_an_absent_shard_is_a_fail_that_names_its_tensors(
    demo_model: Path, copy_model: Callable[..., Path], certify_models: Certify
) -> None:
    folder = copy_model(demo_model, max_shard_size="500KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    shard = sorted(set(index["weight_map"].values()))[1]
    (folder / shard).unlink()
    outcome = certify_models(folder, demo_model)
    named = {reason["tensor"] for reason in outcome.certificate["verdict"]["reasons"]}
    assert outcome.status == "FAIL"
    assert named and named <= {name for name, file in index["weight_map"].items() if file == shard}


@pytest.mark.usefixtures("no_loading")
def test_too_little_text_stops_before_loading_in_ci(
    demo_model: Path, one_document: Path, certify_models: Certify, tmp_path: Path
) -> None:
    with pytest.raises(PairingError) as caught:
        certify_models(
            demo_model, demo_model, profile="ci", dataset={"file": str(one_document)},
            overrides={"sample": {"preview": 200, "final": 200}}, out=tmp_path / "runs",
        )  # fmt: skip
    assert caught.value.code == "E001"
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("profile", ["dev", "ci"])
def test_an_empty_file_of_text_is_an_error(
    profile: str, demo_model: Path, tmp_path: Path, certify_models: Certify
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("", encoding="utf-8")
    with pytest.raises((DataError, PairingError), match="empty|no documents|no text|0 windows"):
        certify_models(demo_model, demo_model, profile=profile, dataset={"file": str(empty)})


def test_dev_measures_what_fits_and_says_so(
    demo_model: Path, tmp_path: Path, text_file: Path, certify_models: Certify
) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text("\n".join(text_file.read_text(encoding="utf-8").splitlines()[:2]) + "\n", encoding="utf-8")
    wanted = {"sample": {"preview": 40, "final": 40}}
    outcome = certify_models(demo_model, demo_model, dataset={"file": str(short)}, overrides=wanted)
    stats = outcome.certificate["dataset"]["windows"]["stats"]
    assert stats["requested_preview"] == 40 and 0 < stats["actual_preview"] < 40
    used = {split: stats[f"actual_{split}"] for split in ("preview", "final")}
    assert stats["coverage"] == {split: {"used": count} for split, count in used.items()}
    assert any("measured what fits" in note for note in outcome.notes)
    assert gates(outcome.certificate)["sample_size"] == "warn"
    assert outcome.status == "PASS"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"baseline": None, "baseline_report": None}, "neither"),
        ({"baseline": "a", "baseline_report": Path("b")}, "both"),
        ({"baseline": "a", "intent": "destroy"}, "expected preserve or finetune"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CertifyRequest(subject="x", **wrong)


# --- a stored baseline -----------------------------------------------------------------------------------------------

_VOLATILE = {"run_id", "meta", "telemetry", "baseline_ref", "data", "provenance"}


def _numbers(certificate: dict[str, Any]) -> dict[str, Any]:
    """All that two certificates of one pair share: the exact KL needs both models' logits and decides nothing, and notes on
    the cut are those of the command that made it."""
    numbers = reread({key: value for key, value in certificate.items() if key not in (*_VOLATILE, "notes")})
    for name in [name for name in numbers["divergence"] if "exact" in name or name == "kl_coarsened_there"]:
        del numbers["divergence"][name]
    for rows in numbers["evaluation_windows"].values():
        rows.pop("kl_exact_sum")
    return numbers


@pytest.fixture(scope="module")
def stored(passed: CertifyOutcome, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the baseline's run folder, to be tampered with."""
    assert passed.source_report is not None
    folder = tmp_path_factory.mktemp("stored") / "run"
    shutil.copytree(passed.source_report.parent, folder)
    return folder


def test_a_stored_baseline_gives_the_same_numbers_without_its_model(
    demo_model: Path, harmless: Path, certify_models: Certify, passed: CertifyOutcome, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo_model, model)
    first = certify_models(harmless, model, out=tmp_path / "runs")
    shutil.rmtree(model)
    forms = [first.source_report, first.source_report.parent, first.source_report.parent.parent]  # type: ignore[union-attr]
    assert {find_report(form) for form in forms if form} == {first.source_report}
    again = certify_models(harmless, baseline_report=forms[2])
    assert _numbers(again.certificate) == _numbers(first.certificate) == _numbers(passed.certificate)
    assert again.certificate["baseline_ref"]["reused"] is True
    assert first.certificate["baseline_ref"]["reused"] is False
    assert "baseline" in first.timings and again.source_report == first.source_report


def _spoil_token_file(folder: Path) -> None:
    file = folder / "evidence.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def _lose_token_file(folder: Path) -> None:
    (folder / "evidence.safetensors").unlink()


def _edit_report(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        report = read_json(folder / "report.json", "a report")
        change(report)
        write_json(folder / "report.json", report)

    return edit


def _swap_a_token(report: dict[str, Any]) -> None:
    report["evaluation_windows"]["final"]["input_ids"][0][3] += 1


def _forget_windows(report: dict[str, Any]) -> None:
    report["evaluation_windows"] = {}


def _break_evidence(report: dict[str, Any]) -> None:
    report["evidence"]["final"]["loss"] = "none"


BAD_REPORTS: dict[str, tuple[Callable[[Path], None], type[InvarlockError], str]] = {
    "token file altered": (_spoil_token_file, ModelLoadError, "not the file that the baseline's report recorded"),
    "token file lost": (_lose_token_file, ModelLoadError, "is missing"),
    "token swapped": (_edit_report(_swap_a_token), PairingError, "not those it measured"),
    "windows not stored": (_edit_report(_forget_windows), PairingError, "INVARLOCK_STORE_EVAL_WINDOWS=1"),
    "evidence malformed": (_edit_report(_break_evidence), CertificateError, "malformed at final.loss"),
    "no report": (lambda folder: (folder / "report.json").unlink(), ConfigError, "no report.json"),
}


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("name", BAD_REPORTS)
def test_a_stored_baseline_that_is_not_whole_is_refused(
    name: str, stored: Path, harmless: Path, certify_models: Certify, tmp_path: Path
) -> None:
    harm, error, message = BAD_REPORTS[name]
    folder = tmp_path / "run"
    shutil.copytree(stored, folder)
    harm(folder)
    with pytest.raises(error, match=message):
        certify_models(harmless, baseline_report=folder, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_report_made_without_windows_cannot_be_reused(
    demo_model: Path, certify_models: Certify, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INVARLOCK_STORE_EVAL_WINDOWS", "0")
    few = {"overrides": {"sample": {"preview": 2, "final": 2}}}
    first = certify_models(demo_model, demo_model, **few)
    assert first.status == "PASS"  # the certificate itself does not need them
    with pytest.raises(PairingError, match="INVARLOCK_STORE_EVAL_WINDOWS=1"):
        certify_models(demo_model, baseline_report=first.source_report, **few)


# --- the rest --------------------------------------------------------------------------------------------------------


def test_two_runs_differ_in_times_and_run_ids_only(
    demo_model: Path, harmless: Path, certify_models: Certify, passed: CertifyOutcome
) -> None:
    again = certify_models(harmless, demo_model)
    first, second = (json.loads(json.dumps(x.certificate)) for x in (passed, again))
    for certificate in (first, second):
        del certificate["run_id"], certificate["meta"]["created"], certificate["telemetry"]["timings"]
        del certificate["baseline_ref"]["run_id"]
    assert json.dumps(first) == json.dumps(second)


def test_accuracy_is_judged_in_percentage_points(
    demo_model: Path, wrecked: Path, certify_models: Certify, tmp_path: Path
) -> None:
    few = {"metric_kind": "accuracy", "overrides": {"sample": {"preview": 110, "final": 110}}}
    same = certify_models(demo_model, demo_model, **few)
    metric = same.certificate["primary_metric"]
    assert (metric["kind"], metric["unit"], metric["direction"]) == ("accuracy", "accuracy", "higher")
    assert 0.05 < metric["final"] < 1.0
    assert (metric["delta_pp"], metric["ci"], metric["display_ci"]) == (0.0, [0.0, 0.0], [0.0, 0.0])
    assert (same.status, metric["decision"]) == ("PASS", "pass")
    worse = certify_models(wrecked, baseline_report=same.source_report, **few)
    metric = worse.certificate["primary_metric"]
    assert (worse.status, metric["decision"], metric["limit"]) == ("FAIL", "fail", -1.0)
    assert metric["delta_pp"] < -5 and metric["display_ci"][1] < -1.0
    for outcome in (same, worse):
        assert verify_certificate(reread(outcome.certificate)).intact


def test_the_environment_becomes_part_of_the_recorded_policy(
    demo_model: Path, passed: CertifyOutcome, harmless: Path, certify_models: Certify, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INVARLOCK_PM_ACCEPTANCE_MAX", "1.000001")
    outcome = certify_models(harmless, baseline_report=passed.source_report)
    certificate = reread(outcome.certificate)
    assert certificate["primary_metric"]["limit"] == 1.000001
    assert certificate["policy_provenance"]["overrides"]["metrics"]["pm_ratio"]["limit"] == 1.000001
    assert outcome.status != "PASS"
    monkeypatch.delenv("INVARLOCK_PM_ACCEPTANCE_MAX")
    assert verify_certificate(certificate).intact


def test_as_many_replicates_as_the_level_needs_are_drawn_and_recorded(passed: CertifyOutcome) -> None:
    assert FEW["bootstrap"]["replicates"] < 200 == passed.certificate["primary_metric"]["replicates"]
