"""Which of many p-values to reject: Benjamini-Hochberg and Bonferroni.

`level` is family-wise, before any division: the false discovery rate for `bh`, the family-wise error rate for
`bonferroni`. `m` is the number of tests made where it exceeds the number of p-values given; those left out count as
not rejected (p = 1).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from invarlock.core.exceptions import ConfigError, DataError

__all__ = ["bh", "bonferroni"]


def bh(p: ArrayLike, level: float, m: int | None = None) -> NDArray[np.bool_]:
    """Benjamini & Hochberg (1995) step-up: reject the k smallest, k the largest i with p_(i) <= i * level / m.

    `p` has shape (n,); the result too, True = rejected. Raises DataError for a p-value outside [0, 1] or NaN,
    ConfigError for a level outside (0, 1) or m < n.
    """
    values, tests = _checked(p, level, m)
    order = np.argsort(values, kind="stable")
    within = np.flatnonzero(values[order] <= np.arange(1, values.size + 1) * level / tests)
    rejected = np.zeros(values.shape, dtype=np.bool_)
    if within.size:
        rejected[order[: within[-1] + 1]] = True
    return rejected


def bonferroni(p: ArrayLike, level: float, m: int | None = None) -> NDArray[np.bool_]:
    """Reject p <= level / m. Shapes and errors as in `bh`."""
    values, tests = _checked(p, level, m)
    return np.asarray(values <= level / tests, dtype=np.bool_)


def _checked(p: ArrayLike, level: float, m: int | None) -> tuple[NDArray[np.float64], int]:
    values = np.asarray(p, dtype=np.float64)
    if values.ndim != 1:
        raise DataError(f"got p-values of shape {values.shape}; expected one dimension; flatten them")
    if not ((values >= 0.0) & (values <= 1.0)).all():
        raise DataError("got a p-value that is NaN or outside [0, 1]; expected a probability; check the statistic")
    if not 0.0 < level < 1.0:
        raise ConfigError(f"got level {level}; expected a number between 0 and 1; correct multiple_testing.level")
    tests = values.size if m is None else m
    if tests < values.size:
        raise ConfigError(f"got m = {tests} for {values.size} p-values; expected m >= their number; omit m")
    return values, max(tests, 1)
