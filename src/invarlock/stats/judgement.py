"""The three-way rule on an interval's own scale, for every gate that has an interval: ratio, KL, flips, accuracy."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, NamedTuple

from invarlock.core.exceptions import ConfigError
from invarlock.stats.intervals import Interval
from invarlock.stats.power import DocumentsNeeded, documents_needed, minimum_detectable_effect

__all__ = ["Judgement", "judge", "mirrored"]


class Judgement(NamedTuple):
    """`detectable` is the effect inside the limit that this sample decides with 80 % power, on the interval's scale;
    `needed` the documents that would decide, for an undecided gate with an interval.
    """

    status: Literal["pass", "fail", "inconclusive"]
    detectable: float | None
    needed: DocumentsNeeded | None


def judge(interval: Interval, limit: float, fails_above: float | None = None) -> Judgement:
    """Pass when the upper end is at most `limit`, fail when the lower end exceeds `fails_above` (default: `limit`).

    Both on the interval's scale: a log ratio is held to log(limit) and log(limit + hysteresis). An estimate that is not
    finite fails; NaN bounds of a finite one (too few documents) are inconclusive. Raises ConfigError for limits that are
    not finite or do not rise.
    """
    above = limit if fails_above is None else fails_above
    if not (math.isfinite(limit) and limit <= above < math.inf):
        raise ConfigError(f"got limits {limit} and {above}; expected finite numbers, the second not below the first")
    if not math.isfinite(interval.estimate):
        return Judgement("fail", None, None)
    detectable = minimum_detectable_effect(interval)
    if interval.hi <= limit:
        return Judgement("pass", detectable, None)
    if interval.lo > above:
        return Judgement("fail", detectable, None)
    return Judgement("inconclusive", detectable, documents_needed(interval, limit, above))


def mirrored(interval: Interval) -> Interval:
    """Return the interval of the negative, for a limit from below: `judge(mirrored(x), -floor)`."""
    return replace(interval, estimate=0.0 - interval.estimate, lo=0.0 - interval.hi, hi=0.0 - interval.lo)
