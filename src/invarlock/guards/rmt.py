"""RMT guard: how far the leading direction of the activations stands above what independent noise would show.

For each watched module and sampled window, the outputs X [tokens, features] are centred and divided by their own
deviation, feature by feature; constant features are dropped and counted. The edge ratio is sigma_max(X) / (sqrt(m) +
sqrt(n)), the denominator being where the Marchenko-Pastur law puts the largest singular value of noise of unit
variance. A module's ratio is the mean over the windows, a family's the mean over its modules, both weighted by tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from invarlock.core.api import AdapterLike, ModelLike
from invarlock.core.exceptions import ConfigError
from invarlock.eval.sources.base import Watch
from invarlock.evidence.windows import pick_indices
from invarlock.guards.activations import watched_modules
from invarlock.guards.base import Facts, Policy, Result, Stats, StatsGuard, by_name, finding, result
from invarlock.stats.linalg import SIGMA_CONTRACT, finite, marchenko_pastur_edge, sigma_max, single_thread

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Observation", "RMTGuard", "edge_ratio"]

_ROWS = 128  # tokens of a window that are looked at, evenly spaced
_MIN_ROWS = 4
_STATS = ("family", "tokens", "ratio", "features", "constant", "dead_windows")  # of each module
_CONSTANT = 1e-6  # deviation relative to the largest magnitude of the feature


def edge_ratio(outputs: Tensor) -> tuple[float, int]:
    """Return (edge ratio, constant features) of [tokens, features]; NaN when not finite or nothing varies."""
    import torch

    with single_thread(outputs):
        values = outputs.detach().to(torch.float32)
        centred = values - values.mean(dim=0)
        deviation = centred.square().mean(dim=0).sqrt()
        # what is not finite leaves no finite deviation; one that overflowed is not yet a reason
        if not bool(torch.isfinite(deviation).all()) and not bool(torch.isfinite(values).all()):
            return math.nan, 0
        varies = deviation > _CONSTANT * values.abs().amax(dim=0)
        constant = int((~varies).sum())
        if constant == values.shape[1]:
            return math.nan, constant
        standard = centred.div_(deviation) if constant == 0 else centred[:, varies] / deviation[varies]
        return sigma_max(standard) / marchenko_pastur_edge(*standard.shape), constant


def _see(path: str, outputs: Tensor) -> NDArray[np.float64]:
    """Return tokens, features, constant features and edge ratio of a window's outputs."""
    length, features = outputs.shape
    rows = pick_indices(length, _ROWS)
    ratio, constant = edge_ratio(outputs[rows]) if length >= _MIN_ROWS else (math.nan, 0)
    return np.array([length, features, constant, ratio])


@dataclass
class Observation:
    """Running sums over the windows of one module."""

    family: str
    tokens: int = 0
    weighted: float = 0.0  # sum of tokens * ratio
    features: int = 0  # over all windows
    constant: int = 0
    dead_windows: int = 0  # in which nothing varies

    def receive(self, numbers: NDArray[np.float64]) -> None:
        length, features, constant = (int(number) for number in numbers[:3])
        if length < _MIN_ROWS:
            return
        ratio = float(numbers[3])
        self.features += features
        self.constant += constant
        if constant == features:
            self.dead_windows += 1
        else:
            self.tokens += length
            self.weighted += length * ratio

    @property
    def ratio(self) -> float | None:
        return finite(self.weighted / self.tokens) if self.tokens else None


