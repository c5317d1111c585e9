"""A model in torch as a source: the one forward loop, batches of windows in, per-window and per-token numbers out.

- Padding at the ends of a window is cut off and windows of one length form a batch, so nothing is padded, and left and
  right padding give the numbers of no padding whatever a model makes of positions.
- The output layer is applied to a few hundred tokens at a time, so logits never exist whole. That shortcut (body, then
  output embedding) is checked against the model's own logits on the first batch, bit for bit, and dropped for models
  that do more after the output layer (soft caps, scales, transforms), however little that changes small logits.
- What follows is done for a few dozen tokens at a time, whose log-probabilities stay in the processor's cache: fresh
  memory for every step over whole chunks would cost more than the arithmetic.
- All sums run in double precision. Baseline and subject see the same batches in the same order, so a model against
  itself gives the same bits.
- Activations come from this pass alone: hooks on the watched modules hand over the windows that are wanted.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, get_args

from invarlock.core.api import AdapterLike, ModelLike
from invarlock.core.exceptions import DataError
from invarlock.eval import divergence
from invarlock.eval.metrics import Task
from invarlock.eval.sources.base import Column, Scored, Seen, Watch, hand_over, scored_tokens
from invarlock.evidence.reference import TokenReference, joined
from invarlock.evidence.windows import IGNORED, Window

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BATCH_TOKENS", "TorchSource", "scored_logits", "task_of_model"]

BATCH_TOKENS = 2048
_CHUNK_BYTES = 48 * 2**20  # of logits held at a time
_BLOCK_BYTES = 8 * 2**20  # of log-probabilities worked on at a time
_PROBE_TOKENS = 16


def task_of_model(model: object, adapter: AdapterLike | None = None) -> Task:
    """Return how a model's tokens are scored: what its adapter says, else what its class and configuration show."""
    told: Task | None = getattr(adapter, "task", None)
    if told is not None and told in get_args(Task):
        return told
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "seq2seq"
    return "mlm" if type(model).__name__.endswith("MaskedLM") else "causal"


class TorchSource:
    """Scores windows with a live model. `device` defaults to that of its first parameter."""

    provides = frozenset(("log_probs", "top_k", "distributions", "activations", "weights", "correctness"))  # at most

    def __init__(
        self, model: ModelLike, task: Task = "causal", *, device: str | None = None, batch_tokens: int = BATCH_TOKENS
    ) -> None:
        self.model = model
        self.task = task
        if getattr(model, "runs_elsewhere", False):  # its modules are there for their weights, and never called
            self.provides = self.provides - {"activations"}
        parameters = model.parameters() if hasattr(model, "parameters") else ()
        self.device = device or next((str(parameter.device) for parameter in parameters), "cpu")
        self.batch_tokens = batch_tokens
        self.used_shortcut = False

    def score(
        self,
        windows: Sequence[Window],
        *,
        reference: TokenReference | None = None,
        keep_reference: bool = False,
        correct: bool = False,
        watch: Sequence[Watch] = (),
        first: Collection[int] = (),
    ) -> Iterator[Scored]:
        """See `Source.score`. Also refuses tokens for which the model has no embedding."""
        import torch

        windows = [_trimmed(window.dressed(), self.task) for window in windows]
        counts = [scored_tokens(window, self.task) for window in windows]
        if not windows or min(counts) < 1:
            bad = windows[counts.index(0)].id if 0 in counts else "none given"
            raise DataError(f"a window has no scored token ({bad}); expected at least one in every window")
        _check_vocabulary(self.model, windows)
        ids = [window.id for window in windows]
        wanted = _Wanted(counts, list(accumulate(counts, initial=0)), reference, keep_reference, correct, ids)
        path = _LogProbs(self.model, self.task)
        batches = list(_batches(windows, self.task, self.batch_tokens, first))
        seen: list[Seen] = []
        with _evaluation_mode(self.model), _watched(self.model, watch) as hooks:

            def compute(indices: list[int]) -> Scored:
                with torch.inference_mode():
                    if path.shortcut is None:  # on the first batch, whichever is computed first here
                        path.choose(_collate(windows, batches[0], self.task, self.device))
                        self.used_shortcut = bool(path.shortcut)
                    batch = _collate(windows, indices, self.task, self.device)
                    hooks.begin(indices)
                    scored = _score_batch(path, batch, wanted, hooks.in_hand)
                return replace(scored, seen=hooks.taken())

            try:
                for scored in self._deal(batches, compute):
                    seen += scored.seen
                    yield scored
            finally:
                hand_over(watch, seen)

    def _deal(self, batches: Sequence[list[int]], compute: Callable[[list[int]], Scored]) -> Iterator[Scored]:
        """Have every batch computed; a source of several processes shares them out."""
        yield from map(compute, batches)


