"""What an edit really does: exact ratio, exact KL and flips, on text that no certificate used.

Two kinds of text, documentation and source code of the standard library, up to ten times the tokens of a certificate
each, as far as the text reaches. Sequential, to save time: after every
block the measurement of both stops when some figure of a text is beyond its limit by more than 5 standard errors, or
every figure of every text is inside by more than 5 (standard errors over documents). Full distributions, no shortcut,
and none of the library's forward loop: the baseline's distributions are recomputed from its last hidden states.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from invarlock.core.exceptions import TooLittleTextError
from invarlock.eval.data.base import Document, Pair, PairProvider, TextProvider
from invarlock.eval.data.python_docs import PythonDocsProvider, module_sources
from invarlock.eval.data.synthetic import SyntheticSeq2SeqProvider
from invarlock.evidence.windows import IGNORED, Window, mask_tokens, windows_from_provider
from invarlock.policy.resolve import resolve_policy

BLOCK_TOKENS = 3072  # run through the model between two looks
DECIDED = 5.0  # standard errors


@lru_cache(maxsize=1)
def _code() -> tuple[Document, ...]:
    found = module_sources("test")
    return tuple(Document(f"code:{name}", path.read_text(encoding="utf-8", errors="replace")) for name, path in found)


class _CodeText(TextProvider):
    name: ClassVar[str] = "code"

    def documents(self, split: str | None = None) -> list[Document]:
        return list(_code())


class _CodePairs(PairProvider):
    name: ClassVar[str] = "code_pairs"

    def pairs(self, split: str | None = None) -> list[Pair]:
        found = []
        for document in _code():
            words = document.text.split(" ")
            for start in range(0, len(words) - 60, 60):
                source, target = " ".join(words[start : start + 30]), " " + " ".join(words[start + 30 : start + 60])
                found.append(Pair(f"{document.document_id}:{start}", document.document_id, source, target))
        return found


def write_code(folder: Path, task: str) -> dict[str, str]:
    """Write the source code for certificates to read, and return their `dataset` section."""
    path = folder / ("code_pairs.jsonl" if task == "seq2seq" else "code.jsonl")
    if task == "seq2seq":
        rows = [{"source": pair.source, "target": pair.target} for pair in _CodePairs().pairs()]
    else:
        rows = [{"text": document.text} for document in _code()]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return {"provider": "local_jsonl_pairs" if task == "seq2seq" else "local_jsonl", "file": str(path)}


def other_windows(
    tokenizer: Any, task: str, used: Sequence[Window], seq_len: int, tokens: int
) -> dict[str, list[Window]]:
    """Return windows by kind of text, at most `tokens` tokens each, none of them with the content of one in `used`."""
    pairs = task == "seq2seq"
    docs = SyntheticSeq2SeqProvider() if pairs else PythonDocsProvider()
    taken = {_content(window, task) for window in used}
    found = {}
    for name, provider in (("docs", docs), ("code", _CodePairs() if pairs else _CodeText())):
        count = 2 * tokens // seq_len + len(used)
        try:
            parts = provider.windows(tokenizer, preview_n=count - 1, final_n=1, seq_len=seq_len, seed=7)
        except TooLittleTextError as error:
            parts = provider.windows(tokenizer, preview_n=error.fits[0], final_n=error.fits[1], seq_len=seq_len, seed=7)
        windows = windows_from_provider(*parts, seq_len, (len(parts[0]), len(parts[1])))
        if task == "mlm":
            windows = mask_tokens(windows, tokenizer.mask_token_id, tokenizer.all_special_ids, seed=7)
        kept = [w for w in windows.all if _content(w, task) not in taken]
        ends = np.cumsum([len(w.input_ids) for w in kept])
        found[name] = kept[: int(np.searchsorted(ends, tokens)) + 1]
    return found


def _content(window: Window, task: str) -> tuple[int, ...]:
    """Return the tokens as they were before masking."""
    if task == "mlm" and window.labels is not None:
        return tuple(i if label == IGNORED else label for i, label in zip(window.input_ids, window.labels, strict=True))
    return window.input_ids


def limits_of(tier: str) -> dict[str, float]:
    """Return the tier's limits of the figures: log_ratio and kl in nats, flips as a share."""
    metrics = resolve_policy(tier).values["metrics"]
    divergence = metrics["divergence"]
    return {
        "log_ratio": math.log(metrics["pm_ratio"]["limit"]),
        "kl": divergence["kl_max"],
        "flips": divergence["flip_max"],
    }


@dataclass
class _Sums:
    """Per-document sums of one text."""

    rows: dict[str, list[float]] = field(default_factory=dict)  # document -> [tokens, Δ loss, KL, flips]

    def add(self, document: str, values: Sequence[float]) -> None:
        row = self.rows.setdefault(document, [0.0, 0.0, 0.0, 0.0])
        for index, value in enumerate(values):
            row[index] += value

    def figures(self) -> dict[str, float]:
        """Return log_ratio, kl and flips with their standard errors over documents, and tokens."""
        table = np.array(list(self.rows.values()))
        tokens = table[:, 0].sum()
        out: dict[str, float] = {"tokens": float(tokens), "documents": float(len(table))}
        for index, name in enumerate(("log_ratio", "kl", "flips"), start=1):
            mean = float(table[:, index].sum() / tokens)
            residual = table[:, index] - mean * table[:, 0]
            count = len(table)
            out[name] = mean
            out[f"{name}_se"] = math.sqrt(float((residual**2).sum()) * count / max(count - 1, 1)) / float(tokens)
        return out


