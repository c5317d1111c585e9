"""What a sample would have seen: against the binomial, and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from invarlock.core.exceptions import ConfigError, DataError
from invarlock.stats.coverage import smallest_share, units_to_see, vocabulary_seen


@pytest.mark.parametrize("units", [10, 200, 8000, 50_000])
def test_smallest_share_was_met_with_its_chance_against_the_binomial(units: int) -> None:
    from scipy.stats import binom

    share = smallest_share(units)
    assert share == pytest.approx(3.6889 / units, rel=1e-4)
    missed = binom.pmf(0, units, share)
    assert missed <= 0.025  # exp(-n f) bounds (1 - f)^n
    if units >= 200:
        assert missed == pytest.approx(0.025, rel=0.05)


def test_share_and_units_are_inverse() -> None:
    assert units_to_see(smallest_share(1234)) in (1234, 1235)
    assert units_to_see(0.001) == 3689
    assert smallest_share(100, chance=0.95) == pytest.approx(0.029957, rel=1e-4)


@pytest.mark.parametrize("units", [0, 1, 3])
def test_too_few_units_say_that_nothing_less_than_all_was_seen(units: int) -> None:
    assert smallest_share(units) == 1.0


def test_vocabulary_counts_what_occurs() -> None:
    found = vocabulary_seen([[1, 2, 2], np.array([[5, 5], [9, 1]]), []], 10)
    assert (found.seen, found.size, found.share) == (4, 10, 0.4)
    assert found.unseen_mass == pytest.approx(1 / 7)  # 9 alone occurs once; of 1, 2, 5 there are two
    assert vocabulary_seen([], 4) == (0, 4, 0.0, 1.0)


def test_unseen_mass_matches_simulation() -> None:
    rng = np.random.default_rng(0)
    chances = 1.0 / np.arange(1, 5001)
    chances /= chances.sum()
    errors = []
    for _ in range(50):
        ids = rng.choice(5000, 3000, p=chances)
        mass = chances[~np.isin(np.arange(5000), ids)].sum()
        errors.append(vocabulary_seen([ids], 5000).unseen_mass - mass)
    assert abs(np.mean(errors)) < 3 * np.std(errors) / math.sqrt(50) + 1e-3


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ConfigError):
        smallest_share(-1)
    with pytest.raises(ConfigError):
        smallest_share(10, chance=1.0)
    for bad in (0.0, 1.5, math.nan):
        with pytest.raises(ConfigError):
            units_to_see(bad)
    for bad_ids in ([-1], [10]):
        with pytest.raises(DataError, match="expected 0 to 9"):
            vocabulary_seen([bad_ids], 10)
    with pytest.raises(ConfigError):
        vocabulary_seen([], 0)
