"""Served engines: how one is asked for the log-probabilities of prompts, and the check that it answers what it was asked.

An engine is named `kind=address`, such as `vllm=http://127.0.0.1:8000`; `#name` at its end chooses one of several models.
Each kind is one row of `KINDS`: what a request holds and how an answer is read. Prompts are token ids, never text, so that
the engine's own tokenizer has no say. The key is that of INVARLOCK_ENGINE_KEY; it is sent to this host alone.

`check` asks questions whose answers are known, before anything is measured:

1. the answer has a row for each token that was sent, and for those tokens      ENGINE-TRUNCATED, ENGINE-TOKENS
2. the ids mean what the baseline's tokenizer says                              ENGINE-VOCABULARY
3. the probabilities of a row are at most 1 in all, and 1 where all are told    ENGINE-UNNORMALISED
4. row i agrees with what the engine itself would say next after i tokens       ENGINE-SHIFTED, ENGINE-INCONSISTENT
5. the same question gets the same answer, alone and among others               ENGINE-UNSTABLE

Not checked: that the engine serves the model that it names. A consistent distribution of another model shows as damage.
"""

from __future__ import annotations

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from invarlock.core import settings
from invarlock.core.exceptions import ConfigError, EngineError
from invarlock.core.network import allow_host
from invarlock.core.registry import nearest

__all__ = ["KINDS", "Address", "Engine", "Kind", "Row", "Told", "Vocabulary"]

_ATTEMPTS = 4
_PAUSE = 0.5  # seconds before the second attempt; doubled before each further one
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_MOST_BYTES = 1 << 30  # of one answer
_WHOLE_ROWS = 4096  # ids: up to here a whole vocabulary is asked for
_TOPS = (256, 128, 64, 32, 20, 10, 5, 1)  # how many ids are asked for, the first that the engine grants
_SUM = 1e-3  # by which the probabilities of a row may miss 1: logs are rounded
_SAME = 0.1  # nats: two computations of one distribution in half precision differ by less, two positions by more
_LOOKED_AT = 5  # most likely ids that are compared
_PROBE = 24  # tokens

Row = Mapping[int, float]


