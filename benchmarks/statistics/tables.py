"""The tables: each a list of rows that `__main__` prints and stores, and a slice of which a test holds to `BOUND`."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from benchmarks.statistics.rules import RULES, Bounds, accuracy_passes, cluster_t, new_rule
from benchmarks.statistics.samples import SIZES, Design, Sample, sample
from scipy.special import nctdtrinc, stdtrit

from invarlock.evidence.plan import GLANCE
from invarlock.stats import betting
from invarlock.stats.intervals import Interval
from invarlock.stats.power import documents_needed, minimum_detectable_effect

Row = dict[str, str | float | int]


class Extent(NamedTuple):
    """What is simulated: the whole, or a slice of a few seconds."""

    simulations: int
    values: tuple[str, ...] = ("normal", "t3", "skew 2", "skew 6", "rare")
    documents: tuple[int, ...] = (10, 40, 60, 100, 400)
    sizes: tuple[str, ...] = ("equal", "geometric", "one dominating")
    planned: tuple[int, ...] = (10, 40, 60, 100, 160, 400)
    iccs: tuple[float, ...] = (0.0, 0.1, 0.3)
    designs: tuple[tuple[int, int, float], ...] = ((200, 1, 0.0), (40, 5, 0.1), (40, 5, 0.3), (100, 2, 0.3))
    discordant: tuple[float, ...] = (1.0, 1.5, 2.0, 4.0, 10.0)


FULL = Extent(4000)
FAST = Extent(600, ("normal", "skew 2", "rare"), (40, 100), ("equal", "one dominating"), (100,), (0.3,),
              ((200, 1, 0.0), (40, 5, 0.3)), (1.0, 4.0))  # fmt: skip
MINIMUM = 30  # documents for a PASS

#: false PASS that the new rules are held to; a cell beyond is printed with a star
BOUND = 0.03


def limit(extent: Extent, icc: float) -> list[Row]:
    """False PASS where the truth is the limit (nominal 0.025), false FAIL, and coverage, of both rules."""
    rows = []
    for values, sizes, documents in itertools.product(extent.values, extent.sizes, extent.documents):
        drawn = sample(Design(values, documents, sizes, icc), extent.simulations)
        row: Row = {"values": values, "sizes": sizes, "icc": icc, "documents": documents}
        for name, rule in RULES.items():
            found = rule(drawn)
            row["effective"] = found.effective
            below, above = float((found.hi < 0.0).mean()), float((found.lo > 0.0).mean())
            row |= {f"{name} passes": below, f"{name} fails": above, f"{name} covers": 1.0 - below - above}
        rows.append(row)
    return rows


def power(extent: Extent) -> list[Row]:
    """PASS where the truth lies inside the limit by the effect that each rule claims to decide with 80 % power.

    The effect is the median of the claims, in units of the true standard error; `t` is what the noncentral t needs.
    """
    rows = []
    for values, sizes, documents in itertools.product(extent.values, extent.sizes[:2], extent.documents):
        drawn = sample(Design(values, documents, sizes), extent.simulations)
        old, new = (rule(drawn) for rule in RULES.values())
        freedom = old.effective - 1.0
        needed = float(nctdtrinc(freedom, 0.2, stdtrit(freedom, 0.975)))
        claims = {
            "old": np.maximum(1.959964 * old.error, (old.hi - old.lo) / 2.0) + 0.841621 * old.error,
            "new": np.array([minimum_detectable_effect(one) or np.nan for one in intervals(new, documents)]),
        }
        row: Row = {"values": values, "sizes": sizes, "documents": documents, "t": needed}
        for name, found in (("old", old), ("new", new)):
            claim = float(np.nanmedian(claims[name]))
            row |= {f"{name} effect": claim / drawn.error, f"{name} power": float((found.hi <= claim).mean())}
        row["new power at t"] = float((new.hi <= needed * drawn.error).mean())
        rows.append(row)
    return rows


def intervals(found: Bounds, documents: int) -> list[Interval]:
    ends = zip(found.estimate, found.lo, found.hi, found.error, strict=True)
    return [
        Interval(float(at), float(lo), float(hi), 0.95, "studentised", 1200, 42, documents, False, float(error),
                 found.effective)
        for at, lo, hi, error in ends
    ]  # fmt: skip


def advice(extent: Extent, documents: int = 30, windows: int = 8) -> list[Row]:
    """What following the advice of an undecided sample brings: as many windows (old) or documents (new) as it says.

    Normal values, ICC .3, the truth `inside` the limit by so many standard deviations of a window. `decided` is the
    share of undecided samples that pass after measuring anew, `none` of those told that no number decides.
    """
    rng, rows, icc = np.random.default_rng(0), [], 0.3
    for inside in (0.1, 0.2, 0.3):
        per_document = np.sqrt(icc + (1.0 - icc) / windows)
        drawn = Sample(rng.normal(-inside, per_document, (documents, extent.simulations)), np.ones((documents, 1)), 0.0)
        found = cluster_t(drawn)
        open_ones = np.flatnonzero((found.hi > 0.0) & (found.lo <= 0.0))
        share: dict[str, list[bool]] = {"old": [], "new": []}
        told_none, factors, found_ones = 0, [], intervals(found, documents)
        for i in open_ones:
            one = found_ones[i]
            gap = abs(float(found.estimate[i]))
            claimed = (1.0 + ((one.hi - one.lo) / 2.0 + 0.841621 * one.std_error) ** 2 / max(gap, 1e-9) ** 2) * windows
            more = min(claimed, 1e6)  # windows a document, of the same documents
            share["old"].append(passes(rng, inside, np.sqrt(icc + (1.0 - icc) / more), documents))
            needed = documents_needed(one, 0.0, 0.0).documents
            if needed is None:
                told_none += 1
            else:
                factors.append(needed / documents)
                share["new"].append(passes(rng, inside, float(per_document), needed))
        rows.append({
            "inside": inside, "undecided": len(open_ones) / extent.simulations,
            "old decided": float(np.mean(share["old"])), "new decided": float(np.mean(share["new"])),
            "new factor": float(np.median(factors)), "new none": told_none / max(len(open_ones), 1),
        })  # fmt: skip
    return rows


def passes(rng: np.random.Generator, inside: float, deviation: float, documents: int) -> bool:
    """Draw mean and standard error of so many normal documents, and say whether the sample passes at 0."""
    error = deviation / np.sqrt(documents)
    mean = rng.normal(-inside, error)
    spread = error * np.sqrt(rng.chisquare(documents - 1) / (documents - 1))
    return bool(mean + stdtrit(documents - 1.0, 0.975) * spread <= 0.0)


def accuracy(extent: Extent) -> list[Row]:
    """False PASS of 200 examples whose true loss is the floor; `discordant` is the rate of changed answers."""
    rng, rows = np.random.default_rng(0), []
    for (documents, each, icc), floor, times in itertools.product(
        extent.designs, (-0.005, -0.01, -0.02), extent.discordant
    ):
        rate = -floor * times
        chances = [(rate - floor) / 2.0, 1.0 - rate, (rate + floor) / 2.0]
        shape = (extent.simulations, documents, each)
        whole, own = (rng.choice([-1.0, 0.0, 1.0], (*shape[:2], size), p=chances) for size in (1, each))
        delta = np.where(rng.random(shape) < np.sqrt(icc), whole, own)
        old, new = accuracy_passes(delta, floor)
        rows.append({
            "documents": documents, "examples each": each, "icc": icc, "floor pp": 100.0 * floor,
            "discordant": rate, "old passes": float(old.mean()), "new passes": float(new.mean()),
        })  # fmt: skip
    return rows


def divergence(extent: Extent) -> list[Row]:
    """KL and flips: the point rule (passes below 0.9 of the limit whatever the interval) and the three-way rule.

    Documents' means are gamma around the truth, of the coefficient of variation `cv` between documents.
    """
    rng, rows = np.random.default_rng(0), []
    for cv, documents in itertools.product((0.5, 1.0), sorted({*extent.documents, 49} - {10})):
        shape = 1.0 / cv**2
        means = rng.standard_gamma(shape, (documents, extent.simulations)) / shape  # of truth 1
        drawn = Sample(means, np.ones((documents, 1)), cv / np.sqrt(documents))
        simple, new = cluster_t(drawn), new_rule(drawn)
        for truth in (0.5, 0.8, 1.0, 1.05, 1.2):
            hi = simple.hi * truth
            point = (simple.estimate * truth <= 0.9) | ((simple.estimate * truth <= 1.0) & (hi <= 1.0))
            rows.append({
                "cv": cv, "documents": documents, "truth": truth, "old passes": float(point.mean()),
                "new passes": float((new.hi * truth <= 1.0).mean()), "new fails": float((new.lo * truth > 1.0).mean()),
            })  # fmt: skip
    return rows


#: mean KL of a document, of mean 1: even, spread out, a few documents alone, and all or nothing
KL = {
    "gamma, cv .5": lambda rng, shape: rng.standard_gamma(4.0, shape) / 4.0,
    "gamma, cv 2": lambda rng, shape: rng.standard_gamma(0.25, shape) * 4.0,
    "1 in 20": lambda rng, shape: np.where(rng.random(shape) < 0.05, 20.0, 0.0),
    "19 in 20": lambda rng, shape: np.where(rng.random(shape) < 0.05, 0.0, 20.0 / 19.0),
}
PLANNED = 160


def glance(extent: Extent) -> list[Row]:
    """FAIL at a glance at six of 160 documents, by bets and by cluster-t at the same level (nominal .0001 at 1).

    `truth` is the KL per token, in units of the limit. `steeper`: short documents have more of it a token, as the first
    quarter of a window has.
    """
    rng, rows = np.random.default_rng(0), []
    for (name, draw), sizes, steeper in itertools.product(KL.items(), extent.sizes, (False, True)):
        tokens = 200.0 * SIZES[sizes](PLANNED)
        count = 10 * extent.simulations
        drawn = rng.permuted(np.broadcast_to(tokens, (count, PLANNED)), axis=1)[:, :GLANCE]
        slope = 1.0 / np.sqrt(drawn) if steeper else np.ones(drawn.shape)
        level = tokens.sum() / np.sqrt(tokens).sum() if steeper else 1.0
        sums = draw(rng, drawn.shape) * slope * level * drawn  # of 1 a token in all
        largest = float(tokens.max())
        row: Row = {"documents": name, "sizes": sizes, "steeper": str(steeper)}
        for truth in (1.0, 2.0, 5.0, 10.0, 20.0, 50.0):
            some = slice(None if truth == 1.0 else extent.simulations)
            won = [
                betting.won(betting.fortune(x, w, 1.0, largest))
                for x, w in zip(truth * sums[some], drawn[some], strict=True)
            ]
            row[f"at {truth:g}"] = float(np.mean(won))
        total = drawn.sum(axis=1)
        estimate = sums.sum(axis=1) / total
        residuals = sums - estimate[:, None] * drawn
        error = np.sqrt(GLANCE / (GLANCE - 1) * np.square(residuals).sum(axis=1)) / total
        freedom = np.square(total) / np.square(drawn).sum(axis=1) - 1.0
        with np.errstate(divide="ignore"):
            beyond = (estimate - 1.0) / error > stdtrit(freedom, 1.0 - betting.GLANCE_ERROR)
        rows.append({**row, "t at 1": float(beyond.mean())})
    return rows
