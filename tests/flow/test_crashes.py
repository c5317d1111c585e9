"""Checkpoints and requests that ended in an error of somebody else's: each class is measured, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from invarlock.adapters import HF_Auto_Adapter
from invarlock.adapters.hf import HF_Causal_Adapter, HF_MLM_Adapter, HF_Seq2Seq_Adapter
from invarlock.checkpoints.behaviour import usable_length
from invarlock.core.exceptions import AdapterError, ConfigError
from invarlock.flow.job import Job, resolved_metric
from invarlock.flow.sampling import cut_windows
from invarlock.policy.resolve import resolve_policy
from invarlock.stats.power import minimum_detectable_effect
from invarlock.stats.studentised import studentised_interval


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (("RobertaConfig", {"max_position_embeddings": 514, "pad_token_id": 1}), 512),
        (("CamembertConfig", {"max_position_embeddings": 514, "pad_token_id": 1}), 512),
        (("XLNetConfig", {}), None),
        (("T5Config", {}), None),
        (("BartConfig", {"max_position_embeddings": 1024}), 1024),
        (("GPT2Config", {"n_positions": 96}), 96),
        (("BloomConfig", {}), None),
    ],
)
def test_how_many_tokens_a_window_may_have_follows_the_way_an_architecture_counts(
    config: tuple[str, dict[str, Any]], longest: int | None
) -> None:
    import transformers

    name, values = config
    assert usable_length(getattr(transformers, name)(**values)) == longest


@pytest.mark.parametrize("backbone", ["llama", "qwen2"])
def test_a_model_of_images_and_text_is_not_taken_for_one_from_text_to_text(tmp_path: Path, backbone: str) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlavaForConditionalGeneration"],
                "model_type": "llava",
                "text_config": {
                    "model_type": backbone,
                    "hidden_size": 32,
                    "num_attention_heads": 4,
                    "num_hidden_layers": 1,
                },
                "vision_config": {
                    "model_type": "clip_vision_model",
                    "hidden_size": 32,
                    "num_attention_heads": 4,
                    "num_hidden_layers": 1,
                },
            }
        )
    )
    with pytest.raises(AdapterError, match="save its text backbone as a causal model"):
        HF_Auto_Adapter().select(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        ("ppl_mlm", HF_Causal_Adapter),
        ("ppl_seq2seq", HF_Causal_Adapter),
        ("ppl_causal", HF_MLM_Adapter),
        ("accuracy", HF_Seq2Seq_Adapter),
        ("vqa_accuracy", HF_MLM_Adapter),
    ],
)
def test_a_metric_of_another_kind_of_model_is_refused(kind: str, adapter: type[Any]) -> None:
    with pytest.raises(ConfigError, match=f"the metric is {kind}.*use auto or ppl_"):
        resolved_metric(kind, adapter())


@pytest.mark.parametrize("kind", ["auto", "ppl_causal", "accuracy", "vqa_accuracy"])
def test_a_metric_of_the_kind_of_the_model_is_taken(kind: str) -> None:
    assert resolved_metric(kind, HF_Causal_Adapter()).task == "causal"


def _job(adapter: Any, kind: str = "auto") -> Job:
    policy = resolve_policy("balanced", "dev", overrides={"sample": {"preview": 2, "final": 2}})
    return Job(policy, adapter, [], "cpu", resolved_metric(kind, adapter))


def _side(tokenizer: Any) -> Any:
    return SimpleNamespace(id="a model", tokenizer=tokenizer, max_length=64)


@pytest.mark.slow
def test_a_masked_model_without_a_mask_token_is_refused(demo_tokenizer: Any) -> None:
    assert demo_tokenizer.mask_token_id is None
    with pytest.raises(ConfigError, match="the tokenizer of a model has no mask token"):
        cut_windows(_job(HF_MLM_Adapter()), _side(demo_tokenizer), {"provider": "synthetic", "seq_len": 32})


@pytest.mark.parametrize(
    ("adapter", "kind", "data", "message"),
    [
        (HF_MLM_Adapter, "auto", {"provider": "seq2seq", "task": "reverse"}, "gives pairs, and a model fills in"),
        (HF_Causal_Adapter, "vqa_accuracy", {"provider": "synthetic"}, "vqa_accuracy scores answers"),
    ],
)
def test_text_where_pairs_are_needed_and_pairs_where_text_is_are_refused(
    demo_tokenizer: Any, adapter: type[Any], kind: str, data: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        cut_windows(_job(adapter(), kind), _side(demo_tokenizer), data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ppl_causal", "accuracy", "vqa_accuracy"])
def test_pairs_are_measured_with_a_causal_model(
    demo_tokenizer: Any, kind: str, demo_model: Path, load_model: Any
) -> None:
    job = _job(HF_Causal_Adapter(), kind)
    job.windows = cut_windows(job, _side(demo_tokenizer), {"provider": "seq2seq", "task": "reverse", "seq_len": 48})
    scores = job.score(load_model(demo_model), job.windows.all)
    targets = [sum(label >= 0 for label in window.labels or ()) for window in job.windows.all]
    assert list(scores.tokens) == targets
    assert min(targets) > 0 and max(targets) < 48


def test_one_document_that_outweighs_all_others_has_no_smallest_effect_and_no_infinite_one() -> None:
    values, weights = np.r_[0.5, np.full(9, 0.01)], np.r_[1e9, np.ones(9)]
    interval = studentised_interval(values, weights, list(range(10)), replicates=100)
    found = minimum_detectable_effect(interval)
    assert found is None or np.isfinite(found)
