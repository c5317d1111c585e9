"""How a checkpoint is used, read from its files: tokenizer, roles of tokens, chat template, sampling, usable length."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from invarlock.checkpoints.behaviour import behaviour, load_config, usable_length, usage
from invarlock.checkpoints.tokenizer import encoded_differently, tokenizer_facts
from invarlock.core.exceptions import ModelLoadError
from invarlock.evidence.model import Structure, TensorFacts
from invarlock.guards import InvariantsGuard

MODELS = ["llama", "bert", "neox", "qwen", "t5", "demo"]
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def tokenizer(request: pytest.FixtureRequest, demo_model: Path, model_folder: Callable[[str], Path]) -> Any:
    name = request.param
    return AutoTokenizer.from_pretrained(demo_model if name == "demo" else model_folder(name), local_files_only=True)


def _edit(path: Path, change: Change) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def _as_older_releases_wrote(folder: Path) -> None:
    """Merges as texts, no null settings, roles and flags in files of their own."""

    def rewrite(data: dict[str, Any]) -> None:
        data["model"]["merges"] = [" ".join(merge) for merge in data["model"]["merges"]]
        data["model"] = {key: value for key, value in data["model"].items() if value is not None}
        data["truncation"] = {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}

    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    _edit(folder / "tokenizer.json", rewrite)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    roles = {key: value for key, value in settings.items() if key.endswith("_token")}
    extra = settings.pop("extra_special_tokens", None)
    if extra:
        settings["additional_special_tokens"] = roles["additional_special_tokens"] = extra
    (folder / "special_tokens_map.json").write_text(json.dumps(roles), encoding="utf-8")
    settings["added_tokens_decoder"] = {str(t.pop("id")): t for t in added}
    settings.pop("backend")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", MODELS, indirect=True)
def test_another_form_of_the_same_tokenizer_has_the_same_digest(tokenizer: Any, tmp_path: Path) -> None:
    facts = tokenizer_facts(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_facts(AutoTokenizer.from_pretrained(tmp_path)) == facts
    _as_older_releases_wrote(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_facts(again) == facts
    again("a text that is cut and padded", truncation=True, padding="max_length", max_length=4)
    assert tokenizer_facts(again) == facts
    assert encoded_differently(tokenizer, again, ["some text", "def f(x): return x"] * 40) == []


def _lowercase(data: dict[str, Any]) -> None:
    data["normalizer"] = {"type": "Lowercase"}


def _no_specials(data: dict[str, Any]) -> None:
    data["post_processor"] = None


def _swapped_ids(data: dict[str, Any]) -> None:
    words = data["model"]["vocab"]
    words["Ġzip"], words["Ġthe"] = words["Ġthe"], words.get("Ġzip", 4000)


def _fewer_merges(data: dict[str, Any]) -> None:
    data["model"]["merges"] = data["model"]["merges"][:-1]


def _other_decoder(data: dict[str, Any]) -> None:
    data["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}


def _strips(data: dict[str, Any]) -> None:
    data["added_tokens"][-1]["lstrip"] = True


def _one_more_added(data: dict[str, Any]) -> None:
    data["added_tokens"].append({**data["added_tokens"][-1], "id": 300, "content": "Ġa"})


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [_lowercase, _no_specials, _swapped_ids, _fewer_merges, _other_decoder, _strips, _one_more_added],
    ids=lambda change: change.__name__.strip("_"),
)
@pytest.mark.parametrize("tokenizer", ["bert"], indirect=True)
def test_every_part_of_a_tokenizer_is_in_the_digest(tokenizer: Any, change: Change, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    _edit(tmp_path / "tokenizer.json", change)
    assert tokenizer_facts(AutoTokenizer.from_pretrained(tmp_path))[0] != tokenizer_facts(tokenizer)[0]


@pytest.mark.parametrize("tokenizer", ["llama"], indirect=True)
def test_the_first_text_that_is_encoded_otherwise_is_found(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    _edit(tmp_path / "tokenizer.json", _lowercase)
    other = AutoTokenizer.from_pretrained(tmp_path)
    plain = ["all in small letters"] * 70
    assert encoded_differently(tokenizer, other, plain) == []
    assert encoded_differently(tokenizer, other, ["With A Capital", *plain, "And Another"]) == [0, len(plain) + 1]


@pytest.mark.parametrize("tokenizer", ["llama"], indirect=True)
def test_a_tokenizer_with_code_of_its_own_is_encoded_with_whatever_its_state(tokenizer: Any, tmp_path: Path) -> None:
    class Replacing(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: Any, **options: Any) -> Any:
            texts = [text] if isinstance(text, str) else text
            changed = [one.replace("zebra", "horse") for one in texts]
            return super().__call__(changed[0] if isinstance(text, str) else changed, **options)

    tokenizer.save_pretrained(tmp_path)
    other = Replacing.from_pretrained(tmp_path)
    assert tokenizer_facts(other)[0] == tokenizer_facts(tokenizer)[0]  # no probe meets such a word
    assert encoded_differently(tokenizer, other, ["a horse", "a zebra"]) == [1]


# -- usage and what is said of it -------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
GENERATION = {"eos_token_id": [0, 5], "bos_token_id": 0, "temperature": 0.7, "do_sample": True, "stop_strings": "User:"}


@pytest.fixture
def chat(llama_model: Path, tmp_path: Path) -> Path:
    """A chat model's small files: stop tokens, template, sampling; no weights."""
    folder = tmp_path / "chat"
    shutil.copytree(llama_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION), encoding="utf-8")
    _edit(folder / "tokenizer_config.json", lambda data: data.update(chat_template=TEMPLATE))
    return folder