class Oracle:
    """Holds one baseline's hidden states on the other windows, and judges subjects against it."""

    def __init__(self, baseline: Any, task: str, windows: dict[str, list[Window]], limits: dict[str, float]) -> None:
        self.task, self.limits = task, limits
        self.blocks = {name: list(_blocks(found)) for name, found in windows.items()}
        self.head = baseline.get_output_embeddings()
        self.baseline = baseline
        self.states: dict[tuple[str, int], torch.Tensor] = {}

    def judge(self, subject: Any) -> dict[str, Any]:
        """Return {harmful, nearest, texts: {name: figures}}; `nearest` as in `distance`."""
        sums = {name: _Sums() for name in self.blocks}
        figures: dict[str, dict[str, float]] = {}
        for number in range(max(len(found) for found in self.blocks.values())):
            for name, found in self.blocks.items():
                if number < len(found):
                    self._measure(subject, name, number, sums[name])
                    figures[name] = sums[name].figures()
            if self._decided(figures):
                break
        values = [value for text in figures.values() for value in _values(text, self.limits)]
        harmful = any(not value <= limit for value, limit, _ in values)
        return {"harmful": harmful, "nearest": distance(values), "texts": figures}

    def figures(self, subject: Any, name: str, blocks: int | None = None) -> dict[str, float]:
        """Return the figures on one kind of text, on its first blocks or all, whatever they are."""
        sums = _Sums()
        for number in range(len(self.blocks[name][:blocks])):
            self._measure(subject, name, number, sums)
        return sums.figures()

    def _decided(self, figures: dict[str, dict[str, float]]) -> bool:
        gaps = [
            math.inf if not math.isfinite(value) else (value - limit) / max(se, 1e-12)
            for text in figures.values()
            for value, limit, se in _values(text, self.limits)
        ]
        return max(gaps) > DECIDED or max(gaps) < -DECIDED

    @torch.inference_mode()
    def _measure(self, subject: Any, name: str, number: int, sums: _Sums) -> None:
        batches = self.blocks[name][number]
        key = (name, number)
        if key not in self.states:
            self.states[key] = torch.cat([_states(self.baseline, batch, self.task) for batch in batches])
        start = 0
        for batch in batches:
            labels, scored = _labels(batch, self.task)
            logits = _logits(subject, batch, self.task)[scored]
            before = self.head(self.states[key][start : start + len(logits)]).log_softmax(-1)
            start += len(logits)
            after = logits.float().log_softmax(-1)
            target = labels[scored][:, None]
            loss = (before.gather(1, target) - after.gather(1, target))[:, 0]
            kl = torch.nn.functional.kl_div(after, before, reduction="none", log_target=True).sum(-1)
            top = after.gather(1, before.argmax(-1, keepdim=True))[:, 0]
            flips = (~(top >= after.amax(-1))).double()
            parts = torch.stack([torch.ones_like(flips), loss.double(), kl.double(), flips], 1)
            for window, row in zip(batch, parts.split(scored.sum(1).tolist()), strict=True):
                sums.add(window.document, row.sum(0).tolist())


def _values(text: dict[str, float], limits: dict[str, float]) -> Iterator[tuple[float, float, float]]:
    for name in ("log_ratio", "kl", "flips"):
        yield text[name], limits[name], text[f"{name}_se"]


def distance(values: Sequence[tuple[float, float, float]]) -> float:
    """Return how near the nearest figure is to its limit, in units of (limit - no effect); 0 is at the limit."""
    gaps = [abs(math.expm1(v) / math.expm1(x) - 1) if x < 0.098 else abs(v / x - 1) for v, x, _ in values]
    return min((gap for gap in gaps if math.isfinite(gap)), default=math.inf)


def _blocks(windows: Sequence[Window]) -> Iterator[list[list[Window]]]:
    """Cut windows into blocks of about `BLOCK_TOKENS`, each a list of batches of windows of one length."""
    block: list[Window] = []
    for window in windows:
        block.append(window)
        if sum(len(w.input_ids) for w in block) >= BLOCK_TOKENS:
            yield list(_batches(block))
            block = []
    if block:
        yield list(_batches(block))


def _batches(block: list[Window]) -> Iterator[list[Window]]:
    shapes: dict[tuple[int, int], list[Window]] = {}
    for window in block:
        shapes.setdefault((len(window.input_ids), len(window.labels or ())), []).append(window)
    for same in shapes.values():
        yield from (same[i : i + 16] for i in range(0, len(same), 16))


def _labels(batch: list[Window], task: str) -> tuple[torch.Tensor, torch.Tensor]:
    if task == "causal":
        ids = torch.tensor([w.input_ids for w in batch])
        labels = torch.cat([ids[:, 1:], torch.full((len(batch), 1), IGNORED)], 1)
    else:
        labels = torch.tensor([w.labels for w in batch])
    return labels, labels != IGNORED


def _logits(model: Any, batch: list[Window], task: str) -> torch.Tensor:
    inputs = {"input_ids": torch.tensor([w.input_ids for w in batch])}
    if task == "seq2seq":
        inputs["labels"] = torch.tensor([w.labels for w in batch])
    logits: torch.Tensor = model(**inputs).logits
    return logits


def _states(model: Any, batch: list[Window], task: str) -> torch.Tensor:
    """Return what goes into the output layer at the scored positions, [tokens, width]."""
    caught: list[torch.Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    try:
        _logits(model, batch, task)
    finally:
        handle.remove()
    return caught[0][_labels(batch, task)[1]]


def load_model(adapter: Any, folder: Path) -> Any:
    """Load a checkpoint in single precision for the oracle."""
    return adapter.load_model(str(folder), device="cpu", dtype="float32")