class RMTGuard(StatsGuard):
    """Compares activation edge ratios, family by family.

    Policy keys and constructor arguments: `epsilon` by family (accept r1 <= (1 + epsilon) * r0), `two_sided` (also
    r1 >= r0 / (1 + epsilon)), `activation` {sampling: {windows: {count, indices_policy}}}.
    """

    name = "rmt"
    needs = "activations"
    defaults: ClassVar[dict[str, Any]] = {
        "epsilon": {"ffn": 0.05, "attn": 0.05, "embed": 0.05, "router": 0.05, "other": 0.05},
        "two_sided": True,
        "activation": {"sampling": {"windows": {"count": 8, "indices_policy": "evenly_spaced"}}},
    }
    _observed: Mapping[str, Observation] | None = None

    def contract(self) -> dict[str, Any]:
        seen = {"sees": "outputs", "rows": _ROWS, "min_rows": _MIN_ROWS, "constant_below": _CONSTANT}
        return {**SIGMA_CONTRACT, **seen, "windows": self._sampling(), "version": 1}

    def watch(self, model: ModelLike, adapter: AdapterLike, total: int) -> Watch:
        """Look at the outputs of the watched modules in the windows that the policy samples."""
        seen = self._observed = {path: Observation(family) for path, family in watched_modules(model, adapter).items()}
        sampling = self._sampling()
        windows = pick_indices(total, sampling["count"], sampling["indices_policy"])
        return Watch(tuple(seen), frozenset(windows), _see, lambda path, numbers: seen[path].receive(numbers))

    def measure(self, model: ModelLike, adapter: AdapterLike) -> Stats:
        observed, self._observed = self._observed or {}, None
        modules = {name: seen for name, seen in observed.items() if seen.features}
        return {"modules": [{"name": n, **{key: getattr(m, key) for key in _STATS}} for n, m in modules.items()]}

    def pair(self, baseline: Stats, subject: Stats) -> Facts:
        both, missing, extra = by_name(baseline["modules"], subject["modules"])
        modules = [{**old, **{key: [old[key], new[key]] for key in _STATS[1:]}} for old, new in both]
        return {"modules": modules, "missing": missing, "extra": extra}

    def judge(self, facts: Facts, policy: Policy) -> Result:
        policy = {**self.defaults, **policy}
        errors = [
            finding(f"rmt_{kind}", name, f"{name} was watched in the {side} only; expected the same modules")
            for kind, side in (("missing", "baseline"), ("extra", "subject"))
            for name in facts[kind]
        ]
        problems = [(module, _problem(module)) for module in facts["modules"]]
        errors += [finding("rmt_unusable", m["name"], f"{m['name']}: {problem}") for m, problem in problems if problem]
        usable = [module for module, problem in problems if problem == ""]
        worst = sorted(usable, key=lambda module: -_change(module))
        families = {}
        for family in dict.fromkeys(module["family"] for module in usable):
            members = [module for module in worst if module["family"] == family]
            families[family] = row = _judge_family(members, _epsilon(policy, family), policy["two_sided"])
            if not row["accepted"]:
                top = members[0]["name"]
                text = f"{family}: edge ratio changed by {row['change']:+.1%}, worst {top}; expected {row['expected']}"
                errors.append({**finding("rmt_edge", top, text), "family": family})
        changes = {m["name"]: float(m["ratio"][1] / m["ratio"][0] - 1) for m in worst[:5] if _change(m) > 0}
        shown = [{"module": name, "change": change} for name, change in changes.items()]
        metrics = {"modules": len(usable), "families": families, "worst": shown}
        if not usable and not errors:
            message = "rmt: no activations were seen; expected evaluation windows, so pass calibration data"
            return result(False, message, metrics=metrics, evaluated=False)
        message = f"rmt: {errors[0]['message']}" if errors else f"rmt: {len(families)} families within bounds"
        return result(not errors, message, metrics=metrics, errors=errors)

    def _sampling(self) -> dict[str, Any]:
        windows = self.policy["activation"]["sampling"]["windows"]
        sampling = {**self.defaults["activation"]["sampling"]["windows"], **windows}
        if sampling["indices_policy"] not in ("evenly_spaced", "first", "last") or not sampling["count"] >= 1:
            raise ConfigError(
                f"got activation.sampling.windows {windows!r}; expected count >= 1 and indices_policy evenly_spaced, "
                "first or last"
            )
        return sampling


def _problem(module: Mapping[str, Any]) -> str | None:
    """Return "" for a usable module, None for one without activations on both sides alike, or what is wrong."""
    (t0, t1), (f0, f1), (d0, d1) = module["tokens"], module["features"], module["dead_windows"]
    before, after = (finite(value) for value in module["ratio"])
    if d0 != d1:
        return f"all features constant in {d0} windows of the baseline, {d1} of the subject; expected no change"
    if t0 == t1 == 0 and before is None and after is None and d0 > 0:
        return None  # a module that says nothing on either side, such as an untrained adapter
    if t0 != t1 or f0 != f1:
        return f"saw {t0} tokens, {f0} features in the baseline, {t1} and {f1} in the subject; expected the same"
    if before is None or after is None or before <= 0 or after <= 0:
        return f"activations are not finite in the {'baseline' if before is None else 'subject'}"
    return ""


def _judge_family(members: list[Mapping[str, Any]], epsilon: float, two_sided: bool) -> dict[str, Any]:
    tokens = sum(module["tokens"][0] for module in members)
    before, after = (sum(m["tokens"][side] * m["ratio"][side] for m in members) / tokens for side in (0, 1))
    accepted = after <= (1 + epsilon) * before and (not two_sided or after >= before / (1 + epsilon))
    low = f"{1 / (1 + epsilon) - 1:+.1%} to " if two_sided else "at most "
    figures = {"baseline": before, "subject": after, "change": after / before - 1, "epsilon": epsilon}
    return {**figures, "accepted": accepted, "expected": f"{low}{epsilon:+.1%}"}


def _epsilon(policy: Policy, family: str) -> float:
    table = {**RMTGuard.defaults["epsilon"], **policy["epsilon"]}
    value = finite(table.get(family, table["other"]))
    if value is None or value < 0:
        raise ConfigError(f"got rmt.epsilon {table.get(family)!r} for {family}; expected a number of at least 0")
    return value


def _change(module: Mapping[str, Any]) -> float:
    return abs(math.log(module["ratio"][1] / module["ratio"][0]))
