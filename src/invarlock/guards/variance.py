"""Variance guard: would scaling a few outputs back to the baseline's spread help, and by how much?

The spread of a tap (the last projection of a feed-forward or attention block) is the root mean square, over features,
of the deviation of its outputs over the tokens of the sampled windows. The proposed scale of a tap is the ratio of the
baseline's spread to the subject's, filtered and limited. In a run the scales are tried: the log-loss of every
calibration window with them and without, and they stay only if the confidence interval of the weighted mean difference
lies wholly beyond -min_effect_lognll. Off is a normal outcome. In a certificate the proposal only advises.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from invarlock.core.api import AdapterLike, ModelLike
from invarlock.core.exceptions import ConfigError, DataError
from invarlock.eval.sources.base import Source, Watch, score_all
from invarlock.evidence.windows import Window, pick_indices
from invarlock.guards.base import Facts, Policy, Result, Stats, StatsGuard, by_name, finding, result
from invarlock.stats.intervals import weighted_mean_interval
from invarlock.stats.linalg import finite

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["VarianceGuard", "propose"]

_TAPS = {
    "ffn": r"(mlp\.(c_proj|fc_out|fc2|down_proj|dense_4h_to_h)|down_proj|dense_4h_to_h|(^|\.)fc2|feed_forward\.w2"
    r"|(?<!attention\.)output\.dense|DenseReluDense\.wo|ffn\.lin2)$",
    "attn": r"(attn\.(c_proj|out_proj|o_proj)|attention\.(output\.)?dense|(Self|EncDec)Attention\.o|attention\.out_lin"
    r"|self_attention\.dense)$",
}
_TAPS["both"] = "|".join(_TAPS.values())
_CODE = "variance_tap"
_SAMPLED = 8  # windows in which the spread is measured, evenly spaced
_TRIED = 64  # windows on which a proposal is tried
_BOOTSTRAP = {"replicates": 1200, "seed": 42}


class VarianceGuard(StatsGuard):
    """Proposes, tries and judges scales at the taps.

    Policy keys and constructor arguments: `tap` (ffn, attn, both, or a pattern of module names), `deadband` (a scale
    nearer to 1 is not proposed), `max_scale_step` (its distance from 1 is cut to this; None: no limit),
    `min_abs_adjust` (a smaller distance is dropped then), `max_adjusted_modules` (the largest are kept; None: all),
    `topk_backstop` (where nothing leaves the deadband, so many of the largest are proposed still),
    `min_effect_lognll` in nats a token, `predictive_one_sided` (the interval is one-sided 95 % instead of two-sided).
    """

    name = "variance"
    needs = "activations"
    defaults: ClassVar[dict[str, Any]] = {
        "tap": "ffn",
        "deadband": 0.02,
        "min_abs_adjust": 0.012,
        "max_scale_step": 0.03,
        "max_adjusted_modules": None,
        "topk_backstop": 0,
        "min_effect_lognll": 0.0,
        "predictive_one_sided": True,
    }
    _observed: dict[str, _Spread] | None = None

    def contract(self) -> dict[str, Any]:
        return {"tap": self.policy["tap"], "sampled": _SAMPLED, "spread": "rms over features", "version": 1}

    def watch(self, model: ModelLike, adapter: AdapterLike, total: int) -> Watch:
        """Look at the outputs of the taps in a few windows, evenly spaced."""
        seen = self._observed = {path: _Spread() for path in _taps(model, self.policy["tap"])}
        windows = frozenset(pick_indices(total, _SAMPLED))
        return Watch(tuple(seen), windows, _see, lambda path, numbers: seen[path].add(numbers))

    def measure(self, model: ModelLike, adapter: AdapterLike) -> Stats:
        observed, self._observed = self._observed or {}, None
        taps = {name: seen for name, seen in observed.items() if seen.tokens}
        return {"taps": [{"name": n, **tap.stats(), "scalable": _scalable(model, n)} for n, tap in taps.items()]}

    def pair(self, baseline: Stats, subject: Stats) -> Facts:
        both, missing, extra = by_name(baseline["taps"], subject["taps"])
        taps = [{**new, **{key: [old[key], new[key]] for key in ("tokens", "spread")}} for old, new in both]
        return {"taps": taps, "unpaired": missing + extra, "trial": None}

    def judge(self, facts: Facts, policy: Policy) -> Result:
        policy = {**self.defaults, **policy}
        taps = facts["taps"]
        alone = "was seen on one side only; expected the same taps"
        errors = [finding(_CODE, name, f"{name} {alone}") for name in facts["unpaired"]]
        errors += [finding(_CODE, tap["name"], f"{tap['name']}: {why}") for tap in taps if (why := _problem(tap))]
        metrics: dict[str, Any] = {"enabled": False, "taps": len(taps), "proposed": {}, "reason": "", "interval": None}
        if errors:
            metrics["reason"] = "taps are damaged"
            return result(False, f"variance: {errors[0]['message']}", metrics=metrics, errors=errors)
        if not taps:
            metrics["reason"] = "no activations were seen at any tap"
            return result(True, "variance: off, no activations were seen", metrics=metrics, evaluated=False)
        metrics["proposed"] = scales = propose(taps, policy)
        trial = facts.get("trial")
        if not scales:
            metrics["reason"] = "every tap is within the deadband or its adjustment too small"
        elif trial is None:
            metrics["reason"] = "advice only: the scales were not tried"
        elif trial["scales"] != scales:
            text = "the scales tried are not those that follow from the spreads; expected the same"
            errors = [finding(_CODE, next(iter(scales)), text)]
            return result(False, f"variance: {text}", metrics=metrics, errors=errors)
        else:
            metrics.update(_verdict(trial, policy))
        state = "on" if metrics["enabled"] else "off"
        return result(True, f"variance: {state}, {metrics['reason']}", metrics=metrics)

    def remedy(
        self, model: ModelLike, adapter: AdapterLike, outcome: Result, windows: Sequence[Window], source: Source
    ) -> tuple[Result, bool]:
        """Try the proposed scales on up to 64 of the windows; they stay where they help beyond doubt."""
        scales = outcome["metrics"]["proposed"]
        if not outcome["passed"] or not scales or self.baseline is None or self.subject is None:
            return outcome, False
        chosen = [windows[index] for index in pick_indices(len(windows), _TRIED)]
        facts = self.pair(self.baseline, self.subject)
        try:
            plain = score_all(source.score(chosen), len(chosen))
        except DataError as error:  # such as windows of a masked model without labels: there is no loss to compare
            outcome["metrics"]["reason"] = f"not tried: {error}"
            return outcome, False
        with _scaled(model, scales) as keep:
            scaled = score_all(source.score(chosen), len(chosen))
            delta = [finite(after - before) for before, after in zip(plain.loss, scaled.loss, strict=True)]
            documents = [window.document for window in chosen]
            facts["trial"] = {"scales": scales, "delta": delta, "tokens": plain.tokens, "documents": documents}
            outcome = self.judge(facts, self.policy)
            if outcome["metrics"]["enabled"]:
                keep.append(True)
        return outcome, bool(keep)


@contextmanager
def _scaled(model: ModelLike, scales: Mapping[str, float]) -> Iterator[list[bool]]:
    """Scale the taps in place; they are as before afterwards unless the list that is yielded was filled."""
    tensors = [(tensor, scale) for name, scale in scales.items() for tensor in _tensors(model, name)]
    saved = [tensor.clone() for tensor, _ in tensors]
    keep: list[bool] = []
    try:
        for tensor, scale in tensors:
            tensor.mul_(scale)
        yield keep
    finally:
        for (tensor, _), copy in () if keep else zip(tensors, saved, strict=True):
            tensor.copy_(copy)


def propose(taps: list[Mapping[str, Any]], policy: Policy) -> dict[str, float]:
    """Map taps to scales, the largest adjustment first. Pure; `taps` as in the facts."""
    usable = [tap for tap in taps if tap["scalable"] and min(tap["spread"]) > 0]
    changes = {tap["name"]: tap["spread"][0] / tap["spread"][1] - 1 for tap in usable}
    wanted = sorted(changes.items(), key=lambda pair: -abs(pair[1]))
    outside = [pair for pair in wanted if abs(pair[1]) > policy["deadband"]]
    chosen = outside or wanted[: policy["topk_backstop"]]
    step = math.inf if policy["max_scale_step"] is None else policy["max_scale_step"]
    cut = [(name, max(-step, min(step, change))) for name, change in chosen]
    large = [(name, change) for name, change in cut if abs(change) >= (policy["min_abs_adjust"] or 0.0)]
    return {name: 1 + change for name, change in large[: policy["max_adjusted_modules"]] if change}


def _see(path: str, outputs: Tensor) -> NDArray[np.float64]:
    """Return the tokens of a window's outputs, and of each feature the sum and the sum of squares."""
    values = outputs.detach().double() if outputs.device.type != "mps" else outputs.detach().cpu().double()
    sums = (values.sum(dim=0).cpu().numpy(), values.square().sum(dim=0).cpu().numpy())
    return np.concatenate([[float(len(values))], *sums])


