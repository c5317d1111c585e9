"""Checks that a plugin keeps its contract, for the tests of whoever writes one.

    from invarlock.testing import check_guard

    def test_my_guard_keeps_its_contract():
        check_guard(MyGuard)

A check raises AssertionError, or what the plugin would raise in a run, and says what was expected. It works on a copy of a
small real model (`tiny_model`), so that nothing of the caller's is changed. torch is imported when a check needs it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import random
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

from invarlock.core import registry
from invarlock.core.api import (
    AdapterLike,
    Batches,
    Guard,
    GuardWithContext,
    GuardWithPrepare,
    ModelAdapter,
    RunReport,
)
from invarlock.eval.data import EvaluationWindow, PairProvider, Provider, TextProvider
from invarlock.eval.data.base import Tokenizer
from invarlock.guards.boundary import checked_result

if TYPE_CHECKING:
    from torch.nn import Module

__all__ = ["byte_tokenizer", "check_adapter", "check_guard", "check_provider", "put_nan", "tiny_batches", "tiny_model"]

_VOCABULARY = 256
#: what an adapter may tell of a model; a key that is absent reads as None
_DESCRIBED = {
    "n_layer": int,
    "heads_per_layer": list,
    "mlp_dims": list,
    "tying": dict,
    "model_type": str,
    "model_class": str,
}


def tiny_model(seed: int = 0) -> Module:
    """Return a new language model of two layers in evaluation mode: 256 token ids, its head tied to its embedding.

    It is a GPT-2 where transformers is installed, else a plain module that is called in the same way.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            from transformers import GPT2Config, GPT2LMHeadModel
        except ImportError:
            return _plain_model().eval()
        sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": _VOCABULARY}
        model: Module = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
        return model


def _plain_model() -> Module:
    import torch

    def mlp() -> Module:
        return torch.nn.Sequential(
            OrderedDict(up_proj=torch.nn.Linear(32, 64), act=torch.nn.GELU(), down_proj=torch.nn.Linear(64, 32))
        )

    class Tiny(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(_VOCABULARY, 32)
            self.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"mlp": mlp()}) for _ in range(2))
            self.norm = torch.nn.LayerNorm(32)
            self.lm_head = torch.nn.Linear(32, _VOCABULARY, bias=False)
            self.lm_head.weight = self.embed.weight

        def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
            hidden = self.embed(input_ids)
            for layer in self.layers:
                hidden = hidden + layer.get_submodule("mlp")(hidden)
            return SimpleNamespace(logits=self.lm_head(self.norm(hidden)))

    return Tiny()


def tiny_batches(count: int = 8, length: int = 32, seed: int = 0) -> list[dict[str, Any]]:
    """Return calibration batches for `tiny_model`: `count` windows of random token ids."""
    draw = random.Random(seed)
    windows = ([draw.randrange(1, _VOCABULARY) for _ in range(length)] for _ in range(count))
    return [{"input_ids": ids, "attention_mask": [1] * length} for ids in windows]


def byte_tokenizer(
    texts: Sequence[str] = (), *, text_target: Sequence[str] = (), max_length: int | None = None, **_: object
) -> dict[str, list[list[int]]]:
    """Stand for a tokenizer where none is at hand: one token a byte."""
    return {"input_ids": [list(t.encode("utf-8", "surrogatepass"))[:max_length] for t in texts or text_target]}


def put_nan(model: Module) -> None:
    """Damage a model: one NaN in its largest weight."""
    max(model.parameters(), key=lambda weight: weight.numel()).data.view(-1)[-1] = math.nan


