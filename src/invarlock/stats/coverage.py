"""What a sample would have seen: a PASS says nothing of faults that touch what was not looked at.

A fault that touches a share f of the tokens leaves n of them untouched with (1 - f)^n <= exp(-n f). With a chance of
`SEEN` it was met at least once if f >= -ln(1 - SEEN) / n, which is 3.7 / n at 97.5 %. Where a fault strikes whole documents
the same holds with documents in the place of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from invarlock.core.exceptions import ConfigError, DataError

__all__ = ["SEEN", "VocabularySeen", "smallest_share", "units_to_see", "vocabulary_seen"]

SEEN = 0.975


class VocabularySeen(NamedTuple):
    """`seen` of the `size` ids of the vocabulary occur in the text, a `share` of them.

    `unseen_mass` estimates how much of further text of this kind falls on ids not seen yet: Good-Turing's share of
    tokens whose id occurs once.
    """

    seen: int
    size: int
    share: float
    unseen_mass: float


def smallest_share(units: int, *, chance: float = SEEN) -> float:
    """Return the smallest share of tokens (or documents) that a fault must touch to have been met with `chance`.

    `units` independent tokens or documents were looked at. At most 1, which is also the answer for none. Raises
    ConfigError for a chance outside (0, 1) or a negative number.
    """
    _check(chance)
    if units < 0:
        raise ConfigError(f"got {units} tokens or documents; expected 0 or more")
    return 1.0 if units == 0 else min(1.0, -math.log1p(-chance) / units)


def units_to_see(share: float, *, chance: float = SEEN) -> int:
    """Return how many tokens (or documents) to look at, to meet with `chance` a fault that touches `share` of them."""
    _check(chance)
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"got share {share}; expected above 0 and at most 1")
    return math.ceil(-math.log1p(-chance) / share)


def vocabulary_seen(windows: Iterable[ArrayLike], size: int) -> VocabularySeen:
    """Count the ids, 0 to `size` - 1, of the windows (integer arrays of any shape and length), streamed.

    Raises DataError for an id outside the vocabulary, ConfigError for a size below 1.
    """
    if size < 1:
        raise ConfigError(f"got a vocabulary of {size} ids; expected at least 1")
    counts = np.zeros(size, dtype=np.int64)
    for window in windows:
        ids = np.asarray(window, dtype=np.int64).ravel()
        if ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < size):
            raise DataError(f"got ids {ids.min()} to {ids.max()}; expected 0 to {size - 1}; use the model's tokenizer")
        counts += np.bincount(ids, minlength=size)
    seen, tokens = int(np.count_nonzero(counts)), int(counts.sum())
    unseen = int(np.count_nonzero(counts == 1)) / tokens if tokens else 1.0
    return VocabularySeen(seen, size, seen / size, unseen)


def _check(chance: float) -> None:
    if not 0.0 < chance < 1.0:
        raise ConfigError(f"got chance {chance}; expected a number between 0 and 1, usually {SEEN}")
