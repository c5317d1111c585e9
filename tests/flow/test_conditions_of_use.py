"""Models are measured as they are used: with the special tokens that their tokenizer puts around a text, unscored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from certification import SEQ_LEN, Certify
from invarlock.certificate.verify import verify_certificate
from invarlock.evidence.windows import IGNORED, Window, Windows
from invarlock.flow.certify import CertifyOutcome

BOS = "<|endoftext|>"


@pytest.fixture(scope="module")
def with_bos(llama_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The small Llama with a tokenizer that puts one token before each text, and that token's id."""
    folder = tmp_path_factory.mktemp("bos") / "model"
    shutil.copytree(llama_model, folder)
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    number = next(token["id"] for token in state["added_tokens"] if token["content"] == BOS)
    special, text = {"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    state["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [number], "tokens": [BOS]}},
    }
    path.write_text(json.dumps(state), encoding="utf-8")
    return folder, number


@pytest.fixture(scope="module")
def destroyed(with_bos: tuple[Path, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model whose row of that token is noise of the same size."""
    source, number = with_bos
    folder = tmp_path_factory.mktemp("destroyed") / "model"
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    noise = torch.randn(table.shape[1], generator=torch.Generator().manual_seed(1))
    table[number] = (noise / noise.norm() * table[number].float().norm()).to(table.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
def test_what_every_request_begins_with_is_measured(
    with_bos: tuple[Path, int], destroyed: Path, certify_models: Certify
) -> None:
    """No text holds the token, and every window begins with it: its row is seen, unscored, and can be left out."""
    baseline, number = with_bos
    found = certify_models(destroyed, baseline).certificate
    assert found["data"]["prefix"] == [number] and found["data"]["suffix"] == []
    bare = certify_models(destroyed, baseline, dataset={"add_special_tokens": False}).certificate
    assert bare["data"]["prefix"] == []
    seen, unseen = (certificate["divergence"]["kl_mean"] for certificate in (found, bare))
    assert seen > 5 * unseen, "of a tied row the head alone is seen without the token"
    scored = [sum(rows["tokens"]) for rows in found["evaluation_windows"].values()]
    assert scored == [sum(rows["tokens"]) for rows in bare["evaluation_windows"].values()]
    contracts = [certificate["provenance"]["contracts"]["subject"]["windows"] for certificate in (found, bare)]
    assert contracts[0] != contracts[1]


@pytest.mark.slow
def test_a_stored_baseline_keeps_what_it_was_measured_with(
    with_bos: tuple[Path, int], destroyed: Path, certify_models: Certify
) -> None:
    baseline, number = with_bos
    first = certify_models(baseline, baseline)
    assert first.status == "PASS" and first.certificate["primary_metric"]["ratio_vs_baseline"] == 1.0
    again = certify_models(destroyed, baseline_report=first.source_report).certificate
    assert again["data"]["prefix"] == [number] and again["divergence"]["kl_mean"] > 1e-4
    assert again["provenance"]["provider_digest"] == first.certificate["provenance"]["provider_digest"]
    assert verify_certificate(again).intact


@pytest.mark.slow
def test_a_masked_model_sees_both_ends_and_its_windows_fit(
    model_folder: Callable[[str], Path], certify_models: Certify
) -> None:
    bert = model_folder("bert")
    asked = certify_models(bert, bert, dataset={"seq_len": 128}).certificate
    assert (asked["data"]["prefix"], asked["data"]["suffix"]) == ([2], [3])
    assert asked["data"]["seq_len"] == 126
    assert asked["verdict"]["status"] == "PASS"


def test_special_tokens_are_shown_and_never_scored() -> None:
    plain = Window("w", "d", (5, 6, 7))
    shown = Window("w", "d", (5, 6, 7), prefix=(1,), suffix=(2,)).dressed()
    assert shown.input_ids == (1, 5, 6, 7, 2)
    assert shown.labels == (IGNORED, IGNORED, 6, 7, IGNORED)
    assert plain.dressed() is plain
    hidden = Window("w", "d", (5, 4, 7), labels=(IGNORED, 6, IGNORED), prefix=(1,), suffix=(2,)).dressed()
    assert hidden.labels == (IGNORED, IGNORED, 6, IGNORED, IGNORED)


@pytest.mark.parametrize(("task", "around"), [("causal", ((1,), ())), ("mlm", ((1,), (2,))), ("seq2seq", ((), ()))])
def test_only_what_a_task_uses_stands_around_its_windows(task: str, around: tuple[tuple[int, ...], ...]) -> None:
    windows = Windows((Window("a", "a", (5, 6)),), (Window("b", "b", (7, 8)),), 2, (1, 1))
    used = windows.surrounded((1,), (2,)).used_by(task)
    assert (used.prefix, used.suffix) == around
    assert Windows.from_dict(used.to_dict()).digest() == used.digest()
    assert (used.digest() == windows.digest()) is (around == ((), ()))


def test_lengths_are_of_the_content(with_bos: tuple[Path, int], run_windows: Callable[..., object]) -> None:
    parts = run_windows(with_bos[0], SEQ_LEN)
    assert [part.prefix for part in parts] == [[with_bos[1]]] * 2  # type: ignore[attr-defined]
    assert max(map(len, parts[0].input_ids)) == SEQ_LEN  # type: ignore[index]


@pytest.fixture
def run_windows(text_file: Path) -> Callable[..., object]:
    from transformers import AutoTokenizer

    from invarlock.eval.data import get_provider

    def cut(model: Path, seq_len: int) -> object:
        provider = get_provider("local_jsonl", file=str(text_file))
        return provider.windows(AutoTokenizer.from_pretrained(model), preview_n=4, final_n=4, seq_len=seq_len)

    return cut


# -- a stored baseline's tokenizer ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(
    llama_model: Path, certify_models: Certify, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A baseline measured on text that holds one document twice; its own text file stands beside its report."""
    folder = tmp_path_factory.mktemp("stored")
    lines = text_file.read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "text.jsonl").write_text("".join([*lines, lines[0]]), encoding="utf-8")
    made = certify_models(llama_model, llama_model, dataset={"file": str(folder / "text.jsonl")}).source_report
    assert made is not None
    shutil.copytree(made if made.is_dir() else made.parent, folder / "run")
    return folder


def _stored(certify_models: Certify, folder: Path, subject: Path) -> CertifyOutcome:
    return certify_models(
        subject, baseline_report=folder / "run", dataset={"file": str(folder / "text.jsonl")}, cache=False
    )


@pytest.mark.slow
def test_a_stored_baselines_documents_are_encoded_again_with_the_subjects_tokenizer(
    stored: Path, llama_model: Path, certify_models: Certify, tmp_path: Path
) -> None:
    same = _stored(certify_models, stored, llama_model)
    encoded = same.certificate["structure"]["subject_usage"]["encoded"]
    assert same.status == "PASS" and encoded["documents"] > 20 and encoded["differing"] == 0
    assert any("x text with the content of another" in note for note in same.notes)
    subject = Path(shutil.copytree(llama_model, tmp_path / "subject"))
    path = subject / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    state["normalizer"] = {"type": "Replace", "pattern": {"String": "yield"}, "content": "return"}
    path.write_text(json.dumps(state), encoding="utf-8")
    found = _stored(certify_models, stored, subject).certificate
    encoded = found["structure"]["subject_usage"]["encoded"]
    assert found["verdict"]["status"] == "FAIL" and 0 < encoded["differing"] < encoded["documents"]
    reason = next(r["message"] for r in found["verdict"]["reasons"] if r["code"] == "E002")
    assert f"{encoded['differing']} of {encoded['documents']} documents" in reason
    assert verify_certificate(found).intact


@pytest.mark.slow
def test_text_that_is_no_longer_at_hand_is_said_and_nothing_is_shown_as_encoded(
    stored: Path, llama_model: Path, certify_models: Certify
) -> None:
    path = stored / "text.jsonl"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("yield", "return"), encoding="utf-8")
    try:
        found = _stored(certify_models, stored, llama_model)
    finally:
        path.write_text(text, encoding="utf-8")
    assert found.status == "PASS" and "encoded" not in found.certificate["structure"]["subject_usage"]
    assert any("not encoded with the subject's tokenizer" in note for note in found.notes)
