"""Looks at the evidence before all of it is measured, at levels that together spend no more than one look at the end.

With the share t of the planned documents measured, a one-sided error of `ERROR` * t^2 may have been made in all (a
spending function, Lan & DeMets 1983). The levels follow by the recursive integration of Armitage, McPherson & Rowe
(1969): S, the sum of the evidence so far, moves between looks like Brownian motion in t; its density on the region
where no look has decided yet is carried from look to look, and each boundary is put where the part of it beyond has
just the error that may be spent there. PASS and FAIL spend an error of their own each.

With looks at .2, .4, .7 and 1 the one-sided levels are .00100, .00332, .00990 and .01903 (z 3.0902, 2.7141, 2.3301,
2.0741). Student's t is used at these levels where the boundaries are normal ones, which is exact at the first look and
close at the others. Looks are counted in documents, the units of information.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from invarlock.core.exceptions import ConfigError

__all__ = ["ERROR", "FRACTIONS", "Look", "looks", "spending_levels"]

FRACTIONS = (0.2, 0.4, 0.7, 1.0)
ERROR = 0.025  # one-sided, of all looks together
_NODES = 128
_FAR = 9.0  # standard deviations below which no density is left


class Look(NamedTuple):
    """Decide after so many `documents` at the one-sided `level`: by an interval of the two-sided level 1 - 2 * level."""

    documents: int
    level: float


def looks(planned_documents: int, minimum: int = 1, *, error: float = ERROR) -> list[Look]:
    """Return the looks at `FRACTIONS` of the planned documents, none of them at fewer than `minimum`.

    An early look below the minimum moves up to it; looks at the same number are one. With no more documents planned
    than the minimum there is one look at the end. Raises ConfigError for numbers below 1.
    """
    if planned_documents < 1 or minimum < 1:
        raise ConfigError(f"got {planned_documents} planned documents, minimum {minimum}; expected at least 1 each")
    counts = {min(planned_documents, max(minimum, math.ceil(t * planned_documents - 1e-9))) for t in FRACTIONS}
    ordered = sorted(counts)
    levels = spending_levels([count / planned_documents for count in ordered], error)
    return [Look(count, level) for count, level in zip(ordered, levels, strict=True)]


def spending_levels(fractions: Sequence[float], error: float = ERROR) -> tuple[float, ...]:
    """Return the one-sided level of each look, at rising `fractions` in (0, 1], when `error` * t^2 is spent by t.

    Raises ConfigError for other fractions, or an error outside (0, 0.5).
    """
    rising = all(a < b for a, b in zip((0.0, *fractions), (*fractions, math.inf), strict=True))
    if not (fractions and rising and fractions[-1] <= 1.0 and 0.0 < error < 0.5):
        raise ConfigError(
            f"got looks at {list(fractions)} and error {error}; expected rising shares in (0, 1], (0, .5)"
        )
    return _levels(tuple(fractions), error)


@lru_cache(maxsize=64)
def _levels(fractions: tuple[float, ...], error: float) -> tuple[float, ...]:
    from scipy.special import ndtr

    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    place, mass, before = np.zeros(1), np.ones(1), 0.0  # where S is, and with which probability, if nothing was decided
    found = []
    for t in fractions:
        step, spend = math.sqrt(t - before), error * (t * t - before * before)
        low, high = 0.0, 20.0 * math.sqrt(t)
        for _ in range(100):  # the chance of more than `middle` falls in it
            middle = (low + high) / 2.0
            low, high = (middle, high) if mass @ ndtr((place - middle) / step) > spend else (low, middle)
        boundary = (low + high) / 2.0
        found.append(float(ndtr(-boundary / math.sqrt(t))))
        floor = -_FAR * math.sqrt(t)
        grid = floor + (boundary - floor) * (nodes + 1.0) / 2.0
        moved = (grid[:, None] - place) / step
        density = np.exp(-0.5 * moved * moved) @ mass / (step * math.sqrt(2.0 * math.pi))
        place, mass, before = grid, density * weights * (boundary - floor) / 2.0, t
    return tuple(found)