@dataclass(frozen=True)
class _Wanted:
    """What is asked of every batch. `counts`: scored tokens a window; `offsets`: where each window's tokens start."""

    counts: list[int]
    offsets: list[int]
    reference: TokenReference | None
    keep_reference: bool
    correct: bool
    ids: list[str]

    def places(self, indices: list[int]) -> list[float]:
        """Return where the draws from the tail start, for each token of a batch whose distributions are kept."""
        wanted = indices if self.keep_reference else []
        return [place for i in wanted for place in divergence.places(self.ids[i], self.counts[i])]

    def compared(self, indices: list[int], device: object) -> TokenReference | None:
        """Return the baseline's distributions of a batch's tokens."""
        if self.reference is None:
            return None
        return joined([self.reference.rows(*self.offsets[i : i + 2]) for i in indices]).to(device)


@dataclass
class _Batch:
    indices: list[int]
    inputs: dict[str, Tensor]
    labels: Tensor  # [B, T], IGNORED where nothing is scored, aligned with the logits that predict them
    scored: Tensor  # [B, T] bool


class _Hooks:
    """Looks at the watched modules' outputs of the batch in hand; while `in_hand` is empty, at nothing."""

    def __init__(self, watch: Sequence[Watch]) -> None:
        self.watch = watch
        self.in_hand: list[int] = []
        self._seen: list[Seen] = []

    def begin(self, indices: list[int]) -> None:
        self.in_hand[:] = indices

    def taken(self) -> list[Seen]:
        taken, self._seen = self._seen, []
        return taken

    def look(self, number: int, path: str, module: object, inputs: object, output: object) -> None:
        one = self.watch[number]
        wanted = [row for row, index in enumerate(self.in_hand) if index in one.windows]
        outputs = _by_window(output, len(self.in_hand)) if wanted else None
        if outputs is not None:
            self._seen += [Seen(number, self.in_hand[row], path, one.see(path, outputs[row])) for row in wanted]


@contextlib.contextmanager
def _watched(model: ModelLike, watch: Sequence[Watch]) -> Iterator[_Hooks]:
    """Attach hooks to the watched modules."""
    found = _Hooks(watch)
    modules = dict(model.named_modules()) if watch and hasattr(model, "named_modules") else {}
    with contextlib.ExitStack() as hooks:
        for number, one in enumerate(watch):
            for path in sorted(modules.keys() & one.modules):
                hooks.enter_context(modules[path].register_forward_hook(partial(found.look, number, path)))
        yield found


def _by_window(output: object, count: int) -> Tensor | None:
    """Return a module's output as [count, T, F]; None where it is not one row of tokens a window."""
    tensor: Any = output[0] if isinstance(output, tuple) else output
    if not hasattr(tensor, "ndim") or not tensor.is_floating_point():
        return None
    if tensor.ndim == 2 and tensor.shape[0] % count == 0 and tensor.shape[0] > count:
        tensor = tensor.reshape(count, -1, tensor.shape[-1])  # tokens of a batch in one row, as experts see them
    return tensor if tensor.ndim == 3 and tensor.shape[0] == count else None


def _trimmed(window: Window, task: Task) -> Window:
    """Return the window without the masked tokens at its ends."""
    if window.mask is None or not any(window.mask):
        return window
    seen = [place for place, shown in enumerate(window.mask) if shown]
    cut = slice(seen[0], seen[-1] + 1)
    labels = window.labels if window.labels is None or task == "seq2seq" else window.labels[cut]
    mask = None if all(window.mask[cut]) else window.mask[cut]
    return replace(window, input_ids=window.input_ids[cut], mask=mask, labels=labels)


