"""The rules under test, for many samples at a time: what the library does to one, and a test compares them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from benchmarks.statistics.samples import Array, Sample
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtrit

from invarlock.stats.intervals import BCA_MIN_CLUSTERS, BCA_MIN_EFFECTIVE, resample_indices
from invarlock.stats.studentised import studentised_reach

SEED = 42


class Bounds(NamedTuple):
    """Both ends, estimate and standard error, shape (S,); the effective number of documents."""

    lo: Array
    hi: Array
    estimate: Array
    error: Array
    effective: float


def cluster_t(sample: Sample, level: float = 0.95) -> Bounds:
    groups, total = len(sample.sums), float(sample.sizes.sum())
    estimate = sample.sums.sum(axis=0) / total
    residuals = sample.sums - estimate * sample.sizes
    error = np.sqrt(groups / (groups - 1) * np.square(residuals).sum(axis=0)) / total
    effective = 1.0 / float(np.square(sample.sizes / total).sum())
    half = stdtrit(effective - 1.0, (1.0 + level) / 2.0) * error
    return Bounds(estimate - half, estimate + half, estimate, error, effective)


def new_rule(sample: Sample, level: float = 0.95, replicates: int = 1200) -> Bounds:
    """`studentised_interval`."""
    simple, tail = cluster_t(sample, level), (1.0 - level) / 2.0
    reach = studentised_reach(
        sample.sums - simple.estimate * sample.sizes, sample.sizes, tail=tail,
        replicates=max(replicates, int(np.ceil(5.0 / tail))), seed=SEED,
    )  # fmt: skip
    return simple._replace(hi=np.maximum(simple.hi, simple.estimate + reach * simple.error))


def old_rule(sample: Sample, level: float = 0.95, replicates: int = 1200) -> Bounds:
    """`weighted_mean_interval`: BCa from 100 documents (50 effective ones) on, cluster-t below."""
    simple, groups = cluster_t(sample, level), len(sample.sums)
    if groups < BCA_MIN_CLUSTERS or simple.effective < BCA_MIN_EFFECTIVE:
        return simple
    rows = np.concatenate(list(resample_indices(groups, replicates, SEED)))
    flat = rows + groups * np.arange(replicates)[:, None]
    counts = np.bincount(flat.ravel(), minlength=groups * replicates).reshape(replicates, groups).astype(np.float64)
    draws = np.sort((counts @ sample.sums) / (counts @ sample.sizes), axis=0)
    left_out = (sample.sums.sum(axis=0) - sample.sums) / (sample.sizes.sum() - sample.sizes)
    deviation = left_out.mean(axis=0) - left_out
    spread = np.square(deviation).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        acceleration = (deviation**3).sum(axis=0) / (6.0 * spread**1.5)
        bias = ndtri(((draws < simple.estimate).mean(axis=0) + (draws <= simple.estimate).mean(axis=0)) / 2.0)
    ends = []
    for tail in ((1.0 - level) / 2.0, (1.0 + level) / 2.0):
        shifted = bias + ndtri(tail)
        adjusted = ndtr(bias + shifted / (1.0 - acceleration * shifted))
        ends.append(_at(draws, np.where(np.isfinite(adjusted), adjusted, tail)))
    return simple._replace(lo=ends[0], hi=ends[1])


def _at(draws: Array, tails: Array) -> Array:
    """numpy's "linear" quantile, one a column of sorted draws."""
    place = (len(draws) - 1) * tails
    below = np.minimum(place.astype(np.intp), len(draws) - 2)
    columns = np.arange(draws.shape[1])
    low, high = draws[below, columns], draws[below + 1, columns]
    return np.asarray(low + (place - below) * (high - low))


RULES = {"old": old_rule, "new": new_rule}


def accuracy_passes(delta: Array, floor: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether the old and the new rule pass differences (S, documents, examples each) at `floor`, a share.

    The new one passes when the floor lies below the estimate and outside the score interval, which needs no bounds.
    """
    simulations, documents, each = delta.shape
    n, sums = documents * each, delta.sum(axis=2)
    old = old_rule(Sample(sums.T, np.full((documents, 1), float(each)), np.nan))
    gained, lost = (np.count_nonzero(delta == sign, axis=(1, 2)).astype(float) for sign in (1.0, -1.0))
    mean = (gained - lost) / n
    quantile, effect = ndtri(0.975), np.ones(simulations)
    if each > 1:
        discordant = gained + lost
        simple = (discordant - n * mean**2) * n / (n - 1)
        robust = np.square(sums - each * mean[:, None]).sum(axis=1) * documents / (documents - 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            seen = np.where(simple > 0.0, np.maximum(robust / simple, 1.0), 1.0)
        quantile, effect = stdtrit(documents - 1.0, 0.975), (discordant * seen + 2.0 * each) / (discordant + 2.0)
    linear = gained + lost + floor * (gained - lost - 2.0 * n)
    root = np.sqrt(np.maximum(linear**2 + 8.0 * n * lost * floor * (1.0 - floor), 0.0))
    variance = n * ((linear + root) / (2.0 * n) + floor * (1.0 - floor))
    outside = (gained - lost - n * floor) ** 2 > quantile**2 * effect * variance
    return old.lo >= floor - 1e-12, (mean > floor) & outside
