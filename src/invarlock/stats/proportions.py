"""The difference of two proportions on the same examples: Tango's score interval, widened where examples cluster.

Of n examples, `gained` were wrong before and are right now, `lost` the other way round; delta = (gained - lost) / n.
Tango (1998, Statistics in Medicine 17, 891-908) sets against each candidate delta the statistic

    (gained - lost - n delta) / sqrt(n (2 p + delta (1 - delta))),

p the most likely rate of losses under that delta, the larger root of

    2 n p^2 - (gained + lost + delta (gained - lost - 2 n)) p - lost delta (1 - delta) = 0.

The interval holds every delta whose statistic lies within z. Without a discordant example the variance of the estimate
is zero, which a Wald interval or a bootstrap reads as certainty; the variance under delta is not, and the interval is
-+ z^2 / (n + z^2).

Examples of one document are not independent: z is multiplied by the square root of the design effect, which is the same
as counting n / effect examples in the same proportions. The effect is the cluster-robust variance of the mean
difference over the simple one, at least 1; z is Student's t on K - 1 degrees of freedom (K clusters by Kish), as K
clusters speak of that variance. A few discordant examples say little of it and none say nothing: it is averaged with the
largest effect possible, n / K (each document answers as one), which counts as two discordant examples more. With one in
the place of two, 4.3 % passed at the floor where 100 documents hold 10 examples of ICC 0.3; with two at most 2.8 % in the
60 cells of `python -m benchmarks.statistics`, where the rule before let up to 51 % pass.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from invarlock.core.exceptions import ConfigError, DataError
from invarlock.stats.intervals import cluster_codes, cluster_sums, effective_clusters
from invarlock.stats.paired import AccuracyComparison, accuracy_paired

__all__ = ["accuracy_score_paired", "score_interval"]

_PRIOR = 2.0  # discordant examples that the largest design effect counts for


def score_interval(
    n11: float, n10: float, n01: float, n00: float, *, level: float = 0.95, design_effect: float = 1.0
) -> tuple[float, float]:
    """Tango's interval of (n01 - n10) / n, after less before: n10 examples were right before and are wrong now.

    Counts may be fractions; `level` is two-sided; `design_effect` >= 1 divides them all. Bounds lie in [-1, 1]. Raises
    DataError for a negative or infinite count or no examples, ConfigError for a level outside (0, 1) or an effect < 1.
    """
    counts = (n11, n10, n01, n00)
    if not (all(0.0 <= x < math.inf for x in counts) and sum(counts) > 0.0):
        raise DataError(f"got counts {counts}; expected four finite numbers >= 0, one of them > 0; count the examples")
    if not (0.0 < level < 1.0 and 1.0 <= design_effect < math.inf):
        raise ConfigError(
            f"got level {level} and design effect {design_effect}; expected within (0, 1), and at least 1"
        )
    from scipy.special import ndtri

    return _bounds(n01, n10, float(sum(counts)), float(ndtri((1.0 + level) / 2.0)) ** 2 * design_effect)


def accuracy_score_paired(
    baseline_correct: ArrayLike, subject_correct: ArrayLike, clusters: Sequence[Hashable], *, level: float = 0.95
) -> AccuracyComparison:
    """Compare two models on the same n examples: as `accuracy_paired`, with the score interval ("score") in points.

    Correctness is 0/1, boolean or a soft score in [0, 1] (VQA). Soft scores enter as their sums of gains and of losses:
    among all differences with these sums whole ones vary the most, so that the interval errs on the wide side. The
    interval is never degenerate; its `std_error` is its half width over the quantile used, `effective_clusters` Kish's.
    One cluster of several examples has no interval. Raises DataError for a score outside [0, 1], otherwise errors as in
    `weighted_mean_interval`.
    """
    before, after = (np.asarray(x, dtype=np.float64) for x in (baseline_correct, subject_correct))
    found = accuracy_paired(before, after, clusters, level=level, replicates=1, seed=0, bca=False)
    if any(((x < 0.0) | (x > 1.0)).any() for x in (before, after)):
        raise DataError("got a score outside [0, 1]; expected 0, 1 or a share; score the answers again")
    codes, delta = cluster_codes(clusters), after - before
    shares = np.bincount(codes) / delta.size
    kish = effective_clusters(shares)
    blank = replace(found.interval, lo=math.nan, hi=math.nan, method="none", replicates=0, degenerate=False,
                    std_error=math.nan, effective_clusters=kish)  # fmt: skip
    groups = len(shares)
    if not math.isfinite(found.delta_pp) or groups == 1 < delta.size:
        return replace(found, interval=blank)
    from scipy.special import ndtri, stdtrit

    upper = (1.0 + level) / 2.0
    alone = groups == delta.size
    effect = 1.0 if alone else _design_effect(delta, codes, kish)
    quantile = float(ndtri(upper) if alone else stdtrit(kish - 1.0, upper))
    if not math.isfinite(quantile * quantile * effect):  # one cluster outweighs all others
        return replace(found, interval=blank)
    gained, lost = float(delta[delta > 0].sum()), float(-delta[delta < 0].sum())
    lo, hi = (100.0 * bound for bound in _bounds(gained, lost, float(delta.size), quantile**2 * effect))
    interval = replace(blank, lo=lo, hi=hi, method="score", std_error=(hi - lo) / (2.0 * quantile))
    return replace(found, interval=interval, design_effect=effect)


def _design_effect(delta: NDArray[np.float64], codes: NDArray[np.intp], kish: float) -> float:
    """At least 1; delta (n,) and the clusters' numbers (n,), fewer clusters than examples."""
    centred, groups = delta - delta.mean(), int(codes.max()) + 1
    simple = float(np.square(centred).sum()) * delta.size / (delta.size - 1)
    robust = float(np.square(cluster_sums(codes, centred)).sum()) * groups / (groups - 1)
    seen = max(robust / simple, 1.0) if simple > 0.0 else 1.0
    discordant = float(np.abs(delta).sum())
    return (discordant * seen + _PRIOR * delta.size / kish) / (discordant + _PRIOR)


def _bounds(gained: float, lost: float, n: float, squared: float) -> tuple[float, float]:
    """The ends of the deltas whose squared statistic is at most `squared`, by bisection down to neighbouring numbers."""

    def within(delta: float) -> bool:
        linear = gained + lost + delta * (gained - lost - 2.0 * n)
        root = math.sqrt(max(linear * linear + 8.0 * n * lost * delta * (1.0 - delta), 0.0))
        variance = n * max((linear + root) / (2.0 * n) + delta * (1.0 - delta), 0.0)
        return (gained - lost - n * delta) ** 2 <= squared * variance

    def end(outside: float) -> float:
        inside = (gained - lost) / n
        if within(outside):
            return outside
        while True:
            middle = (inside + outside) / 2.0
            if middle in (inside, outside):
                return inside
            inside, outside = (middle, outside) if within(middle) else (inside, middle)

    return end(-1.0), end(1.0)
