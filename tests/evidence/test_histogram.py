"""A histogram of KL values that could not be that of the rows is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from invarlock.evidence.histogram import HISTOGRAM_EDGES, histogram, histogram_problems

VALUES = np.random.default_rng(1).lognormal(-6, 2, 300)


def _problems(counts: list[int], **others: Any) -> list[str]:
    given = {"tokens": len(VALUES), "sums": [float(VALUES.sum())], "largest": [float(VALUES.max())], **others}
    return list(histogram_problems(counts, **given))


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({}, None),
        ({"sums": [None]}, None),  # not finite: the gate fails on that
        ({"tokens": 301}, "counts 300 tokens"),
        ({"sums": [float(VALUES.sum()) * 0.5]}, "the rows sum to"),
        ({"largest": [float(VALUES.max()) * 3]}, "largest KL is"),
    ],
)
def test_sums_and_maxima_must_fit_the_bins(others: dict[str, Any], said: str | None) -> None:
    problems = _problems(histogram(VALUES).tolist(), **others)
    assert (problems == []) if said is None else said in problems[0]


def test_a_negative_count_or_a_missing_bin_is_named() -> None:
    counts = histogram(VALUES).tolist()
    assert "bins" in _problems(counts[:-1])[0]
    assert _problems([counts[0] - 1, *counts[1:]]) != []
    assert len(counts) == len(HISTOGRAM_EDGES)
