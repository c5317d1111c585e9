"""Samples of documents and windows whose truth is known, many at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape)


def t3(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Student's t with 3 degrees of freedom: symmetric, heavy tails."""
    return rng.standard_t(3, shape) / np.sqrt(3.0)


def skew2(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Exponential, skewness 2."""
    return rng.standard_exponential(shape) - 1.0


def skew6(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Gamma of shape 1/9, skewness 6."""
    return 3.0 * (rng.standard_gamma(1.0 / 9.0, shape) - 1.0 / 9.0)


def rare(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """One in twenty is hit by an exponential amount, the others hardly differ; skewness 7."""
    hit = np.where(rng.random(shape) < 0.05, rng.standard_exponential(shape), 0.0) - 0.05
    noise = 0.02 * rng.standard_normal(shape)
    return np.asarray((hit + noise) / np.sqrt(0.0975 + 0.0004))


#: draws of mean 0 and variance 1
VALUES: dict[str, Draw] = {"normal": normal, "t3": t3, "skew 2": skew2, "skew 6": skew6, "rare": rare}


def equal(documents: int) -> NDArray[np.intp]:
    return np.full(documents, 4)


def geometric(documents: int) -> NDArray[np.intp]:
    """Quantiles of a geometric distribution of mean 4."""
    return np.ceil(np.log1p(-(np.arange(documents) + 0.5) / documents) / np.log(0.75)).astype(np.intp)


def dominating(documents: int) -> NDArray[np.intp]:
    """One document holds half of all windows."""
    return np.r_[documents - 1, np.ones(documents - 1, dtype=np.intp)]


#: windows of each document
SIZES = {"equal": equal, "geometric": geometric, "one dominating": dominating}


class Design(NamedTuple):
    """`icc` is the share of a window's variance that its document decides: at 1 damage strikes whole documents."""

    values: str
    documents: int
    sizes: str = "equal"
    icc: float = 0.3


class Sample(NamedTuple):
    """`sums` (G, S) of weight times value, and `sizes` (G, 1), the weights, of S samples; the truth is 0.

    `error` is the true standard error of the weighted mean.
    """

    sums: Array
    sizes: Array
    error: float

    def first(self, documents: int) -> Sample:
        return Sample(self.sums[:documents], self.sizes[:documents], self.error)


def sample(design: Design, simulations: int, seed: int = 0) -> Sample:
    rng = np.random.default_rng([seed, design.documents, round(100 * design.icc)])
    windows = SIZES[design.sizes](design.documents)
    starts = np.r_[0, np.cumsum(windows)[:-1]]
    tokens = 64.0 + (np.arange(windows.sum()) * 157) % 449  # 64 to 512 a window, in no order
    draw = VALUES[design.values]
    sizes = np.add.reduceat(tokens, starts)
    sums = np.sqrt(design.icc) * draw(rng, (design.documents, simulations)) * sizes[:, None]
    if design.icc < 1.0:
        for start in range(0, simulations, 500):  # a few hundred MB at once are too many
            own = draw(rng, (len(tokens), min(500, simulations - start))) * tokens[:, None]
            sums[:, start : start + 500] += np.sqrt(1.0 - design.icc) * np.add.reduceat(own, starts, axis=0)
    variance = design.icc * np.square(sizes).sum() + (1.0 - design.icc) * np.square(tokens).sum()
    return Sample(sums, sizes[:, None], float(np.sqrt(variance) / sizes.sum()))
