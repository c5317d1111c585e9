"""The histogram of KL values per token: fixed bins, so that counts of any two runs compare."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["HISTOGRAM_EDGES", "histogram", "histogram_problems", "histogram_quantile"]

#: lower edges of the bins in nats: 0, then 20 bins per decade from 1e-7 to 1e2; the last bin is open
HISTOGRAM_EDGES: tuple[float, ...] = (0.0, *(float(10.0 ** (-7 + k / 20)) for k in range(181)))
_ROUNDING = 1e-9  # relative, of sums of single values


def histogram(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Count finite KL values (nats) in the fixed bins; int64 [len(HISTOGRAM_EDGES)]."""
    finite = values[np.isfinite(values)]
    bins = np.searchsorted(HISTOGRAM_EDGES, finite, side="right") - 1
    return np.bincount(bins, minlength=len(HISTOGRAM_EDGES))


def histogram_quantile(counts: Sequence[int], q: float) -> float | None:
    """Return the lower edge of the bin that holds quantile `q` (nats; at most 12 % below the value), None if empty."""
    total = sum(counts)
    if total == 0:
        return None
    index = int(np.searchsorted(np.cumsum(counts), q * total, side="left"))
    return HISTOGRAM_EDGES[min(index, len(HISTOGRAM_EDGES) - 1)]


def histogram_problems(
    counts: Sequence[int], tokens: int, sums: Sequence[float | None], largest: Sequence[float | None]
) -> Iterator[str]:
    """Say where a histogram cannot be that of windows with these token counts, KL sums and largest KL values (nats).

    Nothing is said where a sum is None (not finite): the histogram counts finite tokens only, and the gate fails anyway.
    """
    if any(value is None for value in sums):
        return
    found = np.array(counts, dtype=float)
    if len(found) != len(HISTOGRAM_EDGES) or found.sum() != tokens or (found < 0).any():
        yield f"divergence.histogram counts {found.sum():.0f} tokens in {len(found)} bins; the rows have {tokens}"
        return
    lower, upper = np.array(HISTOGRAM_EDGES), np.array([*HISTOGRAM_EDGES[1:], math.inf])
    total = math.fsum(float(value or 0.0) for value in sums)
    least, most = float((found * lower).sum()), float((found[found > 0] * upper[found > 0]).sum())
    if not least * (1 - _ROUNDING) <= total <= most * (1 + _ROUNDING) + 1e-12:
        yield f"divergence.histogram holds between {least:.6g} and {most:.6g} nats; the rows sum to {total:.6g}"
    top = max((value or 0.0 for value in largest), default=0.0)
    last = int(np.flatnonzero(found)[-1]) if found.any() else 0
    if not lower[last] <= top * (1 + _ROUNDING) + 1e-12 or not top <= upper[last] * (1 + _ROUNDING):
        yield f"divergence.histogram ends at bin {last}; the rows' largest KL is {top:.6g}"