class Address(NamedTuple):
    """Where an engine is: its kind, `http://host:port` without a path, and the model asked for (None: its only one)."""

    kind: str
    url: str
    model: str | None

    @classmethod
    def parse(cls, text: str, option: str = "engine") -> Address:
        """Read `kind=http://host:port[/v1][#model]`. Raises ConfigError that names `option`."""
        kind, _, rest = text.partition("=")
        if kind not in KINDS or not rest:
            raise ConfigError(
                f"{option} is {text!r}{nearest(kind, KINDS)}; expected KIND=ADDRESS, such as "
                f"vllm=http://127.0.0.1:8000, with a kind of: {', '.join(KINDS)}"
            )
        parts = urlsplit(rest)
        if parts.username or parts.password or parts.query:
            shown = f"{kind}={parts.scheme}://{parts.hostname}"
            raise ConfigError(
                f"{option} {shown}... holds credentials or a query; put the key into INVARLOCK_ENGINE_KEY"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{option} is {text!r}; expected an address such as http://127.0.0.1:8000")
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(kind, f"{parts.scheme}://{parts.netloc}{path}", parts.fragment or None)


class Vocabulary:
    """The tokens of a tokenizer as text. `texts(id)` are the ways in which an engine may write one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, int | None] | None = None

    def texts(self, token: int) -> set[str]:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return set()
        told = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return {told, piece, piece.replace("▁", " ").replace("Ġ", " ")}

    def id_of(self, text: str) -> int | None:
        """Return the only id that is written so; None where none or several are."""
        if self._ids is None:
            self._ids = {}
            for token in range(len(self._tokenizer)):
                for written in self.texts(token):
                    self._ids[written] = None if written in self._ids else token
        return self._ids.get(text)


@dataclass(frozen=True)
class Told:
    """What an engine told of one prompt of n tokens. `rows[i]`, of the token at i + 1: log-probabilities by id, the
    likeliest k; `labels[i]`: that of the token itself; `texts[i]`: the token as the engine writes it; `next`: the row
    after the whole prompt."""

    rows: list[Row]
    labels: list[float]
    texts: list[str | None]
    next: Row | None = None


@dataclass(frozen=True)
class _Answer:
    """One answer as it came. Before it is a `Told`, its tokens are held against those that were sent."""

    ids: list[int | None]  # of the prompt's tokens as the engine sees them; None: not told
    rows: list[Row | None]
    labels: list[float | None]
    texts: list[str | None]
    next: Row | None


class Kind(NamedTuple):
    """A kind of engine: what is added to a request for `k` ids, and how a choice is read."""

    request: Callable[[int, bool], dict[str, Any]]
    read: Callable[[Mapping[str, Any], Sequence[int], Vocabulary | None], _Answer]


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _vllm_request(k: int, further: bool) -> dict[str, Any]:
    told = {"logprobs": k, "return_tokens_as_token_ids": True} if further else {}
    return {"prompt_logprobs": k, "return_token_ids": True, **told}


def _vllm_read(choice: Mapping[str, Any], prompt: Sequence[int], vocabulary: Vocabulary | None) -> _Answer:
    rows: list[Row | None] = []
    labels: list[float | None] = []
    texts: list[str | None] = []
    given = choice.get("prompt_logprobs") or []
    for place, row in enumerate(given):
        entries = {int(key): entry for key, entry in (row or {}).items()}
        token = prompt[place] if place < len(prompt) else None
        own = entries.get(token) if token is not None else None
        labels.append(None if own is None else _number(own.get("logprob")))
        texts.append(None if own is None else own.get("decoded_token"))
        ranked = {t: _number(e.get("logprob")) for t, e in entries.items()}
        rows.append(ranked if row is not None else None)
    ids = choice.get("prompt_token_ids") or [None] * len(given)
    return _Answer(list(ids), rows, labels, texts, _next(choice, 0, vocabulary))


def _openai_request(k: int, further: bool) -> dict[str, Any]:
    return {"echo": True, "logprobs": k, "return_tokens_as_token_ids": True}


def _openai_read(choice: Mapping[str, Any], prompt: Sequence[int], vocabulary: Vocabulary | None) -> _Answer:
    told, n = choice.get("logprobs") or {}, len(prompt)
    tokens, tops = list(told.get("tokens") or []), list(told.get("top_logprobs") or [])
    ids: list[int | None] = []
    for text, token in zip(tokens, prompt, strict=False):
        written = _id_of(text, vocabulary)
        alike = vocabulary is not None and text in vocabulary.texts(token)
        ids.append(token if alike or (written is None and "\ufffd" in text) else written)
    return _Answer(
        ids,
        [_row(row, vocabulary) if row is not None else None for row in tops[:n]],
        [None if value is None else _number(value) for value in (told.get("token_logprobs") or [])[:n]],
        tokens[:n],
        _next(choice, n, vocabulary),
    )


def _id_of(text: str, vocabulary: Vocabulary | None) -> int | None:
    mark, _, number = text.partition("token_id:")
    if not mark and number.isdigit():
        return int(number)
    return vocabulary.id_of(text) if vocabulary is not None else None


def _row(row: Mapping[str, object], vocabulary: Vocabulary | None) -> Row:
    """Return a row by id; a text that several ids have, or none, stays unknown and counts to the rest."""
    found = ((_id_of(text, vocabulary), value) for text, value in row.items())
    return {token: _number(value) for token, value in found if token is not None}


def _next(choice: Mapping[str, Any], place: int, vocabulary: Vocabulary | None) -> Row | None:
    tops = (choice.get("logprobs") or {}).get("top_logprobs") or []
    return _row(tops[place], vocabulary) if place < len(tops) and tops[place] else None


#: the kinds of engines. `openai` is every server that echoes a prompt with its log-probabilities
KINDS: Mapping[str, Kind] = {
    "vllm": Kind(_vllm_request, _vllm_read),
    "openai": Kind(_openai_request, _openai_read),
}


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirection would take the key and the text to another host."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None


@dataclass
class Engine:
    """One served model. Stands where a model in torch would: it has no modules and no parameters.

    `top`: how many ids it tells of each row, known after `check`. `vocabulary` is the baseline's.
    """

    address: Address
    vocabulary: Vocabulary | None = None
    served: str = ""
    version: str | None = None
    longest: int | None = None  # tokens that it takes at once
    top: int = 0
    whole: bool = False  # whether `top` is the whole vocabulary
    repeat_difference: float | None = None  # nats: the largest between two answers to one question
    _opener: Any = field(default=None, repr=False)

    @classmethod
    def open(cls, text: str, tokenizer: object | None) -> Engine:
        """Reach an engine and choose its model. Raises ConfigError, and EngineError where it does not answer."""
        engine = cls(Address.parse(text), Vocabulary(tokenizer) if tokenizer is not None else None)
        allow_host(str(urlsplit(engine.address.url).hostname))
        engine._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)
        engine._choose()
        return engine

    def __call__(self, *_: object, **__: object) -> Any:
        raise self.error("REFUSED", "a served model has no forward pass here; expected windows to score")

    @property
    def name(self) -> str:
        return self.address.kind

    @property
    def host(self) -> str:
        return urlsplit(self.address.url).netloc

    def facts(self) -> dict[str, Any]:
        """Return what the evidence says of the engine; nothing secret is among it."""
        return {
            "kind": self.name,
            "version": self.version,
            "host": self.host,
            "model": self.served,
            "top": self.top,
            "whole_vocabulary": self.whole,
            "repeat_difference": self.repeat_difference,
        }

    def error(self, code: str, message: str) -> EngineError:
        return EngineError(f"{self.name} at {self.host}: {message}", code=f"ENGINE-{code}")

    def _choose(self) -> None:
        models = [model for model in self._call("/v1/models").get("data") or [] if isinstance(model, dict)]
        names = [str(model.get("id")) for model in models]
        wanted = self.address.model or (names[0] if len(names) == 1 else None)
        if wanted not in names:
            asked = "several models" if self.address.model is None else f"no model {self.address.model!r}"
            raise self.error("REFUSED", f"it serves {asked}; name one with #NAME after the address: {', '.join(names)}")
        length = models[names.index(wanted)].get("max_model_len")
        self.served, self.longest = wanted, length if isinstance(length, int) else None
        if self.name == "vllm":
            self.version = str(self._call("/version").get("version") or "") or None

    def ask(self, prompts: Sequence[Sequence[int]], *, k: int | None = None, further: bool = False) -> list[Told]:
        """Return what the engine tells of each prompt; `further`: also what would come next. The answer is checked: a row
        a token, of that token, with a sum of at most 1."""
        k = self.top if k is None else k
        asked = {"model": self.served, "prompt": [list(prompt) for prompt in prompts], "max_tokens": 1}
        asked |= {"temperature": 1.0, "top_p": 1.0, **KINDS[self.name].request(k, further)}
        choices = self._call("/v1/completions", asked).get("choices")
        if not isinstance(choices, list) or len(choices) != len(prompts):
            raise self.error("REFUSED", f"got no choice for each of {len(prompts)} prompts; expected one each")
        choices = sorted(choices, key=lambda choice: int(choice.get("index", 0)))
        return [self._told(choice, prompt, k) for choice, prompt in zip(choices, prompts, strict=True)]

    def _told(self, choice: Mapping[str, Any], prompt: Sequence[int], k: int) -> Told:
        try:
            answer = KINDS[self.name].read(choice, prompt, self.vocabulary)
        except (AttributeError, TypeError, ValueError) as error:
            raise self.error(
                "REFUSED", f"its answer cannot be read ({error}); is it of the kind {self.name}?"
            ) from None
        n, got = len(prompt), len(answer.rows)
        if not got:
            raise self.error("REFUSED", "it told no log-probabilities of the prompt; expected a row for each token")
        if got < n:
            raise self.error("TRUNCATED", f"got {got} rows for {n} tokens: it truncates or drops; expected a row each")
        differing = [place for place, (own, sent) in enumerate(zip(answer.ids, prompt, strict=False))
                     if own is not None and own != sent]  # fmt: skip
        lost = [place for place in range(1, n) if answer.labels[place] is None or answer.rows[place] is None]
        if got > n or len(answer.ids) > n or differing or lost:
            place = min([*differing, *lost, n - 1])
            first = f"it saw {answer.ids[place]} at place {place}, {prompt[place]} was sent"
            raise self.error("TOKENS", f"got {got} rows for {n} token ids, {first}: it adds, drops or changes tokens")
        rows = [_likeliest(row or {}, k) for row in answer.rows[1:]]
        labels = [math.nan if value is None else value for value in answer.labels[1:]]
        for row, label, token in zip(rows, labels, prompt[1:], strict=True):
            total = sum(math.exp(min(value, 50.0)) for value in row.values())
            total += math.exp(min(label, 50.0)) if token not in row else 0.0
            if total > 1 + _SUM or (self.whole and total < 1 - _SUM):
                what = "told" if not self.whole else "all"
                raise self.error(
                    "UNNORMALISED", f"the probabilities of {what} ids sum to {total:.4g}; expected at most 1"
                )
        return Told(rows, labels, answer.texts[1:], answer.next)

    def check(self, windows: Sequence[Sequence[int]]) -> None:
        """Ask what is known (see the module). `windows`: the token ids that will be measured. Sets `top`."""
        longest = max(windows, key=len)
        if self.longest is not None and len(longest) + 1 > self.longest:
            raise self.error(
                "TRUNCATED",
                f"it takes {self.longest} tokens at once; {len(longest) + 1} are needed: set dataset.seq_len",
            )
        probe = list(longest[:_PROBE])
        self._settle_top(probe, len(longest))
        cuts = sorted({max(1, len(probe) * part // 4) for part in (1, 2, 3)})
        first, *shorter = self.ask([probe, *(probe[:cut] for cut in cuts)], further=True)
        self._check_vocabulary(probe, first)
        self._check_rows(first, list(zip(cuts, shorter, strict=True)))
        again, _ = self.ask([probe, list(longest)])
        moved = [abs(a - b) for a, b in zip(first.labels, again.labels, strict=True) if math.isfinite(a - b)]
        self.repeat_difference = float(f"{max(moved, default=0.0):.3g}")
        if self.repeat_difference > _SAME:
            shown = f"the same prompt got log-probabilities that differ by {self.repeat_difference:.3g} nats"
            raise self.error(
                "UNSTABLE", f"{shown}; expected at most {_SAME}: switch sampling filters and speculation off"
            )

    def _settle_top(self, probe: list[int], length: int) -> None:
        """Find how many ids the engine tells of a row: the whole vocabulary where it is small, else the most it grants."""
        size = self.vocabulary and len(self.vocabulary._tokenizer)
        tries = [size] if size and size <= _WHOLE_ROWS and size * length <= 2**21 else []
        refused: EngineError | None = None
        for k in [*tries, *_TOPS]:
            try:
                told = self.ask([probe], k=k)[0]
            except EngineError as error:
                if error.code != "ENGINE-REFUSED":
                    raise
                refused = error
                continue
            self.top = min(k, max(len(row) for row in told.rows))
            self.whole = self.top == size
            return
        assert refused is not None
        raise refused

    def _check_vocabulary(self, probe: Sequence[int], told: Told) -> None:
        if self.vocabulary is None:
            return
        seen = [
            (token, text or "", self.vocabulary.texts(token)) for token, text in zip(probe[1:], told.texts, strict=True)
        ]
        clear = [row for row in seen if row[1].strip() and "\ufffd" not in row[1] and "token_id:" not in row[1]]
        other = [row for row in clear if row[1].strip() not in {text.strip() for text in row[2]}]
        if 4 * len(other) > len(clear):
            token, text, ours = other[0]
            raise self.error(
                "VOCABULARY",
                f"id {token} is {text!r} there and {min(ours, default='no token')!r} in the baseline's tokenizer: "
                "serve a model with the baseline's tokenizer",
            )

    def _check_rows(self, whole: Told, shorter: Sequence[tuple[int, Told]]) -> None:
        known = [(cut, told.next) for cut, told in shorter if told.next]
        if not known:
            raise self.error(
                "REFUSED", "it told no distribution of the next token; expected logprobs with max_tokens 1"
            )
        agrees = {
            shift: all(
                0 <= cut - 1 + shift < len(whole.rows) and _alike(following, whole.rows[cut - 1 + shift])
                for cut, following in known
            )
            for shift in (0, -1, 1)
        }
        if agrees[0]:
            return
        if agrees[-1] or agrees[1]:
            raise self.error(
                "SHIFTED", "row i of a prompt is the distribution of another token than token i: it is off by one"
            )
        raise self.error(
            "INCONSISTENT", "the rows of a prompt do not agree with what it says comes next after the same tokens"
        )

    def _call(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Send one request, again where the engine is busy or the connection breaks, and return the JSON object."""
        key, timeout = settings.get("INVARLOCK_ENGINE_KEY"), float(settings.get("INVARLOCK_ENGINE_TIMEOUT"))
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address.url + path, data, headers)
        last = ""
        for attempt in range(_ATTEMPTS):
            time.sleep(_PAUSE * 2 ** (attempt - 1) if attempt else 0)
            try:
                with self._opener.open(request, timeout=timeout) as response:
                    text = response.read(_MOST_BYTES + 1)
                found = json.loads(text) if len(text) <= _MOST_BYTES else None
            except urllib.error.HTTPError as error:
                said = error.read(2000).decode("utf-8", "replace").replace(str(key or "\0"), "***")
                last = f"HTTP {error.code} to {path}: {' '.join(said.split())[:300]}"
                if error.code not in _BUSY:
                    raise self.error("REFUSED", f"{last}") from None
            except TimeoutError:
                last = f"no answer to {path} within {timeout:g} s"
                if attempt:  # whoever hangs twice hangs
                    break
            except (OSError, http.client.HTTPException) as error:
                last = f"{path}: {getattr(error, 'reason', None) or error or type(error).__name__}"
                if isinstance(getattr(error, "reason", None), TimeoutError) and attempt:
                    break
            except ValueError:
                raise self.error(
                    "REFUSED", f"its answer to {path} is not JSON; is it of the kind {self.name}?"
                ) from None
            else:
                if not isinstance(found, dict):
                    raise self.error("REFUSED", f"its answer to {path} is no JSON object of at most 1 GB")
                return found
        raise self.error("UNREACHABLE", f"{last}; tried {attempt + 1} times: is it running?")


def _likeliest(row: Row, k: int) -> Row:
    """Return the k most likely ids; an engine may add the token itself to them."""
    if len(row) <= k:
        return row
    return dict(sorted(row.items(), key=lambda item: -item[1])[:k])


def _alike(one: Row, other: Row) -> bool:
    """Whether two rows tell the same distribution: most of the likeliest ids of the one, with the same values."""
    top = sorted(one, key=lambda token: -one[token])[:_LOOKED_AT]
    near = [token for token in top if token in other and abs(one[token] - other[token]) <= _SAME]
    return 2 * len(near) > len(top)