def _batches(
    windows: Sequence[Window], task: Task, batch_tokens: int, first: Collection[int] = ()
) -> Iterator[list[int]]:
    by_shape: dict[tuple[bool, int, int], list[int]] = {}
    for index, window in enumerate(windows):
        shape = len(window.input_ids), len(window.labels) if window.labels and task != "causal" else 0
        by_shape.setdefault((index in first, *shape), []).append(index)
    for key in sorted(by_shape, reverse=True):
        size, indices = max(1, batch_tokens // sum(key[1:])), by_shape[key]
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def _collate(windows: Sequence[Window], indices: list[int], task: Task, device: str) -> _Batch:
    import torch

    rows = [windows[i] for i in indices]
    ids = torch.tensor([w.input_ids for w in rows], device=device)
    mask = torch.tensor([w.mask or [1] * len(w.input_ids) for w in rows], device=device)
    labels = torch.tensor([w.labels if w.labels is not None else w.input_ids for w in rows], device=device)
    inputs: dict[str, Tensor] = {"input_ids": ids}
    if any(w.mask is not None for w in rows):
        inputs["attention_mask"] = mask
    if task != "seq2seq":
        labels = labels.masked_fill(mask == 0, IGNORED)
    if task == "causal":
        labels = torch.cat([labels[:, 1:], labels.new_full((len(rows), 1), IGNORED)], dim=1)
        labels = labels.masked_fill(mask == 0, IGNORED)
    if task == "seq2seq":
        inputs["labels"] = labels
    return _Batch(indices, inputs, labels, labels != IGNORED)


class _LogProbs:
    """Yields the log-probabilities at the scored positions of a batch, a block of tokens at a time."""

    def __init__(self, model: ModelLike, task: Task) -> None:
        self.model: Any = model
        self.task = task
        self.body: Any = getattr(model, "base_model", None)
        self.head: Any = getattr(model, "get_output_embeddings", lambda: None)()
        usable = task == "causal" and self.head is not None and self.body is not None and self.body is not model
        self.shortcut: bool | None = None if usable else False  # None: not yet checked

    def _full(self, batch: _Batch) -> Any:
        inputs = dict(batch.inputs)
        if self.task == "seq2seq":
            inputs["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels=inputs.pop("labels"))
        keywords = {"use_cache": False} if self.task != "mlm" and hasattr(self.model, "config") else {}
        output = self.model(**inputs, **keywords)
        return output.logits if hasattr(output, "logits") else output[0] if isinstance(output, tuple) else output

    def _hidden(self, batch: _Batch) -> Any:
        return self.body(**batch.inputs, use_cache=False).last_hidden_state

    def choose(self, batch: _Batch) -> bool:
        """Decide, on the first batch and before any hook is told to look, whether the shortcut serves."""
        if self.shortcut is None:
            self.shortcut = self._serves(batch)
        return self.shortcut

    def _serves(self, batch: _Batch) -> bool:
        """Compare both ways on one window; a model whose body has another call signature has no shortcut.

        Both ways are the same operations, so they give the same bits (NaN included) unless the model does something more;
        a soft cap on the small logits of one window would hide in any tolerance.
        """
        import torch

        cut = slice(0, 1), slice(0, _PROBE_TOKENS)  # a few tokens: whole logits of a window can be large
        inputs = {key: value[cut] for key, value in batch.inputs.items()}
        probe = _Batch(batch.indices[:1], inputs, batch.labels[cut], batch.scored[cut])
        try:
            fast = self.head(self._hidden(probe))
        except (TypeError, AttributeError, RuntimeError):
            return False
        full = self._full(probe)
        return fast.shape == full.shape and torch.allclose(fast.to(full.dtype), full, rtol=0, atol=0, equal_nan=True)

    def blocks(self, batch: _Batch) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (start, stop, log-probabilities float32 [stop - start, V]) over the scored tokens, row by row."""
        states = self._hidden(batch) if self.shortcut else self._full(batch)
        states = states[batch.scored.to(states.device)]  # a model of several devices ends on another than it began
        width = states.shape[-1]
        if self.shortcut:
            width = self.head.weight.shape[0] if hasattr(self.head, "weight") else 50_000
        start = 0
        for piece in states.split(max(1, _CHUNK_BYTES // (4 * width))):
            logits = self.head(piece) if self.shortcut else piece
            for block in logits.split(max(1, _BLOCK_BYTES // (4 * width))):
                yield start, start + len(block), block.float().log_softmax(-1)
                start += len(block)


def scored_logits(model: ModelLike, window: Window, task: Task, device: str) -> Tensor:
    """Return the logits [t, V] of one window's scored tokens as `score` sees them; gradients flow where they are on."""
    batch = _collate([_trimmed(window.dressed(), task)], [0], task, device)
    logits: Tensor = _LogProbs(model, task)._full(batch)
    return logits[batch.scored.to(logits.device)]


def _check_vocabulary(model: ModelLike, windows: Sequence[Window]) -> None:
    """Refuse tokens for which the model has no embedding: they come from another model's tokenizer."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    rows = getattr(getattr(embedding, "weight", None), "shape", (0,))[0]
    for window in windows if rows else ():
        if bad := [token for token in (min(window.input_ids), max(window.input_ids)) if not 0 <= token < rows]:
            raise DataError(
                f"window {window.id!r} has token id {bad[0]}, but the model knows 0 to {rows - 1}; "
                "expected windows made with the model's own tokenizer"
            )


def _score_batch(path: _LogProbs, batch: _Batch, wanted: _Wanted, in_hand: list[int]) -> Scored:
    """Run one batch and cut its tokens' figures into windows."""
    import torch

    sizes = [wanted.counts[i] for i in batch.indices]
    compared = wanted.compared(batch.indices, batch.labels.device)
    labels = batch.labels[batch.scored]
    pieces: dict[str, list[Any]] = defaultdict(list)
    place = torch.tensor(wanted.places(batch.indices), dtype=torch.float64, device=labels.device)
    for start, stop, log_probs in path.blocks(batch):
        in_hand.clear()  # the body has run: the output layer's chunks are no activations of a window
        target = labels[start:stop].to(log_probs.device)
        label_log_prob = log_probs.gather(-1, target[:, None])[:, 0]
        pieces["loss"].append(-label_log_prob.double())
        if wanted.correct:
            few = torch.full_like(target, divergence.TIES)
            pieces["correct"].append(divergence.is_top(log_probs, label_log_prob, few))
        if wanted.keep_reference:
            pieces["reference"].append(divergence.reference_rows(log_probs, target, place[start:stop]))
        if compared is not None:
            kl, flip = divergence.kl_and_flips(compared.rows(start, stop).to(log_probs.device), log_probs, target)
            pieces["kl"].append(kl)
            pieces["flips"].append(flip)
    return _cut(batch.indices, sizes, pieces)


def _cut(indices: list[int], sizes: list[int], pieces: dict[str, list[Any]]) -> Scored:
    """Cut a batch's figures per token into columns per window."""
    import torch

    def windows(parts: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.split(torch.cat(parts).cpu(), sizes) if parts else ()

    loss, correct, kl, flips = (windows(pieces[name]) for name in ("loss", "correct", "kl", "flips"))
    columns: dict[str, Column] = {
        "tokens": [*sizes],
        "loss": [float(values.mean()) for values in loss],
        "correct": [float(hit.double().mean()) for hit in correct],
        "kl_sum": [float(values.sum()) for values in kl],
        "kl_max": [float(values.max()) for values in kl],
        "flips": [int(flip.sum()) for flip in flips],
    }
    references = []
    if kept := pieces["reference"]:
        arrays = {name: windows([getattr(part, name) for part in kept]) for name in kept[0].arrays()}
        for place in range(len(indices)):
            references.append(TokenReference(**{n: parts[place] for n, parts in arrays.items()}))
    filled = {name: values for name, values in columns.items() if values}
    return Scored(indices, filled, [values.numpy() for values in kl], references)


@contextlib.contextmanager
def _evaluation_mode(model: ModelLike) -> Iterator[None]:
    """Switch dropout and the like off in every module, and back on afterwards in those where it was on."""
    training = [module for module in getattr(model, "modules", tuple)() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
