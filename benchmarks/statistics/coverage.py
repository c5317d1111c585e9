"""Coverage of the confidence intervals, by simulation: `python -m benchmarks.statistics.coverage [--simulations 1000]`.

For each kind of data and number of clusters, and for each method, the table gives the share of intervals that hold the
truth (nominal 0.95), the share that end below it (a true damage judged too small: the risk of a false PASS, nominal
0.025), the share that begin above it, and the mean width relative to that of cluster-t. For accuracy, where less is
worse, it is the share above the truth that risks a false PASS. Every method is forced at every size; the library takes
cluster-t below 100 clusters (or 50 effective ones) and BCa from there on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from invarlock.stats import intervals as bootstrap
from invarlock.stats.intervals import weighted_mean_interval

Draw = Callable[[np.random.Generator, int], np.ndarray]


def normal(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(size=n)


def heavy(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.standard_t(3, n)


def skewed(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.lognormal(0.0, 1.0, n) - np.exp(0.5)


def rare_damage(rng: np.random.Generator, n: int) -> np.ndarray:
    """One document in twenty suffers by an exponential amount of mean 1 nat, the others hardly."""
    return np.where(rng.random(n) < 0.05, rng.exponential(1.0, n), 0.0) - 0.05 + rng.normal(0.0, 0.02, n)


def accuracy(rng: np.random.Generator, n: int) -> np.ndarray:
    """Flips of one example a document: 3 % get worse, 2 % better."""
    return rng.choice([-1.0, 0.0, 1.0], n, p=[0.03, 0.95, 0.02]) + 0.01


def equal(rng: np.random.Generator, clusters: int) -> np.ndarray:
    return np.full(clusters, 2)


def uneven(rng: np.random.Generator, clusters: int) -> np.ndarray:
    return rng.geometric(0.4, clusters)


def dominated(rng: np.random.Generator, clusters: int) -> np.ndarray:
    """One document holds half of all windows."""
    return np.r_[clusters, np.ones(clusters - 1, dtype=np.int64)]


def sample(draw: Draw, lengths: Draw, clusters: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list]:
    """Values of truth 0: a draw for the document plus half a draw for every window; token counts 64 to 512."""
    if draw is accuracy:
        return draw(rng, clusters), np.ones(clusters), list(range(clusters))
    labels = np.repeat(np.arange(clusters), lengths(rng, clusters))
    values = draw(rng, clusters)[labels] + 0.5 * draw(rng, len(labels))
    return values, rng.integers(64, 513, len(labels)).astype(float), labels.tolist()


def simulate(
    draw: Draw, lengths: Draw, clusters: int, simulations: int
) -> list[tuple[str, float, float, float, float]]:
    rng = np.random.default_rng(clusters)
    data = [sample(draw, lengths, clusters, rng) for _ in range(simulations)]
    rows, reference = [], 1.0
    for method, switch, bca in (("cluster_t", 10**9, True), ("bca", 2, True), ("percentile", 2, False)):
        bootstrap.BCA_MIN_CLUSTERS, bootstrap.BCA_MIN_EFFECTIVE = switch, 0.0
        found = [weighted_mean_interval(*one, seed=i, bca=bca) for i, one in enumerate(data)]
        lo, hi = np.array([f.lo for f in found]), np.array([f.hi for f in found])
        if method == "cluster_t":
            reference = float((hi - lo).mean())
        below, above = float((hi < -1e-12).mean()), float((lo > 1e-12).mean())
        rows.append((method, 1.0 - below - above, below, above, float((hi - lo).mean()) / reference))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulations", type=int, default=1000)
    simulations = parser.parse_args().simulations
    print(f"{simulations} simulations, nominal 0.950 / 0.025 / 0.025, 1200 replicates")
    print(f"{'values':12} {'documents':10} clusters {'method':10}  covers   below   above  width")
    cells = [(draw, lengths) for draw in (normal, heavy, skewed, rare_damage) for lengths in (equal, uneven)]
    for draw, lengths in [*cells, (normal, dominated), (accuracy, equal)]:
        for clusters in (10, 40, 100, 400):
            for method, covers, below, above, width in simulate(draw, lengths, clusters, simulations):
                name = f"{draw.__name__:12} {lengths.__name__:10} {clusters:8}"
                print(f"{name} {method:10} {covers:7.3f} {below:7.3f} {above:7.3f} {width:6.2f}", flush=True)


if __name__ == "__main__":
    main()
