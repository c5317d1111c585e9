"""From what guards saw under harmless edits to thresholds. Pure: rows in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from invarlock.core.exceptions import DataError
from invarlock.stats.linalg import SIGMA_CONTRACT

__all__ = ["Rows", "rmt_thresholds", "spectral_thresholds", "ve_thresholds"]

Rows = Sequence[Mapping[str, Any]]
_ERROR_SHARE = 5.0  # the estimator's error is at most tau divided by this, or z would be noise
_LEAST_RUNS = 10
_QUANTILE, _SAFETY, _LEAST = 0.999, 4.0, 0.05  # of the margin over what was seen


def _by_family(rows: Rows, column: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in rows:
        for family, values in row[column].items():
            found.setdefault(family, []).extend(values)
    if len(rows) < _LEAST_RUNS or not found:
        raise DataError(f"got {len(rows)} harmless runs, expected at least {_LEAST_RUNS}: use more seeds or models")
    return found


def spectral_thresholds(rows: Rows, *, false_alarms: float = 0.05, modules: int = 256) -> dict[str, Any]:
    """Return `deadband`, and `tau` and `kappa` by family, from ln(sigma1 / sigma0) of every matrix in every run.

    The deadband has the margin of `_margin` over all families; it is what decides. tau is the robust deviation about 0
    (1.4826 times the median magnitude), at least five times the estimator's tolerance. kappa is the larger of the normal
    quantile at which a model of `modules` matrices alarms with probability `false_alarms`, and the largest |z| seen.
    """
    from scipy.stats import norm

    quantile = float(norm.isf(false_alarms / (2 * modules)))
    tau, kappa = {}, {}
    families = _by_family(rows, "spectral")
    for family, values in families.items():
        sizes = np.abs(values)
        tau[family] = max(1.4826 * float(np.median(sizes)), _ERROR_SHARE * SIGMA_CONTRACT["tol"])
        kappa[family] = max(quantile, float(sizes.max()) / tau[family])
    return {"deadband": max(map(_margin, families.values())), "tau": tau, "kappa": kappa}


def rmt_thresholds(rows: Rows) -> dict[str, dict[str, float]]:
    """Return `epsilon` by family from ln(r1 / r0), with the margin of `_margin`."""
    return {"epsilon": {family: _margin(values) for family, values in _by_family(rows, "rmt").items()}}


def _margin(values: Sequence[float]) -> float:
    """`_SAFETY` times the quantile of |ratio - 1| seen under harmless edits, taken on the logarithm, at least `_LEAST`.

    The floor leaves room for changes that are meant: an adapter that doubles what was intended moves an edge by 1 to 3 %,
    rounding by a tenth of a percent.
    """
    return max(_LEAST, math.expm1(_SAFETY * float(np.quantile(np.abs(values), _QUANTILE))))


def ve_thresholds(rows: Rows, *, level: float = 0.95) -> dict[str, float]:
    """Return `min_effect_lognll`: the gain in nats a token that scaling shows where there is nothing to repair."""
    gains = [max(0.0, -float(row["estimate"])) for row in rows if row["estimate"] is not None]
    return {"min_effect_lognll": float(np.quantile(gains, level)) if gains else 0.0}