def _stats(folder: Path, tokenized: bool = True) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder) if tokenized else None
    config = load_config(folder)
    rows = [TensorFacts(name="w", shape=[1], dtype="F32", digest="d")]
    structure, facts = Structure(source="file", tensors=rows), tokenizer_facts(tokenizer)
    return InvariantsGuard.stats_from(structure, behaviour(config), *facts, usage(folder, config, tokenizer))


def _judge(old: dict[str, Any], new: dict[str, Any], intent: str = "preserve") -> dict[str, Any]:
    guard = InvariantsGuard()
    return guard.judge(guard.pair(old, new), {"intent": intent})


def _copy(chat: Path) -> Path:
    return Path(shutil.copytree(chat, chat.parent / "subject"))


@pytest.mark.slow
def test_what_a_save_rewrites_is_no_finding(chat: Path) -> None:
    from transformers import GenerationConfig

    subject = _copy(chat)
    AutoTokenizer.from_pretrained(chat).save_pretrained(subject)
    GenerationConfig.from_pretrained(chat).save_pretrained(subject)
    load_config(chat).save_pretrained(subject)
    _edit(subject / "tokenizer_config.json", lambda data: data.pop("chat_template", None))
    (subject / "chat_template.jinja").write_text(TEMPLATE + "\n", encoding="utf-8")
    verdict = _judge(_stats(chat), _stats(subject))
    assert verdict["passed"] and not verdict["warnings"] and verdict["message"] == "1 tensors agree"


@pytest.mark.slow
def test_a_generation_config_made_from_the_configuration_is_no_finding(llama_model: Path, tmp_path: Path) -> None:
    from transformers import GenerationConfig

    subject = Path(shutil.copytree(llama_model, tmp_path / "subject"))
    GenerationConfig.from_model_config(load_config(llama_model)).save_pretrained(subject)
    assert not _judge(_stats(llama_model), _stats(subject))["warnings"]


