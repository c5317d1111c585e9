"""A served engine for the tests: a model behind the HTTP interface of vLLM or of OpenAI's completions, honest or not.

Each fault is one that servers in the field have, or a lie; `Faults` names them.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

KEY = "a-secret-key"


@dataclass
class Server:
    """One server. `fault` names what is wrong with it; `busy`: how many requests get a 503 first; `most`: ids it tells."""

    model: Any
    tokenizer: Any = None
    fault: str = ""
    busy: int = 0
    most: int = 20
    die_after: int | None = None
    key: str | None = None
    requests: list[Any] = field(default_factory=list)
    url: str = ""

    def log_probs(self, prompt: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            rows = self.model(input_ids=torch.tensor([prompt])).logits[0].double().log_softmax(-1)
        if self.fault == "noisy":
            rows = rows + 0.5 * torch.randn_like(rows)
            rows = rows.log_softmax(-1)
        if self.fault == "lying":
            rows = rows + 0.3
        return rows

    def rows(self, prompt: Sequence[int], k: int) -> list[dict[int, float] | None]:
        """What it says of each token of a prompt, and of the one after it."""
        values = self.log_probs(prompt)
        rows: list[dict[int, float] | None] = [None]
        tokens = [*prompt[1:], None]
        if self.fault == "off by one":
            values = torch.cat([values[1:], values[-1:]])
        if self.fault == "renormalised":  # over the ids that it tells
            k = min(k, 8)
        for token, row in zip(tokens, values, strict=True):
            top = row.topk(min(k, len(row)))
            shown = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            if self.fault == "renormalised":
                total = top.values.logsumexp(0).item()
                shown = {key: value - total for key, value in shown.items()}
            if token is not None:
                shown.setdefault(token, float(row[token]))
            rows.append(shown)
        if self.fault == "another next":
            rows[-1] = {key: -1.0 - 0.7 * rank for rank, key in enumerate(reversed(rows[-1] or {}))}
        return rows

    def text(self, token: int) -> str:
        if self.fault == "other vocabulary":
            token = (token + 7) % self.model.config.vocab_size
        return f"<{token}>" if self.tokenizer is None else str(self.tokenizer.decode([token]))

    def seen(self, prompt: Sequence[int]) -> list[int]:
        changed = {"adds bos": [0, *prompt], "truncates": list(prompt[-16:]), "drops": [*prompt[:3], *prompt[4:]]}
        return changed.get(self.fault, list(prompt))

    def answer(self, body: Mapping[str, Any]) -> dict[str, Any]:
        choices = []
        for index, prompt in enumerate(body["prompt"]):
            own = self.seen(prompt)
            echo = bool(body.get("echo"))
            k = int(body["logprobs"] if echo else body["prompt_logprobs"])
            if k > self.most:
                raise ValueError(f"requested {k} logprobs, which is greater than max allowed: {self.most}")
            rows = self.rows(own, k)
            tokens = [*own, max(rows[-1] or {0: 0.0}, key=lambda t: (rows[-1] or {})[t])]
            choices.append({"index": index, **(self._echoed if echo else self._vllm)(tokens, rows, body)})
        return {"choices": choices[::-1]}  # in an order of its own

    def _vllm(self, tokens: list[int], rows: list[Any], body: Mapping[str, Any]) -> dict[str, Any]:
        told = [
            row and {str(t): {"logprob": v, "rank": 1, "decoded_token": self.text(t)} for t, v in row.items()}
            for row in rows[:-1]
        ]
        choice: dict[str, Any] = {"prompt_logprobs": told, "prompt_token_ids": tokens[:-1]}
        if body.get("logprobs"):
            choice["logprobs"] = {"top_logprobs": [{f"token_id:{t}": v for t, v in rows[-1].items()}]}
        return choice

    def _echoed(self, tokens: list[int], rows: list[Any], body: Mapping[str, Any]) -> dict[str, Any]:
        named = [row and {self.text(t): v for t, v in row.items()} for row in rows]
        values = [row and row.get(token) for token, row in zip(tokens, rows, strict=True)]
        return {"logprobs": {"tokens": list(map(self.text, tokens)), "token_logprobs": values, "top_logprobs": named}}


@contextlib.contextmanager
def serve(server: Server) -> Iterator[Server]:
    """Run a server on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def reply(self, code: int, content: object) -> None:
            data = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            models = [{"id": "served", "max_model_len": 512}]
            self.reply(200, {"data": models} if self.path == "/v1/models" else {"version": "9.9"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if server.key is not None and self.headers.get("Authorization") != f"Bearer {server.key}":
                self.reply(401, {"error": f"wrong key {self.headers.get('Authorization')}"})
                return
            server.requests.append(body)
            if server.die_after is not None and len(server.requests) > server.die_after:
                self.reply(400, {"error": "out of memory"})
            elif server.fault == "hangs":
                time.sleep(3)
            elif server.fault == "redirects":
                self.send_response(302)
                self.send_header("Location", "http://127.0.0.1:9/")
                self.end_headers()
            elif server.busy > 0:
                server.busy -= 1
                self.reply(503, {"error": "busy"})
            else:
                try:
                    self.reply(200, server.answer(body))
                except ValueError as error:
                    self.reply(400, {"error": str(error)})

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
