"""Which changed tensors carry the damage: the parts that `bisect`, its repair and `sensitivity` order.

Both models are in memory, and nothing else of their size: tensors are patched by pointing a parameter at the baseline's
values, and a gradient is multiplied with its change as soon as it exists.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from invarlock.checkpoints.fingerprints import compare
from invarlock.core.api import ModelLike
from invarlock.core.exceptions import DataError, EditError
from invarlock.eval.sources.base import Scores, Watch, score_all
from invarlock.eval.sources.torch_model import scored_logits
from invarlock.evidence.reference import TokenReference
from invarlock.evidence.windows import Window
from invarlock.flow.job import Job
from invarlock.guards.peaks import BlockPeaks
from invarlock.stats.intervals import Interval
from invarlock.stats.studentised import studentised_interval

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Changed", "Damage", "Trials", "changed_tensors", "part_ways", "rank", "share_unchanged"]

_PART = 1 << 20  # values multiplied at once, in double precision
_EVERY = 4  # tokens of which one is compared where hidden states part
_DRAWS = 2  # labels drawn a window: one pass forward and two back are about five plain passes


@dataclass
class Changed:
    """One parameter that differs. `expected` is the expected damage in nats a token of its change alone."""

    name: str
    values: int
    bytes: int
    rel_change: float | None
    words: str
    expected: float = math.nan
    spread: float = math.nan  # standard error of `expected`

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return dict(vars(self))


@dataclass(frozen=True)
class Damage:
    """How far a model is from the baseline on some windows: ratio of perplexities, mean KL in nats, share of flips."""

    ratio: Interval
    kl: Interval
    flips: Interval
    limits: tuple[float, float, float] = field(repr=False)

    @property
    def ends(self) -> tuple[float, float, float]:
        """Upper ends: log ratio, KL, flips."""
        return self.ratio.hi, self.kl.hi, self.flips.hi

    @property
    def passes(self) -> bool:
        """Say whether all three intervals end below their limits."""
        return all(end <= limit for end, limit in zip(self.ends, self.limits, strict=True))

    @property
    def passes_again(self) -> bool:
        """Say whether as many documents more would show a pass too, nine times in ten: the estimate and twice the way to
        its upper end are below the limit. The estimate on other documents is off by sqrt(2) standard errors, and its own
        end lies two above it, which leaves 2 / sqrt(2) = 1.4 of them, 92 % of a normal distribution."""
        found = zip((self.ratio, self.kl, self.flips), self.limits, strict=True)
        return all(2.0 * interval.hi - interval.estimate <= limit for interval, limit in found)

    @property
    def fails(self) -> bool:
        """Say whether one of the three lies beyond its limit."""
        return not all(
            found.lo <= limit for found, limit in zip((self.ratio, self.kl, self.flips), self.limits, strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        named = {"log_ratio": self.ratio, "kl": self.kl, "flips": self.flips}
        shown = {key: [found.estimate, found.lo, found.hi] for key, found in named.items()}
        return {**shown, "passes": self.passes}

    @property
    def words(self) -> str:
        """Return it in words."""
        return (
            f"ratio {math.exp(min(self.ratio.estimate, 700)):.3f}, {self.kl.estimate:.4f} nats, "
            f"{self.flips.estimate:.1%} flips"
        )


def changed_tensors(baseline: ModelLike, subject: ModelLike) -> dict[str, Changed]:
    """Return the parameters that differ, in the model's order. Raises EditError where the two are built differently."""
    import torch

    old, new = dict(baseline.named_parameters()), dict(subject.named_parameters())
    odd = sorted(old.keys() ^ new.keys()) or [name for name in old if old[name].shape != new[name].shape]
    if odd:
        raise EditError(
            f"the two models are built differently ({odd[0]} and {len(odd) - 1} more); what is missing or reshaped is told "
            "by `invarlock diff`, and a culprit can be searched only where both have the same tensors"
        )
    found = {}
    for name, before in old.items():
        after = new[name].detach()
        if not torch.equal(before.detach(), after.to(before.device)):
            change = compare(name, before.detach(), after.to(before.device))
            size = before.numel() * before.element_size()
            found[name] = Changed(name, before.numel(), size, change.rel_change, change.words)
    return found


def share_unchanged(baseline: ModelLike, subject: ModelLike, changes: Mapping[str, Changed]) -> None:
    """Let the subject use the baseline's memory for every parameter that is the same in both. A search writes to neither;
    whoever writes to one of them afterwards writes to both."""
    old = dict(baseline.named_parameters())
    for name, parameter in subject.named_parameters():
        if name not in changes and (parameter.dtype, parameter.device) == (old[name].dtype, old[name].device):
            parameter.data = old[name].data


def part_ways(job: Job, baseline: ModelLike, subject: ModelLike, windows: Sequence[Window]) -> dict[str, float]:
    """Return for each block the relative distance of its outputs in the two models, over these windows, in order."""
    blocks = BlockPeaks(baseline).paths
    kept: dict[str, list[Tensor]] = {path: [] for path in blocks}
    sums = {path: np.zeros(2) for path in blocks}

    def keep(path: str, outputs: Tensor) -> NDArray[np.float64]:
        kept[path].append(outputs.detach()[::_EVERY].float().cpu())
        return np.zeros(2)

    def against(path: str, outputs: Tensor) -> NDArray[np.float64]:
        before = kept[path].pop(0)  # both models see the same batches in the same order
        after = outputs.detach()[::_EVERY].float().cpu()
        return np.array([float((after - before).square().sum()), float(before.square().sum())])

    def add(path: str, numbers: NDArray[np.float64]) -> None:
        sums[path] += numbers

    for model, see in ((baseline, keep), (subject, against)):
        watch = Watch(tuple(blocks), frozenset(range(len(windows))), see, add)
        for _ in job.source(model).score(windows, watch=[watch]):
            pass
    return {path: math.sqrt(gap / size) if size else 0.0 for path, (gap, size) in sums.items()}