@dataclass
class _Spread:
    """Running sums of the outputs of one tap, in double precision."""

    tokens: int = 0
    total: Any = 0.0
    squares: Any = 0.0

    def add(self, numbers: NDArray[np.float64]) -> None:
        total, squares = numbers[1:].reshape(2, -1)
        self.tokens += int(numbers[0])
        with np.errstate(invalid="ignore"):  # what overflowed is shown as not finite
            self.total = self.total + total
            self.squares = self.squares + squares

    def stats(self) -> dict[str, Any]:
        mean = self.total / self.tokens
        with np.errstate(invalid="ignore"):
            variance = np.maximum(self.squares / self.tokens - np.square(mean), 0.0)
        return {"tokens": self.tokens, "spread": finite(float(np.sqrt(variance.mean())))}


def _taps(model: ModelLike, tap: str) -> list[str]:
    try:
        pattern = re.compile(_TAPS.get(tap, tap))
    except (re.error, TypeError) as error:
        raise ConfigError(f"got variance.tap {tap!r}; expected ffn, attn, both or a pattern of module names") from error
    modules = model.named_modules() if hasattr(model, "named_modules") else ()
    return [path for path, _ in modules if pattern.search(path)]


def _scalable(model: ModelLike, path: str) -> bool:
    """A module scales when its weight is a plain parameter: the outputs are linear in weight and bias."""
    import torch

    weight = getattr(model.get_submodule(path), "weight", None)
    return type(weight) is torch.nn.Parameter and weight.is_floating_point() and weight.element_size() >= 2


