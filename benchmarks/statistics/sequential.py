"""The looks as `certify` runs them: documents in an order of chance, the floor of effective documents, looks that pass on
`new_rule` and fail on cluster-t.

Each sample is judged at 0, +1, +2 and +4 times the effect that the whole of it would decide with 80 % power: at 0 the
truth is the limit, and what is decided is decided wrongly.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from benchmarks.statistics.rules import Bounds, cluster_t, new_rule
from benchmarks.statistics.samples import Array, Design, Sample, sample
from benchmarks.statistics.tables import MINIMUM, Extent, Row
from numpy.typing import NDArray
from scipy.special import nctdtrinc, stdtrit

from invarlock.stats.sequential import looks

_ORDERS = 8  # in which documents come, and in each of them a part of the samples
_EFFECTS = (0.0, 1.0, 2.0, 4.0)


#: documents that a look before the last one takes at least: what `tiers.yaml` says, and what it could
CURRENT = 60
EARLY = (30, 40, 50, 60)
#: fewer cells for the plans that are only compared
EARLIER = {"simulations": 2000, "values": ("skew 2", "skew 6", "rare"), "sizes": ("equal", "geometric"), "iccs": (0.3,),
           "planned": (100, 160)}  # fmt: skip


class _Run(NamedTuple):
    """What came of samples (S,) at one effect."""

    passed: NDArray[np.bool_]
    failed: NDArray[np.bool_]
    covered: NDArray[np.bool_]
    used: Array


def sequential(extent: Extent, earliest: tuple[int, ...] = (CURRENT,)) -> list[Row]:
    """Errors where the truth is the limit (nominal .025 each), power, coverage of the interval shown, and share used.

    `power`, `covers`: at one effect; `used 2`, `used 4`: mean share of the tokens at two and four.
    """
    rows: list[Row] = []
    cells = itertools.product(extent.values, extent.sizes, extent.iccs, extent.planned)
    for values, sizes, icc, planned in cells:
        drawn = [sample(Design(values, planned, sizes, icc), extent.simulations // _ORDERS, seed=seed)
                 for seed in range(_ORDERS)]  # fmt: skip
        for early in earliest:
            runs = [_ordered(one, early, np.random.default_rng([9, seed])) for seed, one in enumerate(drawn)]
            at = [
                _Run(*(np.concatenate(parts) for parts in zip(*same, strict=True))) for same in zip(*runs, strict=True)
            ]
            rows.append({
                "values": values, "sizes": sizes, "icc": icc, "planned": planned, "early": early,
                "false pass": float(at[0].passed.mean()),
                "false fail": float(at[0].failed.mean()), "power": float(at[1].passed.mean()),
                "covers": float(at[1].covered.mean()), "used 2": float(at[2].used.mean()),
                "used 4": float(at[3].used.mean()),
            })  # fmt: skip
    return rows


def _ordered(drawn: Sample, early: int, rng: np.random.Generator) -> list[_Run]:
    """Judge samples look by look, their documents in an order of chance, at every effect."""
    order = rng.permutation(len(drawn.sums))
    ordered = Sample(drawn.sums[order], drawn.sizes[order], drawn.error)
    planned, total = len(order), float(drawn.sizes.sum())
    kish = total**2 / float(np.square(drawn.sizes).sum())
    effect = float(nctdtrinc(kish - 1.0, 0.2, stdtrit(kish - 1.0, 0.975))) * drawn.error
    steps = looks(planned, early)
    found = []
    for look in steps:
        part, level = ordered.first(look.documents), 1.0 - 2.0 * look.level
        bounds = cluster_t(part, level)
        if bounds.effective >= MINIMUM:  # fewer give no PASS, so that the upper end is not asked for
            bounds = new_rule(part, level)
        found.append((bounds, float(part.sizes.sum()) / total))
    return [_until_decided(found, times * effect) for times in _EFFECTS]


def _until_decided(found: list[tuple[Bounds, float]], limit: float) -> _Run:
    count = len(found[0][0].hi)
    passed, failed, covered = (np.zeros(count, dtype=np.bool_) for _ in range(3))
    used = np.ones(count)
    for bounds, share in found:
        still = ~(passed | failed)
        passes = still & (bounds.hi <= limit) & (bounds.effective >= MINIMUM)
        fails = still & (bounds.lo > limit)
        ends = passes | fails if bounds is not found[-1][0] else still
        used[ends], covered[ends] = share, ((bounds.lo <= 0.0) & (bounds.hi >= 0.0))[ends]
        passed |= passes
        failed |= fails
    return _Run(passed, failed, covered, used)