def rank(
    job: Job,
    model: ModelLike,
    subject: ModelLike,
    changes: Mapping[str, Changed],
    windows: Sequence[Window],
    *,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Fill in the expected damage of each change alone, in nats a token; return how many windows were used.

    For labels drawn from the model itself, half the expected square of the gradient times the change is the KL divergence
    to second order (Fisher's information; Martens 2020, "New insights and perspectives on the natural gradient method").
    One pass forward and `_DRAWS` back a window; a change is taken from the two models when it is needed.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in changes}
    changed = dict(subject.named_parameters())
    dots: dict[str, list[float]] = {name: [] for name in parameters}
    done = 0
    with _gradients(model, parameters, changed) as products:
        for window in windows:
            if stop() and done >= 4:
                break
            for found in _draws(job, model, window, products):
                for name, value in found.items():
                    dots[name].append(value)
            done += 1
            job.tick("ranking tensors", done, len(windows))
    for name, values in dots.items():
        if values:
            changes[name].expected = float(np.mean(values))
            changes[name].spread = float(np.std(values) / math.sqrt(len(values)))
    return done


class _Products:
    """Gradient times change of each parameter, summed as the gradients come; no gradient is kept."""

    def __init__(self, changed: Mapping[str, Tensor]) -> None:
        self.changed = changed
        self.found: dict[str, float] = {}

    def take(self, name: str, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None:
            parts = (t.detach().reshape(-1).split(_PART) for t in (gradient, self.changed[name], parameter))  # type: ignore[no-untyped-call]
            dots = (grad.double() @ (new.to(old.device) - old).double() for grad, new, old in zip(*parts, strict=True))
            self.found[name] = self.found.get(name, 0.0) + float(sum(dots))
            parameter.grad = None


@contextlib.contextmanager
def _gradients(
    model: ModelLike, parameters: Mapping[str, Tensor], changed: Mapping[str, Tensor]
) -> Iterator[_Products]:
    """Let gradients flow to these parameters alone, and take away whatever was set up for it afterwards."""
    products = _Products(changed)
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    handles = []
    try:
        for parameter in before:
            parameter.requires_grad_(False)
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(partial(products.take, name)))  # type: ignore[no-untyped-call]
        yield products
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted in before.items():
            parameter.grad = None
            parameter.requires_grad_(wanted)


def _draws(job: Job, model: ModelLike, window: Window, products: _Products) -> Iterator[dict[str, float]]:
    """Yield for each draw of labels half the squared product a token, by parameter."""
    import torch

    log_probs = scored_logits(model, window, job.metric.task, job.device).float().log_softmax(-1)
    generator = torch.Generator(device="cpu").manual_seed(int(window.id[:8], 16) if _is_hex(window.id) else 0)
    for draw in range(_DRAWS):
        drawn = torch.multinomial(log_probs.detach().exp().cpu(), 1, generator=generator).to(log_probs.device)
        products.found = {}
        score = log_probs.gather(-1, drawn).sum()
        score.backward(retain_graph=draw + 1 < _DRAWS)  # type: ignore[no-untyped-call]
        yield {name: 0.5 * value * value / len(log_probs) for name, value in products.found.items()}


def _is_hex(text: str) -> bool:
    return len(text) >= 8 and all(letter in "0123456789abcdef" for letter in text[:8])


class Trials:
    """A subject in which chosen tensors can be given back, and its damage measured on the same windows each time."""

    def __init__(self, job: Job, baseline: ModelLike, subject: ModelLike, windows: Sequence[Window]) -> None:
        self.job, self.windows = job, windows
        self._old = dict(baseline.named_parameters())
        self._new = dict(subject.named_parameters())
        self._subject = subject
        source = job.source(baseline)
        self._base = score_all(source.score(windows, keep_reference=True), len(windows))
        if self._base.reference is None:
            raise DataError("the baseline's distributions were not kept; expected a language model")
        self._reference: TokenReference = self._base.reference
        limits = job.policy.limits
        self._limits = math.log(limits.ratio.limit), limits.divergence.kl_max, limits.divergence.flip_max
        self.count = 0

    @contextlib.contextmanager
    def _given_back(self, names: Sequence[str]) -> Iterator[None]:
        kept = {name: self._new[name].data for name in names}
        try:
            for name in names:
                self._new[name].data = self._old[name].data
            yield
        finally:
            for name, data in kept.items():
                self._new[name].data = data

    def damage(self, given_back: Sequence[str] = ()) -> Damage:
        """Return the damage that is left when these tensors have the baseline's values."""
        self.count += 1
        with self._given_back(given_back):
            scored = self.job.source(self._subject).score(self.windows, reference=self._reference)
            return self._compared(score_all(scored, len(self.windows)))

    def _compared(self, scores: Scores) -> Damage:
        tokens = np.array(scores.tokens, float)
        documents = [window.document for window in self.windows]
        settings: dict[str, Any] = {"level": 0.95, "replicates": 400, "seed": self.job.policy.limits.bootstrap.seed}

        def mean(values: Any) -> Interval:
            finite = np.nan_to_num(np.asarray(values, float), nan=1e6, posinf=1e6, neginf=-1e6)
            return studentised_interval(finite, tokens, documents, **settings)

        def share(name: str) -> Any:
            return np.array([np.nan if value is None else value for value in scores[name]], float) / tokens

        delta = np.asarray(scores.loss) - np.asarray(self._base.loss)
        return Damage(mean(delta), mean(share("kl_sum")), mean(share("flips")), self._limits)
