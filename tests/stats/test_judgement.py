"""The three-way rule on any scale."""

from __future__ import annotations

import math

import numpy as np
import pytest

from invarlock.core.exceptions import ConfigError
from invarlock.stats.intervals import Interval
from invarlock.stats.judgement import judge, mirrored
from invarlock.stats.paired import decide_lower_pp, decide_upper
from invarlock.stats.power import AT_THE_LIMIT
from invarlock.stats.studentised import studentised_interval


def interval(lo: float, hi: float) -> Interval:
    return Interval((lo + hi) / 2, lo, hi, 0.95, "studentised", 1200, 42, 40, False, (hi - lo) / 4.05, 40.0)


@pytest.mark.parametrize("lo", np.linspace(-0.02, 0.14, 9))
@pytest.mark.parametrize("width", [0.001, 0.03, 0.2])
def test_status_is_that_of_the_rules_for_ratio_and_points(lo: float, width: float) -> None:
    """On its scale each: the status of the first derivation, with its hysteresis."""
    one = interval(lo, lo + width)
    assert judge(one, math.log(1.10), math.log(1.102)).status == decide_upper(one, 1.10, n_windows=40).status
    points = interval(-100 * (lo + width), -100 * lo)
    before = decide_lower_pp(points, -5.0, n_windows=400).status
    assert judge(mirrored(points), 5.0, 5.2).status == before


def test_the_bounds_belong_to_pass_and_not_to_fail() -> None:
    assert judge(interval(0.0, 0.1), 0.1).status == "pass"
    assert judge(interval(0.1, 0.2), 0.1).status == "inconclusive"
    assert judge(interval(0.1000001, 0.2), 0.1).status == "fail"
    assert judge(interval(0.1001, 0.2), 0.1, 0.102).status == "inconclusive"


def test_what_is_said_of_an_undecided_gate() -> None:
    found = judge(interval(0.02, 0.12), 0.10)
    assert found.status == "inconclusive" and found.detectable is not None and found.needed is not None
    assert found.needed.documents is not None and found.needed.documents > 40
    at = judge(interval(0.05, 0.15), 0.10).needed
    assert at is not None and at.reason == AT_THE_LIMIT
    assert judge(interval(0.0, 0.05), 0.10).needed is None


def test_what_is_not_a_number_never_passes() -> None:
    values = np.zeros(40)
    values[3] = math.nan
    assert judge(studentised_interval(values, np.ones(40), range(40)), 0.1) == ("fail", None, None)
    one = judge(studentised_interval([0.0, 1e-9], [1, 1], ["a", "a"]), 0.1)
    assert one.status == "inconclusive" and one.needed is not None and one.needed.documents is None
    for limits in ((math.nan, None), (0.1, math.nan), (0.1, 0.05), (math.inf, None)):
        with pytest.raises(ConfigError, match="got limits"):
            judge(interval(0.0, 0.05), *limits)


def test_mirroring_twice_changes_nothing() -> None:
    one = interval(-0.3, 0.1)
    assert mirrored(mirrored(one)) == one
    assert (mirrored(one).lo, mirrored(one).hi) == (-0.1, 0.3)