def _drop(folder: Path, file: str, key: str) -> None:
    _edit(folder / file, lambda data: data.pop(key))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "eos in config": (
        lambda f: _edit(f / "config.json", lambda data: data.update(eos_token_id=7)),
        "eos_token_id is 7 (config.json); the baseline has 0",
    ),
    "stop token lost": (
        lambda f: _edit(f / "generation_config.json", lambda data: data.update(eos_token_id=0)),
        "eos_token_id is 0 (generation_config.json); the baseline has [0, 5]",
    ),
    "file lost": (lambda f: (f / "generation_config.json").unlink(), "eos_token_id is 0 (generation_config.json)"),
    "eos gone": (lambda f: _drop(f, "generation_config.json", "eos_token_id"), "eos_token_id is None"),
    "tokenizer's eos": (lambda f: _drop(f, "tokenizer_config.json", "eos_token"), "eos_token is None (tokenizer)"),
    "template lost": (lambda f: _drop(f, "tokenizer_config.json", "chat_template"), "the chat template is none"),
    "stop strings lost": (
        lambda f: _drop(f, "generation_config.json", "stop_strings"),
        "stop_strings is None (generation_config.json); the baseline has 'User:'",
    ),
    "stop list cut": (
        lambda f: _edit(f / "generation_config.json", lambda data: data.update(eos_token_id=[5])),
        "eos_token_id is 5 (generation_config.json); the baseline has [0, 5]",
    ),
    "start in config": (
        lambda f: _edit(f / "config.json", lambda data: data.update(bos_token_id=9)),
        "bos_token_id is 9 (config.json); the baseline has 0",
    ),
    "template changed": (
        lambda f: _edit(f / "tokenizer_config.json", lambda data: data.update(chat_template="{{ messages }}")),
        "the chat template is '{{ messages }}'",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_changed_use_fails_by_name_and_warns_by_name_under_finetune(chat: Path, kind: str) -> None:
    subject, (damage, said) = _copy(chat), DAMAGE[kind]
    damage(subject)
    old, new = _stats(chat), _stats(subject)
    verdict = _judge(old, new)
    named = [finding["message"] for finding in verdict["errors"]]
    assert not verdict["passed"] and any(message.startswith(said) for message in named), named
    soft = _judge(old, new, "finetune")
    assert soft["passed"] and "tensors agree" not in soft["message"]
    assert any(f["message"].startswith(said) for f in soft["warnings"])
    assert soft["message"].startswith(soft["warnings"][0]["message"])


@pytest.mark.slow
def test_sampling_and_a_role_that_is_new_are_notes(chat: Path) -> None:
    subject = _copy(chat)
    changed = {"temperature": 1.5, "pad_token_id": 0, "sequence_bias": [[[3], -1.0]], "guidance_scale": 2.0}
    _edit(subject / "generation_config.json", lambda data: data.update(changed, top_k=None, max_length=20))
    verdict = _judge(_stats(chat), _stats(subject))
    assert verdict["passed"] and {f["key"] for f in verdict["warnings"]} == changed.keys()


@pytest.mark.slow
def test_a_template_is_the_one_that_the_tokenizer_loads(chat: Path) -> None:
    """A list of named ones, a file beside, a folder of further ones: what is loaded counts, and not where it stands."""
    subject = _copy(chat)
    _edit(subject / "tokenizer_config.json", lambda data: data.update(chat_template="{{ stale }}"))
    (subject / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    assert not _judge(_stats(chat), _stats(subject))["warnings"]
    listed = [{"name": "default", "template": TEMPLATE}, {"name": "tools", "template": "{{ tools }}"}]
    _edit(chat / "tokenizer_config.json", lambda data: data.update(chat_template=listed))
    further = subject / "additional_chat_templates"
    further.mkdir()
    (further / "tools.jinja").write_text("{{ tools }}", encoding="utf-8")
    assert not _judge(_stats(chat), _stats(subject))["warnings"]
    shutil.rmtree(further)
    assert [f["code"] for f in _judge(_stats(chat), _stats(subject))["errors"]] == ["chat_template"]


@pytest.mark.slow
def test_a_subject_without_a_tokenizer_is_said_not_to_be_evaluated(chat: Path) -> None:
    verdict = _judge(_stats(chat), _stats(chat, tokenized=False))
    assert [f["code"] for f in verdict["warnings"]] == ["tokenizer_not_evaluated"]
    assert verdict["passed"] and "not evaluated" in verdict["message"]


@pytest.mark.slow
def test_a_baseline_of_an_earlier_release_is_held_to_what_it_recorded(chat: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat)
    old = {**_stats(chat), "usage": None, "tokenizer_digest": tokenizer_facts(tokenizer, version=1)[0]}
    assert _judge(old, _stats(chat))["warnings"] == [] and _judge(old, _stats(chat))["passed"]
    foreign = {**old, "tokenizer_digest": "0" * 32}
    assert [f["code"] for f in _judge(foreign, _stats(chat))["errors"]] == ["E002"]
    both = {**old, "behaviour": {**old["behaviour"], "max_position_embeddings": 2048}}
    assert [f["key"] for f in _judge(old, both)["errors"]] == ["max_position_embeddings"]  # as it was judged then


def test_a_broken_generation_config_is_named(chat: Path) -> None:
    (chat / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelLoadError, match="generation_config.json is not JSON"):
        usage(chat, load_config(chat), None)


@pytest.mark.slow
def test_two_architectures_are_said_to_be_two_once(chat: Path, demo_model: Path) -> None:
    old, new = _stats(chat), _stats(demo_model)
    rows = [TensorFacts(name="v", shape=[1], dtype="F32", digest="d")]
    new["structure"] = Structure(source="file", tensors=rows).model_dump(mode="json")
    found = _judge(old, new)["errors"]
    assert (found[0]["code"], found[0]["message"]) == (
        "architecture",
        "two different architectures: LlamaForCausalLM and GPT2LMHeadModel",
    )
    assert {"tensor_missing", "tensor_unexpected", "config_changed"}.isdisjoint(f["code"] for f in found)


# -- lengths and positions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("RobertaConfig", {"max_position_embeddings": 130, "pad_token_id": 1}, 128),
        ("XLMRobertaConfig", {"max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ("BertConfig", {"max_position_embeddings": 128}, 128),
        ("LlamaConfig", {"max_position_embeddings": 256}, 256),
        ("GPT2Config", {"n_positions": 64}, 64),
        ("T5Config", {"n_positions": 512}, None),
        ("XLNetConfig", {}, None),
        ("OPTConfig", {"max_position_embeddings": 64}, 64),
        ("MptConfig", {"max_seq_len": 64}, 64),
        ("LEDConfig", {"max_encoder_position_embeddings": 96}, 96),
        ("BloomConfig", {}, None),
    ],
)
def test_the_usable_length_is_what_positions_leave(kind: str, settings: dict[str, Any], expected: int | None) -> None:
    import transformers

    assert usable_length(getattr(transformers, kind)(**settings)) == expected


def test_the_padding_id_is_behaviour_only_where_positions_count_from_it() -> None:
    from transformers import BertConfig, RobertaConfig

    assert behaviour(RobertaConfig(pad_token_id=0)) != behaviour(RobertaConfig(pad_token_id=1))
    assert behaviour(BertConfig(pad_token_id=0)) == behaviour(BertConfig(pad_token_id=1))
