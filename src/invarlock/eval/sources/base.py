"""Who scores windows: the protocol that every source follows, and the columns that come of it.

A source gives one `Scored` a batch, so that a decision can stop it between two; `score_all` collects them in the order of
the windows. Columns are named as in `evidence.rows.COLUMNS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from invarlock.core.exceptions import DataError
from invarlock.eval.divergence import TokenReference, joined
from invarlock.eval.metrics import Task
from invarlock.evidence.histogram import histogram
from invarlock.evidence.windows import IGNORED, Window

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Column",
    "Glance",
    "Progress",
    "Scored",
    "Scores",
    "Seen",
    "Source",
    "Watch",
    "hand_over",
    "score_all",
    "scored_tokens",
]

Column = list[float | None]
Progress = Callable[[int], None]  # how many tokens are scored so far


@dataclass(frozen=True)
class Watch:
    """Whose outputs to hand over while windows are scored.

    `modules`: paths in the model. `windows`: the indices of the windows wanted. `see(path, outputs [T, F])` is called once
    for each wanted window and module and returns a few numbers; `receive(path, numbers)` gets them in the order of the
    windows when all are scored. So what is found depends neither on the batch size nor on which process scored a window.
    """

    modules: tuple[str, ...]
    windows: frozenset[int]
    see: Callable[[str, Tensor], NDArray[np.float64]]
    receive: Callable[[str, NDArray[np.float64]], None]


class Seen(NamedTuple):
    """What a watch saw: its place among the watches, the window, the module, and the numbers."""

    watch: int
    window: int
    path: str
    numbers: NDArray[np.float64]


@dataclass
class Scored:
    """What one batch showed: for each of its windows (`indices`) a value a column, and figures per token.

    `kl`: KL of each scored token [t], a window an array. `references`: the compact distributions of each window.
    `seen`: what the watches saw, for the source itself, which hands it on.
    """

    indices: list[int]
    columns: dict[str, Column] = field(default_factory=dict)
    kl: list[NDArray[np.float64]] = field(default_factory=list)
    references: list[TokenReference] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)


class Source(Protocol):
    """A model in torch, a served engine, an imported log: whatever scores windows.

    `provides` names what it can give: log_probs, top_k, distributions (whole ones), activations, weights, correctness.
    """

    provides: frozenset[str]

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
        """Score every window once, as `Window.dressed` shows it: with the special tokens around it, which are not scored.

        reference: compare each scored token with this one (the subject's side); its tokens follow the order of `windows`.
        keep_reference: also give each token's compact distribution (the baseline's side). correct: also give each window's
        share of tokens that are the model's most likely ones. first: the indices of windows that come before all others, in
        batches of their own. Raises DataError for a window without scored tokens.
        """


@dataclass
class Scores:
    """Every window's figures, in the order of the windows: mean log-loss in nats (NaN where the model gives NaN) and the
    columns that were asked for; the histogram of the tokens' KL; the compact distributions, one token after the other."""

    columns: dict[str, Column]
    kl_histogram: list[int] | None = None
    reference: TokenReference | None = None
    ended: bool = False  # after the first windows alone

    def __getitem__(self, name: str) -> Column:
        return self.columns[name]

    @property
    def tokens(self) -> list[int]:
        """Scored tokens a window."""
        return [int(value or 0) for value in self.columns["tokens"]]

    @property
    def loss(self) -> list[float]:
        """Mean log-loss a window, nats."""
        return [float("nan") if value is None else value for value in self.columns["loss"]]


def hand_over(watch: Sequence[Watch], seen: Iterable[Seen]) -> None:
    """Give each watch what was seen, window after window."""
    for one in sorted(seen, key=lambda one: one.window):  # stable: modules stay in the order in which they ran
        watch[one.watch].receive(one.path, one.numbers)


@dataclass(frozen=True)
class Glance:
    """The windows that are scored first, and what ends all when it is told their columns, in their order."""

    windows: Sequence[int]
    ends: Callable[[dict[str, Column]], bool]


def score_all(
    parts: Iterator[Scored], count: int, progress: Progress | None = None, glance: Glance | None = None
) -> Scores:
    """Collect what a source gives for `count` windows; for those of a glance alone, where it ends all."""
    columns: dict[str, Column] = {}
    missing, ended = set(glance.windows if glance else ()), False
    kl: list[NDArray[np.float64]] = []
    references: dict[int, TokenReference] = {}
    done = 0
    for part in parts:
        for name, values in part.columns.items():
            column = columns.setdefault(name, [None] * count)
            for index, value in zip(part.indices, values, strict=True):
                column[index] = value
        kl += part.kl
        references.update(zip(part.indices, part.references, strict=False))
        done += sum(int(value or 0) for value in part.columns["tokens"])
        if progress is not None:
            progress(done)
        missing -= {*part.indices}
        if glance is not None and not missing:
            seen = {name: [column[index] for index in glance.windows] for name, column in columns.items()}
            if ended := glance.ends(seen):
                columns, count = seen, 0
                break
            glance = None
    if isinstance(parts, Generator):
        parts.close()
    return Scores(
        columns,
        histogram(np.concatenate(kl)).tolist() if kl else None,
        joined([references[index] for index in range(count)]) if references and count else None,
        ended,
    )


def scored_tokens(window: Window, task: Task) -> int:
    """Return how many tokens of the window the metric scores. Raises DataError where the labels cannot be scored."""
    if window.labels is None and task != "causal":
        advice = (
            ", the target's token ids"
            if task == "seq2seq"
            else ": hide tokens with invarlock.evidence.windows.mask_tokens"
        )
        raise DataError(f"window {window.id!r} has no labels; expected 'labels' for a {task} model{advice}")
    labels = window.labels if window.labels is not None else window.input_ids
    if task == "seq2seq":
        return sum(label != IGNORED for label in labels)
    if len(labels) != len(window.input_ids):
        raise DataError(
            f"window {window.id!r} has {len(labels)} labels for {len(window.input_ids)} tokens; expected one a token"
        )
    mask = window.mask or (1,) * len(labels)
    if task == "causal":  # neither a masked token nor what is predicted from one counts
        return sum(bool(m and b) and x != IGNORED for x, m, b in zip(labels[1:], mask[1:], mask, strict=False))
    return sum(bool(m) and label != IGNORED for label, m in zip(labels, mask, strict=True))