def check_guard(
    guard: Guard | Callable[[], Guard],
    *,
    model: Module | None = None,
    adapter: AdapterLike | None = None,
    batches: Batches | None = None,
    policy: Mapping[str, object] | None = None,
    damage: Callable[[Module], object] | None = put_nan,
) -> None:
    """Require of a guard (an instance that has seen no model yet, its class, or a function that makes one):

    1. it has a name; `prepare`, where there is one, returns a mapping, and so does `validate`, in the form that a run takes
    2. it leaves the model as it was: every tensor, tie, mode and hook
    3. an edit that changes nothing passes, evaluated, without a finding, and twice with the same result
    4. a result that passes holds no NaN or infinity
    5. `damage`, done to the model between `prepare` and `validate`, does not pass: by default a NaN in a weight. Name
       another damage for a guard that looks at something else, or None.
    """
    model = tiny_model() if model is None else model
    adapter = registry.adapters.resolve("hf_causal")() if adapter is None else adapter
    seen = tiny_batches() if batches is None else batches

    def outcome(change: Callable[[Module], object] | None) -> dict[str, Any]:
        one = copy.deepcopy(guard) if isinstance(guard, Guard) else guard()
        subject = copy.deepcopy(model)
        _expect(isinstance(one.name, str) and one.name, f"{type(one).__name__}.name is {one.name!r}; expected a name")
        before = _state(subject)
        if isinstance(one, GuardWithContext):
            one.set_run_context(RunReport())
        if isinstance(one, GuardWithPrepare):
            ready = one.prepare(subject, adapter, seen, dict(policy or {}))
            _expect(isinstance(ready, Mapping), f"prepare returned {type(ready).__name__}; expected a dict")
            _expect_same(before, _state(subject), f"{one.name}: prepare")
        if change is not None:
            change(subject)
            before = _state(subject)
        with mock.patch.dict(os.environ, {"INVARLOCK_ASSERT_GUARDS": "1"}):
            returned = one.validate(subject, adapter, {})
            result = checked_result(one.name, returned)
        _expect_same(before, _state(subject), f"{one.name}: validate")
        sound = not result["passed"] or all(map(math.isfinite, _numbers(returned)))
        _expect(sound, f"expected finite numbers in a result that passes, got {returned}")
        return result

    first, second = outcome(None), outcome(None)
    said = f"of an edit that changes nothing: {first}"
    _expect(first["passed"] and first["evaluated"], f"expected it to pass, {said}")
    _expect(first["action"] in ("continue", "none"), f"expected action 'continue' or 'none', {said}")
    _expect(not first["warnings"] and not first["errors"], f"expected no finding, {said}")
    _expect(_text(first) == _text(second), f"expected the same result twice, got {first} and then {second}")
    if damage is not None:
        result = outcome(damage)
        _expect(not result["passed"], f"expected a damaged model ({_called(damage)}) to fail, got {result}")


def check_adapter(adapter: ModelAdapter, *, model: Module | None = None, ties: bool = True) -> None:
    """Require of an adapter:

    1. it has a name; `describe` returns plain data, in the expected types where it has the usual keys
    2. `snapshot` gives bytes, `snapshot_chunked` a path, neither changes the model, and restoring brings every parameter
       and buffer back bit for bit after an edit in place, ties included, and (unless `ties` is False) after one that unties
    3. where it has `save`: what `load_model` then reads is the same model in evaluation mode, and `can_handle` knows it
    """
    model = copy.deepcopy(tiny_model() if model is None else model)
    name = getattr(adapter, "name", None)
    _expect(isinstance(name, str) and name, f"{type(adapter).__name__}.name is {name!r}; expected a name")
    before = _state(model)
    described = adapter.describe(model)
    _expect(isinstance(described, dict), f"describe returned {type(described).__name__}; expected a dict")
    for key, kind in _DESCRIBED.items():
        value = described.get(key)
        _expect(value is None or isinstance(value, kind), f"describe: {key} is {value!r}; expected {kind.__name__}")
    _text(described)
    _expect_same(before, _state(model), f"{name}: describe")
    with tempfile.TemporaryDirectory() as folder:
        if getattr(type(adapter), "save", ModelAdapter.save) is not ModelAdapter.save:
            _check_saved(adapter, model, Path(folder) / "saved")
        model.register_buffer("invarlock_testing", model.get_parameter(next(iter(dict(model.named_parameters())))) + 1)
        kept = adapter.snapshot(model)
        _expect(isinstance(kept, bytes), f"snapshot returned {type(kept).__name__}; expected bytes")
        _check_restored(model, lambda: adapter.restore(model, kept), f"{name}: restore", ties)
        path = adapter.snapshot_chunked(model, Path(folder))
        _expect(isinstance(path, Path), f"snapshot_chunked returned {type(path).__name__}; expected a Path")
        _check_restored(model, lambda: adapter.restore_chunked(model, path), f"{name}: restore_chunked", ties)


