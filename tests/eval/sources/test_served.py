"""A served engine as a source: the same figures as the model in torch, and every engine that misleads refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_server import KEY, Server, serve
from invarlock.core.exceptions import ConfigError, DataError, EngineError
from invarlock.core.settings import environment_flags
from invarlock.eval.sources import engines
from invarlock.eval.sources.base import Scores, Watch, score_all
from invarlock.eval.sources.engines import Address, Engine
from invarlock.eval.sources.served import ServedSource
from invarlock.eval.sources.torch_model import TorchSource
from invarlock.evidence.windows import Window
from invarlock.testing import tiny_model


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny model that is sure of what comes next, so that a shift by one token shows."""
    made: Any = tiny_model()
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(4.0)
    return made


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_PAUSE", 0.01)


def _windows(count: int = 6, length: int = 32) -> list[Window]:
    drawn = torch.randint(1, 256, (count, length), generator=torch.Generator().manual_seed(3)).tolist()
    return [Window(f"w{i}", f"d{i}", tuple(row[: length - i])) for i, row in enumerate(drawn)]


class _Numbers:
    """A tokenizer whose tokens are numbers."""

    def __len__(self) -> int:
        return 256

    def decode(self, ids: list[int], **_: object) -> str:
        return f"<{ids[0]}>"

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"<{token}>"


