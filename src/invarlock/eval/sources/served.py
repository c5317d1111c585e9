"""A served engine as a source: figures from the log-probabilities that it tells of the windows as prompts.

It tells the most likely ids of each token and the token itself. The divergence is then taken over the ids that both sides
know, the token, and the rest as one cell: a lower bound (data processing inequality), exact where the whole vocabulary
came. Activations and weights it does not give.

What was told is kept in `folder`, a file a batch, so that a run that breaks off goes on where it was. Before old answers
are used, the first of them is asked for again: an engine that was started with another model answers otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from invarlock.core.exceptions import DataError
from invarlock.core.files import write_whole
from invarlock.eval import divergence
from invarlock.eval.metrics import Task
from invarlock.eval.sources.base import Column, Scored, Watch, scored_tokens
from invarlock.eval.sources.engines import Engine, Told
from invarlock.evidence.plain import canonical_digest
from invarlock.evidence.reference import TokenReference
from invarlock.evidence.windows import IGNORED, Window, content_digest

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BATCH_TOKENS", "ServedSource"]

BATCH_TOKENS = 1024  # an answer of a few hundred ids a token is some twenty megabytes of JSON
_ARRAYS = ("ids", "log_probs", "label_log_prob")
_NO_ID = 2**31 - 1  # fills a row for which fewer ids were told; its probability is 0
_STILL = 0.02  # nats: mean difference of answers that are the same but for rounding in half precision


class ServedSource:
    """Scores windows through an engine that was checked. `folder`: where answers are kept until they are all there."""

    provides = frozenset(("log_probs", "top_k", "correctness"))
    device = "served"

    def __init__(self, engine: Engine, *, folder: Path | None = None, batch_tokens: int = BATCH_TOKENS) -> None:
        self.engine = engine
        self.folder = folder
        self.task: Task = "causal"
        self.batch_tokens = batch_tokens

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
        """See `Source.score`. Refuses what an engine does not give, and windows that are not whole prompts."""
        if any(one.modules for one in watch):
            raise DataError("a served engine gives no activations; expected guards that need none")
        windows = [window.dressed() for window in windows]
        cut = [_prompt(window) for window in windows]
        counts = [scored_tokens(window, "causal") for window in windows]
        if not windows or min(counts) < 1:
            raise DataError("a window has no scored token; expected at least one in every window")
        if not self.engine.top:
            self.engine.check(cut)
        offsets = list(accumulate(counts, initial=0))
        folder = self._kept(windows, cut)
        for number, indices in enumerate(_batches(cut, self.batch_tokens, first)):
            told = self._told(folder and folder / f"{number:05d}.safetensors", [cut[i] for i in indices])
            yield self._scored(indices, windows, cut, told, reference, offsets, keep_reference, correct)

    def _kept(self, windows: Sequence[Window], cut: Sequence[Sequence[int]]) -> Path | None:
        """Return the folder of these windows' answers, without answers that the engine would no longer give."""
        if self.folder is None:
            return None
        facts = self.engine.facts() | {"repeat_difference": None, "batch_tokens": self.batch_tokens}
        folder = self.folder / canonical_digest([facts, [content_digest(*w.content) for w in windows]])[:16]
        first = folder / "00000.safetensors"
        if first.is_file():
            prompt = cut[next(_batches(cut, self.batch_tokens))[0]]
            moved = _reference(self.engine.ask([prompt])[0]).label_log_prob - _load(first)[0].label_log_prob
            if not float(moved.abs().mean()) <= _STILL:
                for path in folder.glob("*.safetensors"):
                    path.unlink()
        return folder

    def _told(self, path: Path | None, prompts: Sequence[Sequence[int]]) -> list[TokenReference]:
        if path is not None and path.is_file():
            found = _load(path)
            if [len(part.label_log_prob) for part in found] == [len(prompt) - 1 for prompt in prompts]:
                return found
        told = [_reference(one) for one in self.engine.ask(prompts)]
        if path is not None:
            _save(told, path)
        return told

    def _scored(
        self,
        indices: list[int],
        windows: Sequence[Window],
        cut: Sequence[Sequence[int]],
        told: Sequence[TokenReference],
        reference: TokenReference | None,
        offsets: Sequence[int],
        keep_reference: bool,
        correct: bool,
    ) -> Scored:
        import torch

        columns: dict[str, Column] = {"tokens": [], "loss": []}
        scored = Scored(indices, columns)
        for index, whole in zip(indices, told, strict=True):
            places = torch.tensor(_scored_places(windows[index], len(cut[index])))
            part = TokenReference(whole.ids[places], whole.log_probs[places], whole.label_log_prob[places])
            labels = torch.tensor(cut[index][1:])[places]
            columns["tokens"].append(len(labels))
            columns["loss"].append(float(-part.label_log_prob.double().mean()))
            if correct:
                hits = part.label_log_prob >= part.log_probs.amax(-1)
                columns.setdefault("correct", []).append(float(hits.double().mean()))
            if keep_reference:
                scored.references.append(_kept_of(part))
            if reference is not None:
                kl, flips = self._divergence(reference.rows(*offsets[index : index + 2]), part, labels)
                scored.kl.append(kl.numpy())
                for name, value in (
                    ("kl_sum", float(kl.sum())),
                    ("kl_max", float(kl.max())),
                    ("flips", int(flips.sum())),
                ):
                    columns.setdefault(name, []).append(value)
        return scored

    def _divergence(self, old: TokenReference, part: TokenReference, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not self.engine.whole:
            return divergence.told_kl(old, part, labels)
        import torch

        size = part.ids.shape[1]
        dense = torch.full((len(labels), size), -torch.inf).scatter(
            1, part.ids.long().clamp_max(size - 1), part.log_probs
        )
        return divergence.kl_and_flips(old, dense, labels)


def _prompt(window: Window) -> list[int]:
    """Return the tokens of a window that its mask shows: they must be one piece, or they are no prompt."""
    ids = list(window.input_ids)
    if window.mask is not None:
        seen = [place for place, shown in enumerate(window.mask) if shown]
        ids = ids[seen[0] : seen[-1] + 1] if seen else []
        if len(seen) != len(ids):
            raise DataError(
                f"window {window.id!r} has masked tokens between others; expected whole texts for an engine"
            )
    return ids


def _scored_places(window: Window, length: int) -> list[int]:
    """Return which rows of a prompt's answer are scored; row i is of the token at i + 1."""
    start = window.mask.index(1) if window.mask is not None else 0
    if window.labels is None:
        return list(range(length - 1))
    labels = window.labels[start : start + length]
    ids = window.input_ids[start : start + length]
    if any(label not in (IGNORED, token) for label, token in zip(labels[1:], ids[1:], strict=True)):
        raise DataError(
            f"window {window.id!r} has labels that are not its own tokens; expected next tokens for an engine"
        )
    return [place for place, label in enumerate(labels[1:]) if label != IGNORED]


def _batches(prompts: Sequence[Sequence[int]], batch_tokens: int, first: Collection[int] = ()) -> Iterator[list[int]]:
    for wanted in (True, False):
        batch: list[int] = []
        held = 0
        for index in (index for index in range(len(prompts)) if (index in first) is wanted):
            if batch and held + len(prompts[index]) > batch_tokens:
                yield batch
                batch, held = [], 0
            batch.append(index)
            held += len(prompts[index])
        if batch:
            yield batch


def _reference(told: Told) -> TokenReference:
    """Return what was told as arrays, the likeliest id first."""
    import torch

    width = max(1, max(len(row) for row in told.rows))
    ids = torch.full((len(told.rows), width), _NO_ID, dtype=torch.int32)
    log_probs = torch.full((len(told.rows), width), -torch.inf)
    for place, row in enumerate(told.rows):
        ranked = sorted(row.items(), key=lambda item: (-item[1], item[0]))
        ids[place, : len(ranked)] = torch.tensor([token for token, _ in ranked], dtype=torch.int32)
        log_probs[place, : len(ranked)] = torch.tensor([value for _, value in ranked])
    return TokenReference(ids, log_probs, torch.tensor(told.labels))


def _kept_of(part: TokenReference) -> TokenReference:
    top = divergence.TOP
    ids, log_probs = part.ids[:, :top], part.log_probs[:, :top]
    return TokenReference(ids.contiguous(), log_probs.contiguous(), part.label_log_prob)


def _save(told: Sequence[TokenReference], path: Path) -> None:
    from safetensors.torch import save

    arrays = {
        f"{number}.{name}": getattr(part, name).contiguous() for number, part in enumerate(told) for name in _ARRAYS
    }
    write_whole(path, save(arrays))


def _load(path: Path) -> list[TokenReference]:
    """Return what `_save` wrote; files appear whole or not at all."""
    from safetensors.torch import load_file

    arrays = load_file(path)
    count = len({name.partition(".")[0] for name in arrays})
    parts = [[arrays[f"{number}.{name}"] for name in _ARRAYS] for number in range(count)]
    return [TokenReference(ids, log_probs, label) for ids, log_probs, label in parts]
