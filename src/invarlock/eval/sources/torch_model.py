"""The one forward loop: batches of windows in, per-window and per-token numbers out.

- Padding at the ends of a window is cut off and windows of one length form a batch, so nothing is padded, and left and
  right padding give the numbers of no padding whatever a model makes of positions.
- The output layer is applied to a few hundred tokens at a time, so logits never exist whole. That shortcut (body, then
  output embedding) is checked against the model's own logits on the first batch, bit for bit, and dropped for models
  that do more after the output layer (soft caps, scales, transforms), however little that changes small logits.
- What follows is done for a few dozen tokens at a time, whose log-probabilities stay in the processor's cache: fresh
  memory for every step over whole chunks would cost more than the arithmetic.
- All sums run in double precision. Baseline and subject see the same batches in the same order, so a model against
  itself gives the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from invarlock.core.exceptions import DataError
from invarlock.eval import divergence
from invarlock.evidence.windows import IGNORED, Window

if TYPE_CHECKING:
    import torch

__all__ = ["ActivationSampler", "LoopResult", "Task", "evenly_spaced", "forward_windows", "scored_tokens"]

Task = Literal["causal", "mlm", "seq2seq"]
Progress = Callable[[int, int], None]

BATCH_TOKENS = 2048
_CHUNK_BYTES = 48 * 2**20  # of logits held at a time
_BLOCK_BYTES = 8 * 2**20  # of log-probabilities worked on at a time
_EXACT_BYTES = 48 * 2**20  # of whole distributions kept of the baseline, for the exact divergence of a few windows
_EXACT_WINDOWS = 8
_PROBE_TOKENS = 16


@dataclass
class ActivationSampler:
    """Tells activation hooks whether the current batch is wanted (`take`) and which of its windows (`rows` [B])."""

    windows: frozenset[int] = frozenset()
    take: bool = False
    rows: np.ndarray[Any, Any] | None = None

    def enter(self, indices: Sequence[int]) -> None:
        wanted = np.array([i in self.windows for i in indices])
        self.take = bool(wanted.any())
        self.rows = wanted if self.take else None

    def leave(self) -> None:
        self.take, self.rows = False, None


@dataclass
class LoopResult:
    """Per-window columns, in the order of the windows given; `reference` holds every scored token in that order."""

    loss: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    correct: list[float] | None = None
    kl_sum: list[float] | None = None
    kl_max: list[float] | None = None
    flips: list[int] | None = None
    kl_histogram: np.ndarray[Any, Any] | None = None
    kl_exact_sum: list[float | None] | None = None
    reference: divergence.TokenReference | None = None
    used_shortcut: bool = False


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """Return `wanted` indices (or all) spread evenly over range(count), the first and last included."""
    if wanted >= count:
        return list(range(count))
    return sorted({round(k * (count - 1) / max(wanted - 1, 1)) for k in range(wanted)})


def scored_tokens(window: Window, task: Task) -> int:
    """Return how many tokens of the window the metric scores. Raises DataError where the labels cannot be scored."""
    if window.labels is None and task != "causal":
        raise DataError(
            f"window {window.id!r} has no labels; expected 'labels' for a {task} model"
            + (
                ": hide tokens with invarlock.evidence.windows.mask_tokens"
                if task == "mlm"
                else ", the target's token ids"
            )
        )
    labels = window.labels if window.labels is not None else window.input_ids
    if task == "seq2seq":
        return sum(label != IGNORED for label in labels)
    if len(labels) != len(window.input_ids):
        raise DataError(
            f"window {window.id!r} has {len(labels)} labels for {len(window.input_ids)} tokens; expected one a token"
        )
    mask = window.mask or (1,) * len(labels)
    seen = [bool(m) and label != IGNORED for label, m in zip(labels, mask, strict=True)]
    if task == "causal":  # neither a masked token nor what is predicted from one counts
        return sum(here and bool(before) for here, before in zip(seen[1:], mask[:-1], strict=True))
    return sum(seen)


def _trimmed(window: Window, task: Task) -> Window:
    """Return the window without the masked tokens at its ends."""
    if window.mask is None or not any(window.mask):
        return window
    start = window.mask.index(1) if 1 in window.mask else 0
    stop = len(window.mask) - (window.mask[::-1].index(1) if 1 in window.mask else 0)
    mask = window.mask[start:stop]
    labels = window.labels if window.labels is None or task == "seq2seq" else window.labels[start:stop]
    return replace(window, input_ids=window.input_ids[start:stop], mask=None if all(mask) else mask, labels=labels)


def _batches(windows: Sequence[Window], batch_tokens: int) -> Iterator[list[int]]:
    def shape(window: Window) -> tuple[int, int]:
        return len(window.input_ids), len(window.labels) if window.labels is not None else 0

    by_shape: dict[tuple[int, int], list[int]] = {}
    for index, window in enumerate(windows):
        by_shape.setdefault(shape(window), []).append(index)
    for key in sorted(by_shape, reverse=True):
        size = max(1, batch_tokens // sum(key))
        indices = by_shape[key]
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


@dataclass
class _Batch:
    indices: list[int]
    inputs: dict[str, Any]
    labels: torch.Tensor  # [B, T], IGNORED where nothing is scored, aligned with the logits that predict them
    scored: torch.Tensor  # [B, T] bool


def _collate(windows: Sequence[Window], indices: list[int], task: Task, device: str) -> _Batch:
    import torch

    rows = [windows[i] for i in indices]
    ids = torch.tensor([w.input_ids for w in rows], device=device)
    labels = torch.tensor([w.labels if w.labels is not None else w.input_ids for w in rows], device=device)
    inputs: dict[str, Any] = {"input_ids": ids}
    masked = any(w.mask is not None for w in rows)
    if masked:
        mask = torch.tensor([w.mask or [1] * len(w.input_ids) for w in rows], device=device)
        inputs["attention_mask"] = mask
        if task != "seq2seq":
            labels = labels.masked_fill(mask == 0, IGNORED)
    if task == "causal":
        labels = torch.cat([labels[:, 1:], labels.new_full((len(rows), 1), IGNORED)], dim=1)
        if masked:
            labels = labels.masked_fill(mask == 0, IGNORED)
    if task == "seq2seq":
        inputs["labels"] = labels
    return _Batch(indices, inputs, labels, labels != IGNORED)


class _LogProbs:
    """Yields the log-probabilities at the scored positions of a batch, a block of tokens at a time."""

    def __init__(self, model: Any, task: Task) -> None:
        self.model = model
        self.task = task
        self.body = getattr(model, "base_model", None)
        self.head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        usable = task == "causal" and self.head is not None and self.body is not None and self.body is not model
        self.shortcut: bool | None = None if usable else False  # None: not yet checked

    def _call(self, batch: _Batch) -> Any:
        inputs = dict(batch.inputs)
        if self.task == "seq2seq":
            inputs["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels=inputs.pop("labels"))
        keywords = {"use_cache": False} if self.task != "mlm" and hasattr(self.model, "config") else {}
        output = self.model(**inputs, **keywords)
        return output.logits if hasattr(output, "logits") else output[0] if isinstance(output, tuple) else output

    def _hidden(self, batch: _Batch) -> torch.Tensor:
        assert self.body is not None
        hidden: torch.Tensor = self.body(**batch.inputs, use_cache=False).last_hidden_state
        return hidden

    def _check_shortcut(self, batch: _Batch) -> bool:
        """Compare both ways on one window; a model whose body has another call signature has no shortcut.

        Both ways are the same operations, so they give the same bits (NaN included) unless the model does something more;
        a soft cap on the small logits of one window would hide in any tolerance.
        """
        import torch

        cut = slice(0, 1), slice(0, _PROBE_TOKENS)  # a few tokens: whole logits of a window can be large
        inputs = {key: value[cut] for key, value in batch.inputs.items()}
        probe = _Batch(batch.indices[:1], inputs, batch.labels[cut], batch.scored[cut])
        try:
            assert self.head is not None
            fast = self.head(self._hidden(probe))
        except (TypeError, AttributeError, RuntimeError):
            return False
        full = self._call(probe)
        if fast.shape != full.shape:
            return False
        fast = fast.to(full.dtype)
        return bool(((fast == full) | (torch.isnan(fast) & torch.isnan(full))).all())

    def choose_path(self, batch: _Batch) -> None:
        """Decide, on the first batch and before any activation hook is told to look, whether the shortcut serves."""
        if self.shortcut is None:
            self.shortcut = self._check_shortcut(batch)

    def blocks(self, batch: _Batch) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield (start, stop, log-probabilities float32 [stop - start, V]) over the scored tokens, row by row."""
        states = (self._hidden(batch) if self.shortcut else self._call(batch))[batch.scored]
        if self.shortcut:
            assert self.head is not None
            width = int(self.head.weight.shape[0]) if hasattr(self.head, "weight") else 50_000
        else:
            width = int(states.shape[-1])
        step = max(1, _CHUNK_BYTES // (4 * width))
        for start in range(0, len(states), step):
            piece = states[start : start + step]
            logits = self.head(piece) if self.shortcut and self.head is not None else piece
            rows = max(1, _BLOCK_BYTES // (4 * width))
            for first in range(0, len(piece), rows):
                block = logits[first : first + rows].float().log_softmax(-1)
                yield start + first, start + first + len(block), block


@dataclass
class _Columns:
    """Collects per-token numbers, window by window, in the caller's order."""

    count: int
    want_kl: bool
    want_correct: bool
    keep_reference: bool
    exact: dict[int, Any]  # window -> whole log-probabilities of the baseline [t, V], where there is room for them
    loss: list[float] = field(init=False)
    tokens: list[int] = field(init=False)
    correct: list[float] = field(init=False)
    kl: list[Any] = field(init=False)
    flips: list[int] = field(init=False)
    references: list[Any] = field(init=False)
    kl_exact: dict[int, float] = field(init=False)

    def __post_init__(self) -> None:
        self.loss = [float("nan")] * self.count
        self.tokens = [0] * self.count
        self.correct = [0.0] * self.count
        self.kl = [None] * self.count
        self.flips = [0] * self.count
        self.references = [None] * self.count
        self.kl_exact = {}


def forward_windows(
    model: Any,
    windows: Sequence[Window],
    *,
    task: Task = "causal",
    device: str = "cpu",
    batch_tokens: int = BATCH_TOKENS,
    want_correct: bool = False,
    keep_reference: bool = False,
    reference: divergence.TokenReference | None = None,
    sampler: ActivationSampler | None = None,
    progress: Progress | None = None,
) -> LoopResult:
    """Measure `model` on every window.

    want_correct: also return each window's share of tokens that are the model's most likely ones.
    keep_reference: also return the compact distribution of each scored token (the baseline's side).
    reference: compare each scored token with this one (the subject's side); rows follow the order of `windows`.
    Returns mean log-loss per window in nats (NaN where the model gives NaN). Raises DataError for a window without
    scored tokens.
    """
    import torch

    windows = [_trimmed(window, task) for window in windows]
    counts = [scored_tokens(window, task) for window in windows]
    if not windows or min(counts) < 1:
        bad = windows[counts.index(0)].id if 0 in counts else "none given"
        raise DataError(f"a window has no scored token ({bad}); expected at least one in every window")
    _check_vocabulary(model, windows)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    exact = (
        dict.fromkeys(_exact_windows(counts, model)) if keep_reference else dict(reference.whole) if reference else {}
    )
    columns = _Columns(len(windows), reference is not None, want_correct, keep_reference, exact)
    source = _LogProbs(model, task)
    done = 0
    with torch.inference_mode(), _evaluation_mode(model):
        for indices in _batches(windows, batch_tokens):
            batch = _collate(windows, indices, task, device)
            source.choose_path(batch)
            if sampler is not None:
                sampler.enter(indices)
            try:
                _measure_batch(source, batch, columns, counts, offsets, reference, sampler)
            finally:
                if sampler is not None:
                    sampler.leave()
            done += len(indices)
            if progress is not None:
                progress(done, len(windows))
    return _collect(columns, bool(source.shortcut))


def _check_vocabulary(model: Any, windows: Sequence[Window]) -> None:
    """Refuse tokens for which the model has no embedding: they come from another model's tokenizer."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    rows = getattr(getattr(embedding, "weight", None), "shape", (0,))[0]
    for window in windows if rows else ():
        low, high = min(window.input_ids), max(window.input_ids)
        if low < 0 or high >= rows:
            raise DataError(
                f"window {window.id!r} has token id {low if low < 0 else high}, but the model knows 0 to {rows - 1}; "
                "expected windows made with the model's own tokenizer"
            )


def _measure_batch(
    source: _LogProbs,
    batch: _Batch,
    columns: _Columns,
    counts: list[int],
    offsets: np.ndarray[Any, Any],
    reference: divergence.TokenReference | None,
    sampler: ActivationSampler | None,
) -> None:
    import torch

    sizes = [counts[i] for i in batch.indices]
    compared = None
    if reference is not None:
        parts = [reference.rows(int(offsets[i]), int(offsets[i + 1])) for i in batch.indices]
        device = batch.labels.device
        ids, log_probs, label = (torch.cat([getattr(p, f) for p in parts]).to(device) for f in _FIELDS)
        compared = divergence.TokenReference(ids, log_probs, label)
    labels = batch.labels[batch.scored]
    pieces: dict[str, list[Any]] = {"loss": [], "hit": [], "kl": [], "flip": [], "reference": []}
    exact = columns.exact.keys() & set(batch.indices)
    for start, stop, log_probs in source.blocks(batch):
        if sampler is not None:
            sampler.leave()  # the body has run: the output layer's chunks are no activations of a window
        target = labels[start:stop]
        label_log_prob = log_probs.gather(-1, target[:, None])[:, 0]
        pieces["loss"].append(-label_log_prob.double())
        if columns.want_correct:
            few = torch.full_like(target, divergence.TIES)
            pieces["hit"].append(divergence.is_top(log_probs, label_log_prob, few))
        if exact:
            _exact_rows(batch.indices, sizes, start, log_probs, columns)
        if columns.keep_reference:
            pieces["reference"].append(divergence.reference_rows(log_probs, label_log_prob))
        if compared is not None:
            kl, flip = divergence.coarsened_kl(compared.rows(start, stop), log_probs, target)
            pieces["kl"].append(kl)
            pieces["flip"].append(flip)
    _file(batch.indices, sizes, pieces, columns)


_FIELDS = ("ids", "log_probs", "label_log_prob")


def _exact_windows(counts: list[int], model: Any) -> list[int]:
    """Return the evenly spaced windows whose whole distributions fit into `_EXACT_BYTES`, at most `_EXACT_WINDOWS`."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(size, int):
        return []
    for wanted in range(_EXACT_WINDOWS, 0, -1):
        picked = evenly_spaced(len(counts), wanted)
        if 4 * size * sum(counts[i] for i in picked) <= _EXACT_BYTES:
            return picked
    return []


def _exact_rows(indices: list[int], sizes: list[int], start: int, log_probs: torch.Tensor, columns: _Columns) -> None:
    """Keep the baseline's whole distributions of the chosen windows, or add the subject's exact divergence from them.

    `log_probs` [n, V] are those of the batch's scored tokens from `start` on.
    """
    import torch

    first = 0
    for index, size in zip(indices, sizes, strict=True):
        low, high = max(first, start), min(first + size, start + len(log_probs))
        if index in columns.exact and low < high:
            rows = log_probs[low - start : high - start]
            kept = columns.exact[index]
            if columns.keep_reference:
                whole = [] if kept is None else [kept]
                columns.exact[index] = torch.cat([*whole, rows.cpu()])
            else:
                theirs = kept[low - first : high - first].to(rows.device).double()
                terms = torch.where(theirs.exp() > 0, theirs.exp() * (theirs - rows.double()), 0.0)
                columns.kl_exact[index] = columns.kl_exact.get(index, 0.0) + float(terms.sum())
        first += size


def _file(indices: list[int], sizes: list[int], pieces: dict[str, list[Any]], columns: _Columns) -> None:
    """Cut the batch's tokens into windows again and file the numbers under their windows."""
    import torch

    for index, loss in zip(indices, torch.split(torch.cat(pieces["loss"]).cpu(), sizes), strict=True):
        columns.loss[index] = float(loss.mean())
        columns.tokens[index] = len(loss)
    if columns.want_correct:
        for index, hit in zip(indices, torch.split(torch.cat(pieces["hit"]).cpu(), sizes), strict=True):
            columns.correct[index] = float(hit.double().mean())
    if columns.want_kl:
        kls, flips = (torch.split(torch.cat(pieces[key]).cpu(), sizes) for key in ("kl", "flip"))
        for index, kl, flip in zip(indices, kls, flips, strict=True):
            columns.kl[index] = kl.numpy()
            columns.flips[index] = int(flip.sum())
    if columns.keep_reference:
        whole = [torch.split(torch.cat([getattr(p, f) for p in pieces["reference"]]).cpu(), sizes) for f in _FIELDS]
        for index, ids, log_probs, label in zip(indices, *whole, strict=True):
            columns.references[index] = divergence.TokenReference(ids, log_probs, label)


def _collect(columns: _Columns, used_shortcut: bool) -> LoopResult:
    import torch

    out = LoopResult(columns.loss, columns.tokens, used_shortcut=used_shortcut)
    if columns.want_correct:
        out.correct = columns.correct
    if columns.want_kl:
        out.kl_sum = [float(k.sum()) for k in columns.kl]
        out.kl_max = [float(k.max()) for k in columns.kl]
        out.flips = columns.flips
        out.kl_histogram = divergence.histogram(np.concatenate(columns.kl))
    if columns.keep_reference:
        ids, log_probs, label = (torch.cat([getattr(r, f) for r in columns.references]) for f in _FIELDS)
        out.reference = divergence.TokenReference(ids, log_probs, label, columns.exact)
    elif columns.kl_exact:
        out.kl_exact_sum = [columns.kl_exact.get(index) for index in range(columns.count)]
    return out


@contextlib.contextmanager
def _evaluation_mode(model: Any) -> Iterator[None]:
    """Switch dropout and the like off in every module, and back on afterwards in those where it was on."""
    training = [module for module in (model.modules() if hasattr(model, "modules") else ()) if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