def _score(server: Server, kind: str = "vllm", folder: Path | None = None, **options: Any) -> Scores:
    engine = Engine.open(f"{kind}={server.url}", _Numbers())
    source = ServedSource(engine, folder=folder, batch_tokens=70)
    return score_all(source.score(_windows(), **options), 6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vllm", "openai"])
@pytest.mark.parametrize("most", [256, 20])
def test_an_honest_engine_gives_the_figures_of_the_model(model: Any, kind: str, most: int) -> None:
    windows = _windows()
    old = score_all(TorchSource(tiny_model(1)).score(windows, keep_reference=True), 6)
    expected = score_all(TorchSource(model).score(windows, reference=old.reference, correct=True), 6)
    with serve(Server(model, most=most)) as server:
        scores = _score(server, kind, reference=old.reference, correct=True)
    assert scores.tokens == expected.tokens
    assert scores.loss == pytest.approx(expected.loss, rel=1e-5)
    assert scores["flips"] == expected["flips"] and scores["correct"] == pytest.approx(expected["correct"])
    if most == 256:  # the whole vocabulary was told
        assert scores["kl_sum"] == pytest.approx(expected["kl_sum"], rel=1e-4)
    else:
        pairs = list(zip(scores["kl_sum"], expected["kl_sum"], strict=True))
        assert all(0 < (told or 0) < (whole or 0) for told, whole in pairs), "it is a lower bound"


@pytest.mark.slow
def test_a_served_baseline_serves_a_model_in_torch(model: Any) -> None:
    with serve(Server(model, most=64)) as server:
        old = _score(server, keep_reference=True)
    subject = score_all(TorchSource(model).score(_windows(), reference=old.reference), 6)
    assert sum(subject["flips"]) == 0 and max(subject["kl_sum"]) < 1e-4  # type: ignore[type-var,arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("off by one", "SHIFTED"),
        ("truncates", "TRUNCATED"),
        ("drops", "TRUNCATED"),
        ("adds bos", "TOKENS"),
        ("lying", "UNNORMALISED"),
        ("renormalised", "UNNORMALISED"),
        ("another next", "INCONSISTENT"),
        ("noisy", "INCONSISTENT"),
        ("other vocabulary", "VOCABULARY"),
        ("redirects", "REFUSED"),
        ("hangs", "UNREACHABLE"),
    ],
)
@pytest.mark.parametrize("kind", ["vllm", "openai"])
def test_an_engine_that_misleads_is_refused_by_name(
    model: Any, kind: str, fault: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "hangs":
        monkeypatch.setenv("INVARLOCK_ENGINE_TIMEOUT", "0.5")
    with serve(Server(model, _Numbers(), fault)) as server, pytest.raises(EngineError) as error:
        _score(server, kind)
    # an echo shows its tokens alone, and one more row, so that what is missing shows as another token
    also = {"ENGINE-TOKENS"} if kind == "openai" and fault in ("other vocabulary", "drops") else set()
    assert error.value.code in {f"ENGINE-{code}"} | also, error.value
    assert server.url.removeprefix("http://") in str(error.value)


@pytest.mark.slow
def test_an_engine_that_is_busy_or_breaks_off_is_asked_again(model: Any) -> None:
    with serve(Server(model, busy=3)) as server:
        assert len(_score(server).loss) == 6
    with serve(Server(model, busy=4)) as server, pytest.raises(EngineError, match="HTTP 503.*tried 4 times") as error:
        _score(server)
    assert error.value.code == "ENGINE-UNREACHABLE"
    with pytest.raises(EngineError, match="tried 4 times: is it running") as error:
        _score(server)  # it is gone
    assert error.value.code == "ENGINE-UNREACHABLE"


@pytest.mark.slow
def test_the_key_comes_from_the_environment_and_is_told_to_nobody(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(Server(model, key=KEY)) as server:
        monkeypatch.setenv("INVARLOCK_ENGINE_KEY", KEY + "-wrong")
        with pytest.raises(EngineError, match="401") as error:
            _score(server)
        assert KEY not in str(error.value)
        monkeypatch.setenv("INVARLOCK_ENGINE_KEY", KEY)
        engine = Engine.open(f"vllm={server.url}", None)
        assert KEY not in repr(engine) + str(engine.facts())
    assert environment_flags()["INVARLOCK_ENGINE_KEY"] == "set"


@pytest.mark.slow
def test_what_was_answered_is_kept_until_all_is_there(model: Any, tmp_path: Path) -> None:
    with serve(Server(model)) as server:
        whole = _score(server)
        asked = len(server.requests)
        server.die_after = 2 * asked - 1
        with pytest.raises(EngineError, match="out of memory"):
            _score(server, folder=tmp_path)
        kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
        assert len(kept) == 2, "two of three batches were answered"
        server.die_after = None
        assert _score(server, folder=tmp_path).loss == whole.loss
        assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
        server.model = tiny_model(5)  # another model under the same name
        fresh = _score(server).loss
        assert _score(server, folder=tmp_path).loss == fresh != whole.loss


@pytest.mark.slow
def test_what_an_engine_cannot_do_is_refused(model: Any) -> None:
    with serve(Server(model)) as server:
        source = ServedSource(Engine.open(f"vllm={server.url}", None))
        with pytest.raises(DataError, match="gives no activations"):
            next(source.score(_windows(), watch=[Watch(("h.0",), frozenset({0}), print, print)]))
        holes = [dataclasses.replace(w, mask=(1, 0) * (len(w.input_ids) // 2)) for w in _windows(1)]
        with pytest.raises(DataError, match="masked tokens between"):
            next(source.score(holes))
        with pytest.raises(EngineError, match="no model 'other'.*served"):
            Engine.open(f"vllm={server.url}#other", None)


@pytest.mark.slow
def test_padding_and_labels_choose_what_is_scored(model: Any) -> None:
    plain = _windows(2)
    padded = [
        dataclasses.replace(w, input_ids=(0, 0, *w.input_ids, 0), mask=(0, 0, *(1 for _ in w.input_ids), 0))
        for w in plain
    ]
    labelled = [dataclasses.replace(w, labels=(*(-100 for _ in w.input_ids[:9]), *w.input_ids[9:])) for w in plain]
    with serve(Server(model)) as server:
        engine = Engine.open(f"vllm={server.url}", None)
        for windows in (padded, labelled):
            expected = score_all(TorchSource(model).score(windows), 2)
            scores = score_all(ServedSource(engine).score(windows), 2)
            assert scores.tokens == expected.tokens and scores.loss == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("127.0.0.1:8000", "expected KIND=ADDRESS"),
        ("vlm=http://127.0.0.1:8000", "did you mean 'vllm'"),
        ("vllm=ftp://127.0.0.1", "expected an address such as"),
        ("vllm=http://user:pw@127.0.0.1", "INVARLOCK_ENGINE_KEY"),
        ("vllm=http://127.0.0.1?key=pw", "INVARLOCK_ENGINE_KEY"),
    ],
)
def test_an_address_says_what_is_wrong_with_it(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        Address.parse(text, "--engine")
    assert "pw" not in str(error.value)


def test_an_address_may_name_the_version_of_the_interface_and_a_model() -> None:
    assert Address.parse("openai=https://host:1/v1/#m/a") == Address("openai", "https://host:1", "m/a")