def _tensors(model: ModelLike, path: str) -> list[Tensor]:
    found = (getattr(model.get_submodule(path), name, None) for name in ("weight", "bias"))
    return [tensor.data for tensor in found if tensor is not None]


def _problem(tap: Mapping[str, Any]) -> str | None:
    (t0, t1), (before, after) = tap["tokens"], (finite(value) for value in tap["spread"])
    if t0 != t1:
        return f"saw {t0} tokens in the baseline, {t1} in the subject; expected the same"
    if before is None or after is None:
        return f"outputs are not finite in the {'baseline' if before is None else 'subject'}"
    if before > 0 and after == 0:
        return "outputs no longer vary in the subject; expected the baseline's spread"
    return None


def _verdict(trial: Mapping[str, Any], policy: Policy) -> dict[str, Any]:
    """Decide from the paired differences of log-loss, scaled minus plain."""
    options: dict[str, Any] = {"level": 0.90 if policy["predictive_one_sided"] else 0.95, **_BOOTSTRAP}
    delta = [math.nan if finite(value) is None else float(value) for value in trial["delta"]]
    interval = weighted_mean_interval(delta, trial["tokens"], trial["documents"], **options)
    limit = -float(policy["min_effect_lognll"])
    figures = {key: finite(getattr(interval, key)) for key in ("estimate", "lo", "hi")}
    reason = (
        f"scaling changes log-loss by {interval.estimate:+.5f} nats, interval up to {interval.hi:+.5f}; "
        f"expected below {limit:+.5f}"
    )
    shown = {**figures, "level": options["level"], "method": interval.method}
    return {"enabled": bool(interval.hi < limit), "reason": reason, "interval": shown}  # False for NaN
