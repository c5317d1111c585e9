"""The tail of per-window log-loss differences: what an average hides.

Quantiles are numpy's "linear" ones (Hyndman & Fan type 7): of n sorted values, the one at position (n - 1) * q, read
between neighbours. Windows count equally here, whatever their number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from invarlock.core.exceptions import ConfigError, DataError, PairingError
from invarlock.stats.intervals import cluster_codes, resample_indices

__all__ = ["TailGate", "TailStats", "tail_gate", "tail_statistics"]


@dataclass(frozen=True)
class TailStats:
    """Quantiles of the per-window difference (nats, subject - baseline) and Pr[difference > epsilon].

    `value` is the gated quantile `quantile`, with its interval `lo`, `hi` (NaN below two clusters). All statistics are
    NaN where a difference is not finite (`non_finite` counts those).
    """

    windows: int
    clusters: int
    non_finite: int
    q50: float
    q90: float
    q95: float
    q99: float
    max: float
    epsilon: float
    tail_mass: float
    quantile: float
    value: float
    lo: float
    hi: float
    level: float


@dataclass(frozen=True)
class TailGate:
    """`evaluated`: there was enough to judge. `acceptable`: measured and within limits, or switched off by policy.

    `status` is what the verdict has to do with it: a breach warns or fails by `mode`, too few windows warn or leave it
    inconclusive, a difference that is not finite fails in every mode but off.
    """

    evaluated: bool
    acceptable: bool
    status: Literal["off", "pass", "warn", "fail", "inconclusive"]
    reason: str


def tail_statistics(
    delta: ArrayLike,
    *,
    epsilon: float,
    documents: Sequence[Hashable] | None = None,
    quantile: float = 0.95,
    level: float = 0.95,
    replicates: int = 1200,
    seed: int = 42,
) -> TailStats:
    """Tail of `delta`, shape (n,), in nats; `documents` are n cluster labels (default: every window its own).

    The interval of the gated quantile is a percentile bootstrap over clusters, on the stream of `bootstrap`. Raises
    PairingError for unequal lengths, DataError for empty input, ConfigError for a quantile or level outside (0, 1).
    """
    values = np.asarray(delta, dtype=np.float64)
    labels = range(len(values)) if documents is None else documents
    if values.ndim != 1 or len(labels) != len(values):
        raise PairingError(f"got {values.shape} differences and {len(labels)} documents; expected one per window")
    if values.size == 0:
        raise DataError("got no differences; expected at least one window; check the window counts")
    if not (0.0 < quantile < 1.0 and 0.0 < level < 1.0):
        raise ConfigError(f"got quantile {quantile} and level {level}; expected numbers between 0 and 1")
    codes = cluster_codes(labels)
    bad = int(np.count_nonzero(~np.isfinite(values)))
    numbers = [math.nan] * 7
    lo = hi = math.nan
    if not bad:
        quantiles = np.quantile(values, [0.5, 0.9, 0.95, 0.99, 1.0, quantile])
        numbers = [*map(float, quantiles), float(np.mean(values > epsilon))]
        lo, hi = _quantile_interval(values, codes, quantile, level, replicates, seed)
    q50, q90, q95, q99, top, gated, mass = numbers
    return TailStats(
        windows=values.size, clusters=int(codes.max()) + 1, non_finite=bad, q50=q50, q90=q90, q95=q95, q99=q99,
        max=top, epsilon=epsilon, tail_mass=mass, quantile=quantile, value=gated, lo=lo, hi=hi, level=level,
    )  # fmt: skip


def tail_gate(stats: TailStats, policy: Mapping[str, Any]) -> TailGate:
    """Judge `stats` by `metrics.pm_tail`: mode, min_windows, quantile, quantile_max, epsilon, mass_max.

    The gate is on the point estimates. `quantile_max` must be given; without `mass_max` (or None) the mass is not
    limited. Raises ConfigError for an unknown mode, or where the statistics were made with another quantile or epsilon.
    """
    mode = policy.get("mode", "warn")
    if mode not in ("off", "warn", "fail"):
        raise ConfigError(f"got metrics.pm_tail.mode {mode!r}; expected off, warn or fail")
    if mode == "off":
        return TailGate(False, True, "off", "switched off by policy")
    for key, used in (("quantile", stats.quantile), ("epsilon", stats.epsilon)):
        if policy.get(key, used) != used:
            raise ConfigError(f"got statistics with {key} {used}; expected {policy[key]}; recompute them")
    if stats.non_finite or not math.isfinite(stats.value):
        return TailGate(True, False, "fail", f"{stats.non_finite} of {stats.windows} differences are not finite")
    floor = policy.get("min_windows", 0)
    if not stats.windows >= floor:
        status: Literal["warn", "inconclusive"] = "warn" if mode == "warn" else "inconclusive"
        return TailGate(False, False, status, f"{stats.windows} windows, {floor} needed")
    name = f"q{100 * stats.quantile:g}"
    limits = [(name, stats.value, policy.get("quantile_max"))]
    if policy.get("mass_max") is not None:
        limits.append(("tail mass", stats.tail_mass, policy["mass_max"]))
    breaches = [f"{what} {x:.4g} exceeds {limit}" for what, x, limit in limits if not _within(x, limit)]
    if breaches:
        return TailGate(True, False, mode, "; ".join(breaches))
    return TailGate(True, True, "pass", "; ".join(f"{what} {x:.4g} within {limit}" for what, x, limit in limits))


def _within(value: float, limit: float | None) -> bool:
    return limit is not None and value <= limit


def _quantile_interval(
    values: NDArray[np.float64], codes: NDArray[np.intp], quantile: float, level: float, replicates: int, seed: int
) -> tuple[float, float]:
    """Percentile bootstrap over clusters, by multiplicities on the once-sorted values."""
    groups = int(codes.max()) + 1
    if groups < 2:
        return math.nan, math.nan
    order = np.argsort(values, kind="stable")
    ordered, owner = values[order], codes[order]
    found = []
    for rows in resample_indices(groups, replicates, seed):
        flat = rows + groups * np.arange(len(rows))[:, None]
        counts = np.bincount(flat.ravel(), minlength=groups * len(rows)).reshape(len(rows), groups)
        reached = np.cumsum(counts[:, owner], axis=1)
        position = (reached[:, -1] - 1) * quantile
        below = np.floor(position)
        low = ordered[(reached <= below[:, None]).sum(axis=1)]
        high = ordered[(reached <= np.ceil(position)[:, None]).sum(axis=1)]
        found.append(low + (position - below) * (high - low))
    lo, hi = np.quantile(np.concatenate(found), [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(lo), float(hi)