def check_provider(
    provider: Provider, *, tokenizer: Tokenizer = byte_tokenizer, counts: tuple[int, int] = (4, 4), seq_len: int = 32
) -> None:
    """Require of a data provider, with its options set:

    1. it has a name, and describes itself in plain data
    2. its documents (or pairs) have text and ids of their own, and are the same when read again
    3. it gives `counts` preview and final windows of at most `seq_len` tokens, disjoint, each of a known document, with a
       mask and, for pairs, labels; and the same ones when asked again
    """
    described = provider.describe()
    _expect(
        described["name"] == provider.name and provider.name, f"describe names {described['name']!r}; expected a name"
    )
    _text(described)
    if isinstance(provider, TextProvider):
        read: Callable[[], Sequence[Any]] = provider.documents
    else:
        _expect(isinstance(provider, PairProvider), f"{provider.name}: expected a TextProvider or a PairProvider")
        read = provider.pairs  # type: ignore[attr-defined]
    items = read()
    ids = [item[0] for item in items]
    texts = [text for item in items for text in item[1:]]
    _expect(items and all(isinstance(t, str) for t in texts), f"{provider.name}: expected texts, got {items[:2]}")
    _expect(len(set(ids)) == len(ids), f"{provider.name}: expected an id for each, got some twice")
    _expect(list(read()) == list(items), f"{provider.name}: expected the same texts when read again")

    def cut() -> tuple[EvaluationWindow, EvaluationWindow]:
        return provider.windows(tokenizer, preview_n=counts[0], final_n=counts[1], seq_len=seq_len)

    parts = cut()
    _expect(parts == cut(), f"{provider.name}: expected the same windows when asked again")
    got = [window for part in parts for window in part.window_ids]
    _expect(tuple(map(len, parts)) == counts, f"{provider.name}: expected {counts} windows, got {len(got)}")
    _expect(len(set(got)) == len(got), f"{provider.name}: expected windows that differ, got {got}")
    for part in parts:
        _check_windows(provider, part, seq_len, {item.document_id for item in items})


def _check_windows(provider: Provider, part: EvaluationWindow, seq_len: int, documents: set[str]) -> None:
    lengths = [len(ids) for ids in part.input_ids]
    _expect(max(lengths) <= seq_len, f"{provider.name}: expected at most {seq_len} tokens a window, got {lengths}")
    _expect([len(mask) for mask in part.attention_masks] == lengths, f"{provider.name}: expected a mask a window")
    _expect(documents.issuperset(part.document_ids), f"{provider.name}: expected windows of its own documents")
    labelled = part.labels is not None and len(part.labels) == len(part)
    _expect(labelled is (provider.kind == "pairs"), f"{provider.name}: expected labels for pairs, and for pairs alone")


def _check_saved(adapter: ModelAdapter, model: Module, folder: Path) -> None:
    import torch

    before = _state(model)
    adapter.save(model, folder)
    loaded = adapter.load_model(str(folder), device="cpu")
    if not isinstance(loaded, torch.nn.Module):
        raise AssertionError(f"{adapter.name}: load_model returned {type(loaded).__name__}; expected a torch module")
    _expect_same(before, _state(loaded), f"{adapter.name}: save and load_model")
    _expect(not loaded.training, f"{adapter.name}: load_model gave a model in training mode; expected evaluation mode")
    if type(adapter).can_handle is not ModelAdapter.can_handle:
        _expect(adapter.can_handle(str(folder)), f"{adapter.name}: can_handle says no to what the adapter saved")


def _check_restored(model: Module, restore: Callable[[], None], what: str, ties: bool) -> None:
    before = _state(model)
    for change in (_shift, _untie):
        change(model)
        restore()
        after = _state(model)
        if change is _untie and not ties:
            after = {name: (before[name][0], *found[1:]) for name, found in after.items() if name in before}
        _expect_same(before, after, f"{what} after {_called(change)}")


def _shift(model: Module) -> None:
    """Change every parameter and stored buffer in place."""
    for tensor in model.state_dict().values():
        tensor.add_(1)


def _untie(model: Module) -> None:
    """Give each name of a shared parameter a parameter of its own."""
    import torch

    first: set[int] = set()
    for name, weight in list(model.named_parameters(remove_duplicate=False)):
        if id(weight) in first:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, torch.nn.Parameter(weight.detach() + 1))
        first.add(id(weight))


def _state(model: Module) -> dict[str, tuple[object, ...]]:
    """Return what must not change: of each tensor its first name, type, shape and digest; modes and hooks of modules."""
    import torch

    firsts: dict[int, str] = {}
    state: dict[str, tuple[object, ...]] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            tied = firsts.setdefault(id(tensor), name)
            state[name] = (tied, str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(raw).hexdigest())
    for name, module in model.named_modules():
        state[f"module {name}"] = (module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
    return state


def _expect(holds: object, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def _expect_same(before: Mapping[str, object], after: Mapping[str, object], what: str) -> None:
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    _expect(
        not changed, f"{what} changed {', '.join(changed[:3])} ({len(changed)} in all); expected the model as it was"
    )


def _text(data: object) -> str:
    try:
        return json.dumps(data, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"expected plain data (dict, list, text, numbers), got {data!r}: {error}") from None


def _numbers(data: object) -> Iterator[float]:
    if isinstance(data, Mapping):
        data = list(data.values())
    if isinstance(data, (list, tuple)):
        for value in data:
            yield from _numbers(value)
    elif isinstance(data, Real):
        yield float(data)


def _called(change: Callable[..., object]) -> str:
    return getattr(change, "__name__", repr(change)).strip("_")
