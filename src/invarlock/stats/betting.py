"""How sure a few documents make it that a mean lies above a limit, whatever its distribution: for a glance, which can only
fail.

A bet on each document that it holds more than the limit allows, at odds that are fair at the limit: with x >= 0 its sum
(KL in nats, or flips), w its tokens, c the limit per token and W the most tokens that a document holds, a fortune of 1
is multiplied by

    1 + `STAKE` (x - c w) / (c W)

which is positive, and 1 or less on average wherever E[x] <= c E[w]. So the fortune reaches 1/a with a probability of at
most a (Ville 1939; bets on means: Waudby-Smith & Ramdas 2024): no variance is estimated, so that six documents serve.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from invarlock.core.exceptions import ConfigError, DataError

__all__ = ["GLANCE_ERROR", "STAKE", "fortune", "won"]

STAKE = 0.9  # of the fortune, on each document
GLANCE_ERROR = 1e-4  # that a glance may make, beside that of the looks


def fortune(sums: ArrayLike, tokens: ArrayLike, limit: float, largest: float) -> float:
    """Return what a fortune of 1 has become: its inverse bounds the chance of this where the mean per token is within
    `limit`.

    `sums` and `tokens` [n]: a value a document, in an order fixed beforehand; `largest`: the most tokens of any
    document that could have come. Infinite where a sum is not finite. Raises DataError for negative sums, unequal
    lengths or a document above `largest`, ConfigError for a limit that is not positive.
    """
    x, w = np.asarray(sums, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    if not 0.0 < limit < math.inf:
        raise ConfigError(f"got a limit of {limit}; expected a positive number: bets are made in units of it")
    if x.shape != w.shape or (x < 0.0).any() or (w > largest).any():
        raise DataError(
            f"got {x.size} sums, {(x < 0.0).sum()} of them negative, and {w.size} documents of up to "
            f"{w.max(initial=0.0):g} tokens; expected as many of both, none negative, none above {largest:g} tokens"
        )
    if not np.isfinite(x).all():
        return math.inf
    with np.errstate(over="ignore"):
        return float(np.prod(1.0 + STAKE * (x - limit * w) / (limit * largest)))


def won(fortune: float) -> bool:
    """Whether a fortune is one that a glance's error allows to act on."""
    return fortune >= 1.0 / GLANCE_ERROR
