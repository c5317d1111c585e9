"""The ranks of matrices and of their changes, told from a part of them: what lies above the noise of rounding."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ScaledUpdate", "rank_above_noise", "rank_of", "rank_of_change", "rank_of_kept", "scaled_update"]

_BLOCK = 320  # rows and columns of the part whose rank is taken
_MOST = 0.7  # share of a block's rank up to which it counts as low: the rest must be noise
_SMALL = 160  # rows and columns of the part on which scales and an update are told apart
_ROUNDS = 12
_FEW = 0.4  # share of the rank of that part up to which an update beside scales counts as low
_USUAL = 6.0  # times the median size of a change, four standard deviations of normal ones
_GAP = 1.5  # ratio of neighbouring singular values from which on the first of them may be an update of its own
_LEFT = 0.1  # share of a change that an update may leave unexplained where zeros were made afterwards


class ScaledUpdate(NamedTuple):
    """A low-rank update beside a scale: of the tensor, or of each row or column (DoRA). `factors` are those looked at."""

    axis: str
    factors: Tensor
    rank: int


def _block(tensor: Tensor, most: int = _BLOCK) -> Tensor:
    """Return up to `most` rows and columns in double precision."""
    import torch

    drawn = torch.Generator().manual_seed(0)
    rows, columns = (torch.randperm(size, generator=drawn)[:most].sort().values for size in tensor.shape)
    return tensor[rows][:, columns].double()


def rank_of(tensor: Tensor, unit: float) -> int:
    """Return the rank of a matrix whose values were rounded to `unit`, where it is not full."""
    block = _block(tensor)
    return _above(_values(block), unit * float(block.norm()) / math.sqrt(min(tensor.shape)))


def rank_of_change(old: Tensor, new: Tensor, unit: float) -> int:
    """Return the rank of a change, where it is not full and the rest is no more than rounding to `unit`."""
    a, b = _block(old), _block(new)
    return _above(_values(b - a), _noise(b, unit))


def _noise(block: Tensor, unit: float) -> float:
    """Return the largest singular value that rounding to `unit` makes, about."""
    return unit * float(block.norm()) / math.sqrt(3.0 * min(block.shape)) * 2


def _values(block: Tensor) -> Tensor:
    import torch

    values: Tensor = torch.linalg.svdvals(block)
    return values


def _above(values: Tensor, noise: float) -> int:
    """Return how many singular values lie above the noise, where that is not most and they end with a step."""
    edge = max(3 * noise, 1e-6 * float(values[0]) if len(values) else 0.0)
    rank = int((values > edge).sum())
    low = 0 < rank <= _MOST * len(values) and float(values[rank - 1]) > _GAP * float(values[rank])
    return rank if low else 0


def rank_above_noise(old: Tensor, new: Tensor) -> int:
    """Return how many singular values of the change lie clearly above those that independent rounding makes.

    Of noise alone the largest is 2.5 times the median (a quarter-circle law for square matrices). A few values that were
    clipped are a rank of their own, and are held to what is usual for the others.
    """
    change = _block(new) - _block(old)
    most = _USUAL * float(change.abs().median())
    values = _values(change.clamp(-most, most) if most else change)
    edge = 1.3 * 2.48 * float(values.median())
    rank = int((values > edge).sum())
    # rounding by rows of unlike size goes a little beyond: what is near the edge, and far below the update, is noise
    rank = next((i for i in range(1, rank) if values[i] < 2 * edge and values[i - 1] > 3 * values[i]), rank)
    return rank if rank <= 0.2 * len(values) else 0


def rank_of_kept(old: Tensor, new: Tensor) -> int:
    """Return the rank of an update of which zeros were made afterwards, 0 where there is none: what is missing is filled in
    turn by turn from the update itself."""
    import torch

    a, b = _block(old), _block(new)
    kept = b != 0
    change = filled = (b - a) * kept
    rank = rank_above_noise(a * kept, b)
    for _ in range(_ROUNDS if rank else 0):
        left, values, right = torch.linalg.svd(filled, full_matrices=False)
        update = left[:, :rank] * values[:rank] @ right[:rank]
        filled = torch.where(kept, change, update)
    if not rank or float((filled - update).norm()) > _LEFT * float(change.norm()):
        return 0
    return int((values[:rank].square().flip(0).cumsum(0) > _LEFT**2 * values.square().sum()).sum())


def scaled_update(old: Tensor, new: Tensor, unit: float) -> ScaledUpdate | None:
    """Tell a scale and a low-rank update apart: new = c * old + update, with c a number, or one for each row or column."""
    a, b = _block(old, _SMALL), _block(new, _SMALL)
    for axis, x, y in (("tensor", a, b), ("rows", a, b), ("columns", a.T, b.T)):
        found = _separated(x, y, _noise(b, unit), each=axis != "tensor")
        if found is not None:
            return ScaledUpdate(axis, *found)
    return None


def _separated(a: Tensor, b: Tensor, noise: float, *, each: bool) -> tuple[Tensor, int] | None:
    """Take turns: the scales from what lies outside of the update's rows, the update from what the scales leave."""
    import torch

    def scales(x: Tensor, y: Tensor) -> Tensor:
        product, size = x * y, x * x
        whole = product.sum(1, keepdim=True), size.sum(1, keepdim=True)
        top, bottom = whole if each else (whole[0].sum(), whole[1].sum())
        return top / bottom.clamp_min(1e-300)

    factors, last = scales(a, b), 0
    for _ in range(_ROUNDS):
        _, values, along = torch.linalg.svd(b - factors * a, full_matrices=False)
        rank = _above(values, noise)
        if rank and rank == last:
            return (factors.flatten(), rank) if rank <= _FEW * len(values) else None
        few = values[: int(_FEW * len(values)) + 1]
        steps = few[:-1] / few[1:].clamp_min(1e-300)
        if not len(steps) or float(steps.max()) < _GAP:
            return None
        last, kept = rank, along[: int(steps.argmax()) + 1]
        factors = scales(a - a @ kept.T @ kept, b - b @ kept.T @ kept)
    return None
