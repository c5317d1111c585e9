"""Whether values lie on the grid of a quantizer, and on which: bits, group, symmetric or not, number format.

No quantizer is asked: a grid shows in the values. Within a group all values of an integer grid are whole multiples of
one step, and so is the largest of them: trying every whole number of steps up to it finds the grid, whatever way its
scale was chosen. Grids with an offset are looked for in the distances from the smallest value. Values that are stored in
half precision lie near their grid; the tolerance follows from that precision and is smaller for smaller values, so that a
matrix that was not rounded never fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Grid", "find_grid", "unit_roundoff"]

_MOST_STEPS = 255
_GROUPS = 16  # groups that are looked at
_FEW = 4  # that must not all fail before more are
_VALUES = 96  # values a group that are looked at
_PROBES = 10  # values that a number of steps must fit before all are looked at
_TRIES = 24
_FIRST = (16, 64)  # sizes of groups, and the whole line, of which one must fit
_SIZES = (16, 32, 64, 128, 256, 512, 1024)
_SLACK = 1.1  # on the error of rounding to the stored type
_EXACT = 6e-5  # single precision's own error at the most steps
_FITTING = 0.9  # share of the groups that can tell which must fit
_LEAST = 0.5  # share of all groups that must fit: one that 2 bits left few values cannot tell
_CHANCE = -14.0  # log-probability below which a fit is no accident
_MOST_BITS = 8
_COARSE, _DOUBTFUL = 1e-4, 6  # values in half precision that seem to need as many bits may have an offset instead
_FILLED = 0.8  # share of groups from which on both ends count as used
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_STEPS = frozenset((0, 1, 2, 3, 4, 6, 8, 12))


class Grid(NamedTuple):
    """One quantizer's grid. `axis`: along which values share a scale (row, column, or tensor for one scale in all);
    `group`: so many neighbours share it, None for a whole row or column."""

    bits: int
    axis: str
    group: int | None
    symmetric: bool
    code: str  # integer, nf4, fp4 or fp8

    @property
    def words(self) -> str:
        """Return the grid in words."""
        kind = (
            f"{self.bits}-bit"
            if self.code == "integer"
            else {"fp8": "8-bit float", "fp4": "4-bit float"}.get(self.code, "NF4")
        )
        sign = "" if self.code != "integer" else ", symmetric" if self.symmetric else ", asymmetric"
        if self.axis == "tensor":
            return f"{kind} rounding with one scale a tensor{sign}"
        along = "" if self.axis == "row" else " down the columns"
        return f"{kind} rounding " + (
            f"in groups of {self.group}{along}{sign}" if self.group else f"with one scale a {self.axis}{sign}"
        )


def unit_roundoff(*tensors: Tensor) -> float:
    """Return the relative error of the coarsest type that holds these values, whatever type they are stored in now."""
    import torch

    coarsest = 2.0**-24
    for tensor in tensors:
        part = tensor.flatten()[: 1 << 14].float()
        for dtype, error in ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)):
            if torch.equal(part.to(dtype).float(), part):
                coarsest = max(coarsest, error)
                break
    return coarsest


class _Fit(NamedTuple):
    """How groups [G, g] fit a code: which do, and the steps of the smallest and largest value of each."""

    good: Tensor
    low: Tensor
    high: Tensor
    steps: Tensor | None = None  # [G, g]
    untold: Tensor | None = None  # [G], too few values other than zero to tell a grid of one step from none


_Code = Callable[["Tensor", float], _Fit]


class _Lines:
    """Some rows or columns of a matrix, and the groups of neighbours in them, which every code is tried on."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._groups: dict[int, Tensor] = {}

    def groups(self, size: int) -> Tensor:
        """Return up to `_GROUPS` groups of `size` neighbours, none of them all zero, thinned to `_VALUES` values each."""
        import torch

        if size not in self._groups:
            cut = self.values[:, : self.values.shape[1] // size * size].reshape(-1, size)
            cut = cut[cut.abs().amax(1) > 0]
            picked = torch.linspace(0, max(len(cut) - 1, 0), min(_GROUPS, len(cut))).long()
            self._groups[size] = _thinned(cut[picked], _VALUES)
        return self._groups[size]


def find_grid(rows: Tensor, columns: Tensor) -> Grid | None:
    """Return the grid on which a matrix lies, or None.

    `rows` [r, n] are some of its rows, `columns` [c, m] some of its columns, both float32.
    """
    unit = unit_roundoff(rows)
    for axis, lines in (("row", _Lines(rows)), ("column", _Lines(columns))):
        found: list[Grid] = []
        for code, fit in _CODES.items():
            if not found or (code == "affine" and unit > _COARSE and found[0].bits >= _DOUBTFUL):
                grid = _largest_group(lines, axis, code, fit, unit)
                found += [grid] if grid is not None and grid.bits <= _MOST_BITS else []
        if found:
            return min(found, key=lambda grid: grid.bits)
    return None


def _largest_group(lines: _Lines, axis: str, code: str, fit: _Code, unit: float) -> Grid | None:
    """Return the grid with the largest groups that needs no more than a bit above that of the smallest ones: values that
    were stored in half precision also lie near the much finer grid of several groups together."""
    width = lines.values.shape[1]
    if lines.values.numel() < 64 or not any(
        _bits(lines, size, fit, unit) for size in (*_FIRST, width) if size <= width
    ):
        return None
    bits: dict[int, int] = {}
    for size in (*(size for size in _SIZES if size < width), width):
        found_bits = _bits(lines, size, fit, unit)
        if found_bits:
            bits[size] = found_bits
        elif bits:
            break  # a group that fits consists of smaller ones that do
    if not bits:
        return None
    group = max(size for size, found in bits.items() if found <= min(bits.values()) + 1)
    measured = fit(lines.groups(group), unit)
    if group == width and len(lines.values) > 1:
        whole = fit(_thinned(lines.values.reshape(1, -1), 4 * _VALUES), unit)
        if bool(whole.good.all()) and _range(whole)[0] <= bits[group]:
            axis, measured = "tensor", whole
    found, symmetric = _range(measured)
    if code == "integer" and _is_fp4(measured):
        found, symmetric, code = 4, True, "fp4"
    found, symmetric = {"nf4": 4, "fp8": 8}.get(code, found), symmetric and code != "affine"
    return Grid(found, axis, None if group == width else group, symmetric, _NAMES.get(code, code))


def _bits(lines: _Lines, size: int, fit: _Code, unit: float) -> int:
    """Return the bits of the grid that nearly all groups of a size lie on; 0 where they lie on none."""
    groups = lines.groups(size)
    if not len(groups) or not bool(fit(groups[:: -(-len(groups) // _FEW)], unit).good.any()):
        return 0
    measured = fit(groups, unit)
    fitting, telling = int(measured.good.sum()), len(groups)
    if measured.untold is not None:
        telling -= int(measured.untold.sum())
    return _range(measured)[0] if fitting >= max(_FITTING * telling, _LEAST * len(groups)) else 0


def _range(measured: _Fit) -> tuple[int, bool]:
    """Return bits and symmetry. Codes of b bits reach at most 2^(b-1) steps to either side of zero; an asymmetric
    quantizer uses both ends of its range in every group."""
    low, high = measured.low[measured.good], measured.high[measured.good]
    span = high - low
    bits = max(1, math.ceil(math.log2(float(span.max()) + 1)))
    far = float(max(low.abs().max(), high.abs().max(), low.new_ones(())))
    filled = float((span >= 2**bits - 1).float().mean())
    symmetric = bool((low <= 0).all() & (high >= 0).all()) and far <= 2 ** (bits - 1)
    symmetric = symmetric and (float(high.max()) < 2 ** (bits - 1) or filled < _FILLED)
    return (max(bits, math.ceil(math.log2(far)) + 1) if symmetric else bits), symmetric


def _is_fp4(measured: _Fit) -> bool:
    """Say whether the steps used are those of a 4-bit float: halves of 0, 0.5, 1, 1.5, 2, 3, 4 and 6."""
    if measured.steps is None:
        return False
    used = {int(step) for step in measured.steps[measured.good].abs().flatten().tolist()}
    return max(used) == 12 and used <= _FP4_STEPS


def _thinned(groups: Tensor, count: int) -> Tensor:
    """Keep `count` values of each group, the smallest and the largest among them."""
    import torch

    if groups.shape[1] <= count:
        return groups
    ordered = groups.sort(dim=1).values
    return ordered[:, torch.linspace(0, groups.shape[1] - 1, count).long()]


def _integer(groups: Tensor, unit: float) -> _Fit:
    return _whole_steps(groups, groups.new_zeros(len(groups), 1), unit)


def _affine(groups: Tensor, unit: float) -> _Fit:
    return _whole_steps(groups, groups.amin(1, keepdim=True), unit)


def _whole_steps(groups: Tensor, base: Tensor, unit: float) -> _Fit:
    """Find for each group the smallest number of steps from `base` to the value farthest from it with which all values
    are whole numbers of steps, within what rounding to `unit` allows."""
    import torch

    values = groups - base
    far = values.abs().amax(1, keepdim=True).clamp_min(1e-30)
    share, size = values / far, (groups.abs() + base.abs()) / far
    error = _SLACK * unit * (size + share.abs() * size.amax(1, keepdim=True))  # of one value, and of the largest
    telling = (share != 0).scatter(1, share.abs().argmax(1, keepdim=True), False)  # zero and the largest fit any grid
    counts = torch.arange(1, _MOST_STEPS + 1, dtype=torch.float32)
    picked = torch.linspace(0, share.shape[1] - 1, min(_PROBES, share.shape[1])).long()
    steps = share[:, None, picked] * counts[:, None]
    possible = ((steps - steps.round()).abs() <= error[:, None, picked] * counts[:, None] + _EXACT).all(-1)
    tried = torch.where(possible, counts, torch.inf).sort(1).values[:, :_TRIES, None]  # the smallest first
    steps, allowed = share[:, None] * tried, error[:, None] * tried + _EXACT
    good = ((steps - steps.round()).abs() <= allowed).all(-1)  # never where there is none: infinity less itself is NaN
    good &= (torch.where(telling[:, None], (2 * allowed).clamp(1e-6, 1.0).log(), 0.0)).sum(-1) < _CHANCE
    first = tried[..., 0].gather(1, good.int().argmax(1, keepdim=True))[:, 0]
    best = torch.where(good.any(1), first, -1.0).long()
    steps = (share * best.clamp_min(1)[:, None]).round()
    untold = (best < 0) & (((share == 0) | (1 - share.abs() <= error + _EXACT)).all(1))
    return _Fit(best > 0, steps.amin(1), steps.amax(1), steps, untold)


def _nf4(groups: Tensor, unit: float) -> _Fit:
    import torch

    share = groups / groups.abs().amax(1, keepdim=True)
    table = torch.tensor(_NF4)
    place = torch.bucketize(share, (table[1:] + table[:-1]) / 2)
    good = ((share - table[place]).abs() <= 4 * unit * share.abs() + 1e-6).all(1)
    # the lowest, zero and the highest alone are the levels of 2 bits
    several = int(torch.bincount(place.flatten()).count_nonzero()) > 3
    return _Fit(good & several, place.amin(1) - 8, place.amax(1) - 8)


def _fp8(groups: Tensor, unit: float) -> _Fit:
    """8-bit floats of 4 bits of exponent with the scale that brings the largest value of a group to 448."""
    import torch

    share = groups / groups.abs().amax(1, keepdim=True) * 448
    good = ((share.to(torch.float8_e4m3fn).float() - share).abs() <= 4 * unit * share.abs() + 1e-6).all(1)
    spread = len(set(share.abs().flatten().tolist())) > 4
    return _Fit(good & spread, share.amin(1), share.amax(1))


#: codes by name, in the order in which they are tried
_CODES: dict[str, _Code] = {"integer": _integer, "nf4": _nf4, "affine": _affine, "fp8": _fp8}
_NAMES = {"affine": "integer"}
