"""Bets against a limit: what a fortune is, and that it is not made by chance, whatever the documents' distribution."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from invarlock.core.exceptions import ConfigError, DataError
from invarlock.stats.betting import GLANCE_ERROR, STAKE, fortune

Draw = Callable[[np.random.Generator, tuple[int, ...]], NDArray[np.float64]]
#: sums a document of mean 1: what a rule that estimates a variance takes for certain too often is among them
AT_THE_LIMIT: dict[str, Draw] = {
    "even": lambda rng, shape: rng.standard_gamma(4.0, shape) / 4.0,
    "spread out": lambda rng, shape: rng.standard_gamma(0.1, shape) * 10.0,
    "19 in 20 just above": lambda rng, shape: np.where(rng.random(shape) < 0.05, 0.0, 20.0 / 19.0),
    "one in three": lambda rng, shape: np.where(rng.random(shape) < 1 / 3, 3.0, 0.0),
}


def test_a_fortune_is_the_product_of_bets_at_fair_odds() -> None:
    expected = (1 + STAKE * (3.0 - 0.5 * 2) / (0.5 * 4)) * (1 + STAKE * (0.0 - 0.5 * 4) / (0.5 * 4))
    assert fortune([3.0, 0.0], [2, 4], 0.5, 4) == pytest.approx(expected)
    assert fortune([1.0, 2.0], [2, 4], 0.5, 4) == 1.0  # each just at the limit
    assert fortune([], [], 0.5, 4) == 1.0
    assert fortune([math.nan, 0.0], [1, 1], 0.5, 4) == fortune([math.inf], [1], 0.5, 4) == math.inf


@pytest.mark.parametrize("name", AT_THE_LIMIT)
@pytest.mark.parametrize("sizes", ["equal", "unequal"])
def test_at_the_limit_a_fortune_of_a_hundred_is_as_rare_as_ville_says(name: str, sizes: str) -> None:
    rng, count = np.random.default_rng(3), 10_000
    tokens = np.ones((count, 6)) if sizes == "equal" else rng.choice([0.2, 1.0], size=(count, 6))
    sums = AT_THE_LIMIT[name](rng, tokens.shape) * tokens
    made = np.array([fortune(x, w, 1.0, 1.0) for x, w in zip(sums, tokens, strict=True)])
    assert (made >= 100).mean() <= 0.01 + 4 * math.sqrt(0.01 / count)
    one = [fortune(x[:1], w[:1], 1.0, 1.0) for x, w in zip(sums, tokens, strict=True)]
    assert np.mean(one) == pytest.approx(1.0, abs=0.1)  # fair odds: nothing is given away either


def test_six_documents_of_a_wrecked_model_are_enough_and_of_one_near_the_limit_are_not() -> None:
    spread = np.random.default_rng(1).standard_gamma(4.0, 6) / 4.0
    tokens, limit = np.full(6, 200.0), 0.1
    assert fortune(20 * limit * spread * tokens, tokens, limit, 250.0) > 1 / GLANCE_ERROR
    assert fortune(2 * limit * spread * tokens, tokens, limit, 250.0) < 1 / GLANCE_ERROR


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (([1.0], [1, 2], 0.1, 2), DataError),
        (([-1.0], [1], 0.1, 2), DataError),
        (([1.0], [3], 0.1, 2), DataError),
        (([1.0], [1], 0.0, 2), ConfigError),
        (([1.0], [1], math.nan, 2), ConfigError),
    ],
)
def test_what_no_bet_can_be_made_on_is_refused(arguments: tuple[object, ...], error: type[Exception]) -> None:
    with pytest.raises(error, match="expected"):
        fortune(*arguments)  # type: ignore[arg-type]
