"""The fast slice of `python -m benchmarks.statistics`: what its tables must show, within Monte Carlo error."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from invarlock.policy.resolve import TIERS, resolve_policy
from invarlock.stats import studentised
from invarlock.stats.intervals import weighted_mean_interval
from invarlock.stats.proportions import accuracy_score_paired
from invarlock.stats.studentised import studentised_interval

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tables() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(ROOT)])
        from benchmarks.statistics import tables

        yield tables


@pytest.fixture(scope="module")
def looks(tables: ModuleType) -> ModuleType:
    from benchmarks.statistics import sequential

    return sequential


def margin(chance: float, samples: int) -> float:
    """Four standard errors of a share: a right rule fails one cell in 30,000."""
    return 4.0 * math.sqrt(chance * (1.0 - chance) / samples)


@pytest.mark.parametrize("documents", [30, 120])
def test_many_samples_at_once_are_judged_as_the_library_judges_one(tables: ModuleType, documents: int) -> None:
    drawn = tables.sample(tables.Design("skew 2", documents, "geometric"), 4)
    weights, labels = drawn.sizes[:, 0], range(documents)
    for name, single in (("old", weighted_mean_interval), ("new", studentised_interval)):
        found = tables.RULES[name](drawn)
        for j in range(4):
            one = single(drawn.sums[:, j] / weights, weights, labels)
            assert (found.lo[j], found.hi[j], found.error[j]) == pytest.approx(
                (one.lo, one.hi, one.std_error), rel=1e-9
            )


@pytest.mark.slow
@pytest.mark.parametrize(("documents", "each"), [(200, 1), (20, 10)])
def test_answers_of_many_samples_are_judged_as_the_library_judges_one(
    tables: ModuleType, documents: int, each: int
) -> None:
    rng = np.random.default_rng(0)
    delta = rng.choice([-1.0, 0.0, 1.0], (60, documents, each), p=[0.02, 0.95, 0.03])
    labels = np.repeat(np.arange(documents), each).tolist()
    for floor in (-0.005, -0.02, -0.06):
        passes = tables.accuracy_passes(delta, floor)[1]
        lower = [accuracy_score_paired(d < 0, d > 0, labels).interval.lo for d in delta.reshape(60, -1)]
        assert passes.tolist() == [lo >= 100 * floor for lo in lower]


#: false PASS of rare damage in few documents, printed as what no interval mends
RARE = {40: 0.06, 100: 0.04}


@pytest.mark.slow
def test_false_pass_at_the_limit_keeps_its_bound(tables: ModuleType) -> None:
    samples = tables.FAST.simulations
    rows = tables.limit(tables.FAST, 0.3)
    assert len(rows) == 12
    for row in rows:
        if row["sizes"] == "equal" and row["values"] == "normal":
            assert abs(row["new covers"] - 0.95) <= margin(0.95, samples)
        if row["effective"] >= tables.MINIMUM:
            bound = RARE[row["documents"]] if row["values"] == "rare" else tables.BOUND
            assert row["new passes"] <= bound + margin(bound, samples), row
        assert row["new fails"] <= 0.025 + margin(0.025, samples), row
    rare = [row for row in rows if row["values"] == "rare"]
    assert all(row["new passes"] < 0.75 * row["old passes"] for row in rare)


@pytest.mark.slow
def test_the_effect_claimed_is_decided_with_its_power(tables: ModuleType) -> None:
    for row in tables.power(tables.FAST):
        if row["values"] == "normal" and row["sizes"] == "equal":
            assert row["new power"] == pytest.approx(0.8, abs=0.03 + margin(0.8, tables.FAST.simulations))


@pytest.mark.slow
def test_documents_decide_where_windows_of_the_same_ones_do_not(tables: ModuleType) -> None:
    for row in tables.advice(tables.FAST):
        assert row["new decided"] > row["old decided"] + 0.1
        assert row["new decided"] > 0.55


@pytest.mark.slow
def test_looks_keep_both_errors_and_most_of_the_power(tables: ModuleType, looks: ModuleType) -> None:
    extent = tables.FAST._replace(values=("normal",), sizes=("equal",))
    (row,) = looks.sequential(extent, (30,))
    assert row["false pass"] <= 0.03 + margin(0.03, extent.simulations)
    assert row["false fail"] <= 0.025 + margin(0.025, extent.simulations)
    assert row["power"] > 0.76 - margin(0.76, extent.simulations)
    assert row["covers"] > 0.95 - margin(0.95, extent.simulations)
    assert row["used 2"] < 0.6 and row["used 4"] < 0.45  # the first look takes 0.3


def test_the_plan_simulated_is_that_of_the_tiers(looks: ModuleType) -> None:
    for tier in TIERS:
        assert resolve_policy(tier).limits.sample.early_documents == looks.CURRENT


@pytest.mark.slow
def test_answers_at_the_floor_seldom_pass(tables: ModuleType) -> None:
    samples = tables.FAST.simulations
    rows = tables.accuracy(tables.FAST)
    assert max(row["old passes"] for row in rows) > 0.3  # what was mended
    assert all(row["new passes"] <= tables.BOUND + margin(tables.BOUND, samples) for row in rows)


@pytest.mark.slow
def test_divergence_beyond_the_limit_seldom_passes(tables: ModuleType) -> None:
    samples = tables.FAST.simulations
    rows = tables.divergence(tables.FAST)
    beyond = [row for row in rows if row["truth"] >= 1.0]
    assert all(row["new passes"] <= tables.BOUND + margin(tables.BOUND, samples) for row in beyond)
    before = {(row["cv"], row["documents"], row["truth"]): row["old passes"] for row in rows}
    assert before[1.0, 49, 1.05] > 0.1
    assert all(row["new passes"] > 0.85 for row in rows if row["truth"] == 0.5)


def test_the_stored_tables_are_whole_and_the_docstring_quotes_them(tables: ModuleType) -> None:
    text = (ROOT / "benchmarks/results/statistics.txt").read_text(encoding="utf-8")
    assert text.startswith(f"{tables.FULL.simulations} samples a cell")
    for title in ("limit, ICC 0.1", "power", "advice", "sequential", "accuracy", "divergence", "sigma"):
        assert f"## {title}" in text
    stored = json.loads((ROOT / "benchmarks/results/statistics.json").read_text(encoding="utf-8"))
    cells = [row for row in stored["limit, ICC 0.3"] if row["sizes"] == "equal" and row["documents"] >= 40]
    quoted = re.findall(r"(0\.\d{3}) \((0\.\d{3})\)", str(studentised.__doc__))
    assert len(cells) == 20
    for (new, old), row in zip(quoted[:20], cells, strict=True):
        assert (float(new), float(old)) == pytest.approx((row["new passes"], row["old passes"]), abs=6e-4)


@pytest.mark.slow
def test_a_glance_fails_nothing_that_keeps_the_limit_where_cluster_t_would(tables: ModuleType) -> None:
    extent = tables.FAST._replace(sizes=("equal", "geometric"))
    rows = tables.glance(extent)
    assert max(row["at 1"] for row in rows) <= 1e-4 + margin(1e-4, 10 * extent.simulations)
    found = {(row["documents"], row["sizes"], row["steeper"]): row for row in rows}
    assert found["19 in 20", "equal", "False"]["t at 1"] > 0.7
    assert found["gamma, cv .5", "equal", "False"]["at 10"] > 0.95
    assert found["gamma, cv .5", "equal", "False"]["at 2"] < 0.01  # that is for the looks
