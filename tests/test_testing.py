"""The checks for plugin authors: everything of ours passes them, and whatever breaks its contract does not."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from guards.models import build
from invarlock.adapters import HF_Causal_Adapter
from invarlock.core import registry
from invarlock.core.api import Guard
from invarlock.core.exceptions import GuardError
from invarlock.eval.data import Document, TextProvider, get_provider
from invarlock.guards.boundary import BUILT_IN_GUARDS
from invarlock.plugins import HelloGuard
from invarlock.testing import check_adapter, check_guard, check_provider, put_nan, tiny_model

FINE = {"passed": True, "action": "continue", "message": "fine", "metrics": {}}
ARCHITECTURES = {"hf_mlm": "bert", "hf_seq2seq": "t5"}


# --- what is ours


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT_IN_GUARDS)
def test_a_built_in_guard_keeps_its_contract(name: str) -> None:
    check_guard(registry.guards.load(name))


def test_the_worked_example_keeps_its_contract() -> None:
    def lose_a_bias(model: Any) -> None:
        del model.transformer.h[1].mlp.c_fc.bias

    check_guard(HelloGuard, damage=lose_a_bias)
    with pytest.raises(AssertionError, match=r"expected a damaged model \(put_nan\) to fail"):
        check_guard(HelloGuard)  # it counts parameters, and says nothing about their values


#: these refuse, by its name, a checkpoint that is not packed as they expect: see tests/adapters/test_packed_adapters.py
PACKED = ("hf_awq", "hf_bnb", "hf_gptq")
#: it executes graphs, not models that are made in memory: see tests/adapters/test_onnx.py
GRAPHS = ("hf_causal_onnx",)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in registry.adapters.entries() if name not in (*PACKED, *GRAPHS)])
def test_an_adapter_of_ours_keeps_its_contract(name: str) -> None:
    adapter = registry.adapters.create(name)
    check_adapter(adapter, model=build(ARCHITECTURES[name]) if name in ARCHITECTURES else None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["python_docs", "synthetic", "seq2seq"])
def test_a_provider_that_needs_no_file_keeps_its_contract(name: str) -> None:
    check_provider(get_provider(name))


@pytest.mark.parametrize("name", ["local_jsonl", "local_jsonl_pairs", "hf_text", "hf_seq2seq", "wikitext2"])
def test_a_provider_of_files_keeps_its_contract(name: str, tmp_path: Path) -> None:
    texts = [f"Number {n} of several. " + "It goes on for a while. " * 20 for n in range(8)]
    if name == "wikitext2":
        texts = [line for n, text in enumerate(texts) for line in ("", f" = Article {n} = \n", "", text)]
    rows = [{"text": text, "source": text, "target": text[::-1]} for text in texts]
    if name.startswith("local"):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        check_provider(get_provider(name, file=str(path)))
    else:
        datasets = pytest.importorskip("datasets")
        folder = str(tmp_path / "set")
        datasets.DatasetDict({"validation": datasets.Dataset.from_list(rows)}).save_to_disk(folder)
        check_provider(get_provider(name, dataset_name=folder))


@pytest.mark.slow
def test_without_transformers_a_plain_model_stands_in() -> None:
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "from invarlock.core import registry\n"
        "from invarlock.testing import check_guard, tiny_model\n"
        f"for name in {BUILT_IN_GUARDS}: check_guard(registry.guards.resolve(name))\n"
        "print(type(tiny_model()).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "Tiny\n", done.stderr


@pytest.mark.slow
def test_importing_the_checks_imports_no_torch() -> None:
    program = "import sys, invarlock.testing; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_the_model_is_left_alone_and_always_the_same() -> None:
    model = tiny_model()
    check_adapter(HF_Causal_Adapter(), model=model)
    check_guard(registry.guards.load("spectral"), model=model)
    assert not dict(model.named_buffers()).keys() - dict(tiny_model().named_buffers()).keys()
    for one, other in zip(model.parameters(), tiny_model().parameters(), strict=True):
        assert torch.equal(one, other)


# --- guards that break the contract


def _finite(model: Any) -> bool:
    return all(bool(weight.isfinite().all()) for weight in model.parameters())


class Sound(Guard):
    """Keeps the contract; the others change one thing."""

    name = "sound"

    def prepare(self, model: Any, adapter: Any, calib: Any, policy: Any) -> Any:
        return {"ready": True}

    def validate(self, model: Any, adapter: Any, context: Any) -> Any:
        return {**FINE, "passed": _finite(model)}


class Nameless(Sound):
    name = ""


class Silent(Sound):
    def prepare(self, *_: Any) -> Any:
        return None


class NoVerdict(Sound):
    def validate(self, *_: Any) -> Any:
        return {"action": "continue"}


class NotABool(Sound):
    def validate(self, *_: Any) -> Any:
        return {**FINE, "passed": math.nan}


class OwnKey(Sound):
    def validate(self, *_: Any) -> Any:
        return {**FINE, "score": 1}


class Alarmist(Sound):
    def validate(self, *_: Any) -> Any:
        return {**FINE, "warnings": ["something"]}


class Refuses(Sound):
    def validate(self, *_: Any) -> Any:
        return {**FINE, "passed": False}


class NaNMetric(Sound):
    def validate(self, model: Any, *_: Any) -> Any:
        return {**FINE, "passed": _finite(model), "metrics": {"ratio": [1.0, math.inf]}}


class Blind(Sound):
    def validate(self, *_: Any) -> Any:
        return FINE


class Fickle(Sound):
    calls = itertools.count()

    def validate(self, model: Any, *_: Any) -> Any:
        return {**FINE, "passed": _finite(model), "metrics": {"call": next(self.calls)}}


class Meddler(Sound):
    def validate(self, model: Any, *_: Any) -> Any:
        with torch.no_grad():
            model.transformer.ln_f.bias.add_(1)
        return FINE


class LeavesAHook(Sound):
    def prepare(self, model: Any, *_: Any) -> Any:
        model.transformer.h[0].register_forward_hook(lambda *_: None)
        return {}


class Trains(Sound):
    def prepare(self, model: Any, *_: Any) -> Any:
        model.train()
        return {}


@pytest.mark.slow
def test_a_sound_guard_passes_as_an_instance_a_class_and_a_factory() -> None:
    for form in (Sound(), Sound, lambda: Sound()):
        check_guard(form)


@pytest.mark.parametrize(
    ("guard", "error", "message"),
    [
        (Nameless, AssertionError, "Nameless.name is ''; expected a name"),
        (Silent, AssertionError, "prepare returned NoneType; expected a dict"),
        (NoVerdict, GuardError, "returned no 'passed'"),
        (NotABool, GuardError, "expected True or False"),
        (OwnKey, GuardError, "returned score=1; expected one of the keys passed"),
        (Alarmist, AssertionError, "expected no finding, of an edit that changes nothing"),
        (Refuses, AssertionError, "expected it to pass, of an edit that changes nothing"),
        (NaNMetric, AssertionError, "expected finite numbers in a result that passes"),
        (Blind, AssertionError, r"expected a damaged model (put_nan) to fail"),
        (Fickle, AssertionError, "expected the same result twice"),
        (
            Meddler,
            AssertionError,
            "sound: validate changed transformer.ln_f.bias (1 in all); expected the model as it was",
        ),
        (LeavesAHook, AssertionError, "sound: prepare changed module transformer.h.0 (1 in all)"),
        (Trains, AssertionError, "sound: prepare changed module "),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_guard_that_breaks_the_contract_is_told_what_was_expected(
    guard: type[Guard], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        check_guard(guard)


# --- adapters that break the contract


class HalfRestored(HF_Causal_Adapter):
    """Forgets buffers."""

    def restore(self, model: Any, snapshot: bytes) -> None:
        kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
        super().restore(model, snapshot)
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])


class Untied(HF_Causal_Adapter):
    """Forgets what was tied."""

    def restore_chunked(self, model: Any, path: Path) -> None:
        was = model.lm_head.weight is model.transformer.wte.weight
        super().restore_chunked(model, path)
        if not was:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())


class Rounded(HF_Causal_Adapter):
    """Saves in half precision."""

    def save(self, model: Any, folder: Path) -> None:
        super().save(model.half(), folder)
        model.float()


class Text(HF_Causal_Adapter):
    def snapshot(self, model: Any) -> Any:
        return super().snapshot(model).hex()


class Training(HF_Causal_Adapter):
    def load_model(self, *arguments: Any, **options: Any) -> Any:
        return super().load_model(*arguments, **options).train()


class Layers(HF_Causal_Adapter):
    def describe(self, model: Any) -> Any:
        return {**super().describe(model), "n_layer": "two"}


class Live(HF_Causal_Adapter):
    def describe(self, model: Any) -> Any:
        return {"embedding": model.get_input_embeddings().weight}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            HalfRestored,
            "hf_causal: restore after shift changed invarlock_testing (1 in all); expected the model as it was",
        ),
        (Untied, "hf_causal: restore_chunked after untie changed lm_head.weight (1 in all)"),
        (Rounded, "hf_causal: save and load_model changed transformer.wte.weight"),
        (Text, "snapshot returned str; expected bytes"),
        (Training, "hf_causal: save and load_model changed module "),
        (Layers, "describe: n_layer is 'two'; expected int"),
        (Live, "expected plain data (dict, list, text, numbers), got {'embedding': Parameter containing:"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_adapter_that_breaks_the_contract_is_told_what_was_expected(
    adapter: Callable[[], Any], message: str
) -> None:
    with pytest.raises(AssertionError, match=re.escape(message)):
        check_adapter(adapter())


@pytest.mark.slow
def test_an_adapter_over_a_state_dict_may_leave_a_cut_tie_cut() -> None:
    check_adapter(Untied(), ties=False)


# --- providers that break the contract


@dataclass(frozen=True)
class Broken(TextProvider):
    name: ClassVar[str] = "broken"
    how: str = ""
    calls: ClassVar[Any] = itertools.count()

    def documents(self, split: str | None = None) -> Any:
        text = "words of text " * 40
        if self.how == "twice":
            return [Document("same", f"{n} {text}") for n in range(8)]
        if self.how == "nothing":
            return []
        if self.how == "bytes":
            return [Document(str(n), f"{n} {text}".encode()) for n in range(8)]  # type: ignore[arg-type]
        if self.how == "fickle":
            return [Document(str(n), f"{next(self.calls)} {text}") for n in range(8)]
        return [Document(str(n), f"{n} {text}") for n in range(8)]

    def windows(self, *arguments: Any, **options: Any) -> Any:
        preview, final = super().windows(*arguments, **options)
        return (preview, preview) if self.how == "overlap" else (preview, final)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("twice", "broken: expected an id for each, got some twice"),
        ("nothing", "broken: expected texts, got []"),
        ("bytes", "broken: expected texts, got [Document("),
        ("fickle", "broken: expected the same texts when read again"),
        ("overlap", "broken: expected windows that differ"),
    ],
)
def test_a_provider_that_breaks_the_contract_is_told_what_was_expected(how: str, message: str) -> None:
    check_provider(Broken())
    with pytest.raises(AssertionError, match=re.escape(message)):
        check_provider(Broken(how=how))


def test_the_damage_by_default_is_one_nan() -> None:
    model = tiny_model()
    put_nan(model)
    assert sum(int(weight.isnan().sum()) for weight in model.parameters()) == 1
