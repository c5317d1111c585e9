"""The forward loop, held against Hugging Face's own loss and against itself under other batches and paddings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from invarlock.core.exceptions import DataError
from invarlock.eval.sources.base import Glance, Scores, score_all, scored_tokens
from invarlock.eval.sources.torch_model import TorchSource
from invarlock.evidence.windows import IGNORED, Window, mask_tokens, windows_from_calibration

CLOSE = 1e-5


def _windows(count: int = 6, length: int = 24, vocabulary: int = 90) -> list[Window]:
    generator = torch.Generator().manual_seed(11)
    rows = torch.randint(1, vocabulary, (count, length), generator=generator).tolist()
    return [Window(f"w{i}", f"d{i}", tuple(row)) for i, row in enumerate(rows)]


def _scores(model: Any, windows: Any, task: Any = "causal", batch_tokens: int = 2048, **options: Any) -> Scores:
    return score_all(TorchSource(model, task, batch_tokens=batch_tokens).score(windows, **options), len(windows))


def _tiny(name: str, **options: Any) -> Any:
    torch.manual_seed(1)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if name in ("Gemma2", "Cohere", "Granite", "Llama", "Phi", "GPTNeoX"):
        config = getattr(transformers, f"{name}Config")(**{**sizes, **options})
        return getattr(transformers, f"{name}ForCausalLM")(config).eval()
    if name == "Bert":
        del sizes["num_key_value_heads"]
        return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **options)).eval()
    if name == "T5":
        config = transformers.T5Config(vocab_size=96, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8)
        config.decoder_start_token_id = config.pad_token_id = 0
        return transformers.T5ForConditionalGeneration(config).eval()
    config = transformers.GPT2Config(vocab_size=96, n_positions=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=0)
    config.eos_token_id = 0
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="session")
def trained(
    demo_model: Path, llama_model: Path, load_model: Callable[[Path], Any], calibration: list[dict[str, Any]]
) -> dict[str, Any]:
    windows = windows_from_calibration(calibration, None, None).all
    return {"gpt2": (load_model(demo_model), windows), "llama": (load_model(llama_model), windows)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_losses_equal_the_models_own_on_trained_models(trained: dict[str, Any], name: str) -> None:
    model, windows = trained[name]
    source = TorchSource(model)
    result = score_all(source.score(windows), len(windows))
    assert source.used_shortcut
    for window, loss, tokens in zip(windows, result.loss, result.tokens, strict=True):
        ids = torch.tensor([window.input_ids])
        with torch.no_grad():
            expected = float(model(input_ids=ids, labels=ids).loss)
        assert loss == pytest.approx(expected, rel=CLOSE)
        assert tokens == len(window.input_ids) - 1 == scored_tokens(window, "causal")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "Llama", "Gemma2", "Cohere", "Granite", "Phi", "GPTNeoX"])
def test_losses_equal_the_models_own_whatever_follows_the_output_layer(name: str) -> None:
    options = {"Granite": {"logits_scaling": 8.0}, "Gemma2": {"head_dim": 8}}.get(name, {})
    model = _tiny(name, **options)
    source = TorchSource(model)
    result = score_all(source.score(_windows()), 6)
    for window, loss in zip(_windows(), result.loss, strict=True):
        ids = torch.tensor([window.input_ids])
        with torch.no_grad():
            assert loss == pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=CLOSE)
    assert source.used_shortcut == (name not in ("Gemma2", "Cohere", "Granite"))


def test_a_soft_cap_is_never_skipped_however_small_the_logits_are() -> None:
    model = _tiny("Gemma2", head_dim=8, final_logit_softcapping=30.0)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.01)
    source = TorchSource(model)
    list(source.score(_windows(2)))
    assert not source.used_shortcut


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "Llama", "Gemma2", "Bert", "T5"])
def test_the_batch_size_moves_no_number(name: str) -> None:
    model = _tiny(name, **({"head_dim": 8} if name == "Gemma2" else {}))
    windows, task = _for_task(name)
    first = _scores(model, windows, task=task, batch_tokens=1, keep_reference=True)
    for batch in (8, 64):
        tokens = batch * (2 if name == "T5" else 1) * 24
        other = _scores(model, windows, task=task, batch_tokens=tokens, reference=first.reference)
        assert other.loss == pytest.approx(first.loss, rel=CLOSE)
        assert (other.tokens, other["flips"]) == (first.tokens, [0] * len(windows))
        assert max(other["kl_max"]) < CLOSE


def _for_task(name: str) -> tuple[list[Window], Any]:
    windows = _windows(9)
    if name == "Bert":
        data = windows_from_calibration([{"input_ids": w.input_ids} for w in windows], 8, 1)
        return list(mask_tokens(data, 95, [0], seed=3).all), "mlm"
    if name == "T5":
        return [replace(w, labels=(*w.input_ids[:9], IGNORED)) for w in windows], "seq2seq"
    return windows, "causal"


@pytest.mark.parametrize("name", ["gpt2", "Llama", "Bert", "T5"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_never_counts(name: str, side: str) -> None:
    windows, task = _for_task(name)
    model = _tiny(name)
    left, right = {"left": (7, 0), "right": (0, 7), "both": (3, 5)}[side]

    def padded(window: Window, index: int) -> Window:
        if index % 2:
            return window
        ids = (77,) * left + window.input_ids + (77,) * right
        mask = (0,) * left + (1,) * len(window.input_ids) + (0,) * right
        labels = window.labels
        if labels is not None and task != "seq2seq":
            labels = (5,) * left + labels + (5,) * right
        return replace(window, input_ids=ids, mask=mask, labels=labels)

    plain = _scores(model, windows, task=task)
    other = _scores(model, [padded(w, i) for i, w in enumerate(windows)], task=task)
    assert other.loss == pytest.approx(plain.loss, rel=CLOSE)
    assert other.tokens == plain.tokens


def test_masked_tokens_inside_a_window_count_neither_as_targets_nor_as_sources() -> None:
    (window,) = _windows(1, 10)
    hole = replace(window, mask=(1, 1, 1, 1, 0, 0, 1, 1, 1, 1))
    assert scored_tokens(hole, "causal") == 3 + 3
    other = replace(hole, input_ids=(*window.input_ids[:4], 50, 51, *window.input_ids[6:]))
    model = _tiny("gpt2")
    first, second = (_scores(model, [w]).loss for w in (hole, other))
    assert first == pytest.approx(second, rel=CLOSE)


def test_labels_choose_what_is_scored() -> None:
    (window,) = _windows(1, 12)
    labels = (IGNORED,) * 6 + window.input_ids[6:]
    model = _tiny("gpt2")
    result = _scores(model, [replace(window, labels=labels)])
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([window.input_ids]), labels=torch.tensor([labels])).loss
    assert result.tokens == [6]
    assert result.loss[0] == pytest.approx(float(expected), rel=CLOSE)


def test_sequence_to_sequence_losses_equal_the_models_own() -> None:
    model = _tiny("T5")
    windows, task = _for_task("T5")
    result = _scores(model, windows, task=task)
    for window, loss in zip(windows, result.loss, strict=True):
        with torch.no_grad():
            out = model(input_ids=torch.tensor([window.input_ids]), labels=torch.tensor([window.labels]))
        assert loss == pytest.approx(float(out.loss), rel=CLOSE)


def test_masked_losses_equal_the_models_own() -> None:
    model = _tiny("Bert")
    windows, task = _for_task("Bert")
    result = _scores(model, windows, task=task)
    for window, loss in zip(windows, result.loss, strict=True):
        with torch.no_grad():
            out = model(input_ids=torch.tensor([window.input_ids]), labels=torch.tensor([window.labels]))
        assert loss == pytest.approx(float(out.loss), rel=CLOSE)


@pytest.mark.parametrize(
    ("change", "task", "named"),
    [
        ({"mask": (0,) * 24}, "causal", "no scored token"),
        ({"labels": (IGNORED,) * 24}, "causal", "no scored token"),
        ({"input_ids": (1,)}, "causal", "no scored token"),
        ({"labels": (1, 2)}, "causal", "2 labels for 24 tokens"),
        ({}, "mlm", "no labels.*mask_tokens"),
        ({}, "seq2seq", "no labels"),
        ({"input_ids": (1, 2, 96)}, "causal", "token id 96, but the model knows 0 to 95"),
        ({"input_ids": (1, -2)}, "causal", "token id -2"),
    ],
)
def test_windows_that_cannot_be_scored_are_refused_by_name(change: dict[str, Any], task: Any, named: str) -> None:
    windows = [*_windows(2), replace(_windows(1)[0], id="odd", **change)]
    with pytest.raises(DataError, match=named):
        _scores(_tiny("gpt2"), windows if task == "causal" else windows[2:], task=task)
    with pytest.raises(DataError, match="none given"):
        _scores(_tiny("gpt2"), [])


def test_damage_shows_as_nan_in_the_windows_that_it_reaches() -> None:
    model = _tiny("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight[20] = float("nan")
    windows = [replace(w, input_ids=w.input_ids[: 12 if i else 24]) for i, w in enumerate(_windows(3))]
    result = _scores(model, windows)
    assert [loss != loss for loss in result.loss] == [True, False, False]


def test_accuracy_counts_the_top_token_and_gives_nothing_for_indifference() -> None:
    model = _tiny("gpt2")
    (window,) = _windows(1)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([window.input_ids])).logits[0, :-1]
    expected = (logits.argmax(-1) == torch.tensor(window.input_ids[1:])).float().mean()
    assert _scores(model, [window], correct=True)["correct"] == pytest.approx([float(expected)])
    mute = copy.deepcopy(model)
    with torch.no_grad():
        mute.transformer.wte.weight.zero_()
    assert _scores(mute, [window], correct=True)["correct"] == [0.0]


def test_progress_reaches_the_end() -> None:
    seen: list[int] = []
    source = TorchSource(_tiny("gpt2"), batch_tokens=48)
    score_all(source.score(_windows(5)), 5, seen.append)
    assert len(seen) == 3 and seen == sorted(seen)


def test_the_first_windows_come_in_batches_of_their_own_before_all_others(trained: dict[str, Any]) -> None:
    model, windows = trained["llama"]
    first = {1, len(windows) - 1}
    batches = [part.indices for part in TorchSource(model).score(windows, first=first)]
    assert sorted(batches[0]) == sorted(first) or {*batches[0], *batches[1]} == first
    assert sorted(i for batch in batches for i in batch) == list(range(len(windows)))
    usual = _scores(model, windows)
    assert _scores(model, windows, first=first).loss == pytest.approx(usual.loss, rel=CLOSE)


@pytest.mark.parametrize("ends", [True, False])
def test_a_glance_is_asked_once_about_its_windows_in_their_order_and_may_end_all(
    ends: bool, trained: dict[str, Any]
) -> None:
    model, windows = trained["llama"]
    whole, asked = _scores(model, windows), []
    glance = Glance([2, 0, 5], lambda columns: bool(asked.append(columns)) or ends)
    scored = TorchSource(model).score(windows, first=glance.windows)
    found = score_all(scored, len(windows), glance=glance)
    assert len(asked) == 1 and asked[0]["loss"] == pytest.approx([whole.loss[i] for i in glance.windows], rel=CLOSE)
    assert found.ended is ends
    assert found.loss == (asked[0]["loss"] if ends else pytest.approx(whole.loss, rel=CLOSE))
