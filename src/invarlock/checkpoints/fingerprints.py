"""What was done to a tensor, told from its values before and after: one engine of names for every report.

A pair is compared in one pass over all its values (sizes, rows and columns touched), and the operation is recognised on a
sample of rows and columns, where every candidate is checked against all values of the sample. Two operations at once are
told where one explains the other's rest: a cast and anything, a part of the rows and anything, a rearrangement and
anything, zeros or a scale or a low-rank update under a rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from invarlock.checkpoints.grids import Grid, find_grid, unit_roundoff
from invarlock.checkpoints.operations import Operation
from invarlock.checkpoints.spectra import rank_above_noise, rank_of, rank_of_change, rank_of_kept, scaled_update
from invarlock.checkpoints.structure import stored_type

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Change", "as_matrix", "compare"]

_CHUNK = 1 << 18  # values compared at a time: they stay in the processor's cache
_SAMPLE = 96  # rows and columns that are looked at
_PART = 0.97  # share of rows up to which an edit counts as one of these rows alone
_FLOOR = 2e-5  # relative error of sums in single precision
_UNRELATED = 0.15  # cosine below which two tensors have nothing in common
_MOVED = 0.9  # cosine below which a rearrangement is looked for
_LONG = 32  # values in a line from which on two that are alike by chance are rare
_TURNED = 0.5  # cosine from which on a change is no rotation
_FLOAT8 = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_CUTS = (2, 4, 8, 16)  # values of which a pruning pattern keeps some
_SMALL = 1 << 19  # values up to which lines are matched by all of them
_MANY = 1 << 15  # lines from which on they are matched by one projection alone


@dataclass(frozen=True)
class Change:
    """How a tensor differs from its baseline. Figures are None where a value is not finite or the shapes differ.

    `rel_change` is the norm of the difference over the baseline's, `largest` the largest difference of one value, `rows`
    and `columns` how many were touched and of how many. `factors` holds what each row or column was scaled by and `order`
    where each row or column came from, for the search of pairs that cancel out.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    rel_change: float | None = None
    cosine: float | None = None
    norm_ratio: float | None = None
    largest: float | None = None
    rows: tuple[int, int] = (0, 0)
    columns: tuple[int, int] = (0, 0)
    operations: tuple[Operation, ...] = ()
    factors: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    order: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def words(self) -> str:
        """Return all operations in words."""
        return " + ".join(operation.words for operation in self.operations)

    @property
    def identical(self) -> bool:
        """Say whether every value is the same; the type in which it is stored may differ."""
        return all(op.name == "identical" or (op.name == "cast" and op.facts["exact"]) for op in self.operations)

    @property
    def known(self) -> bool:
        """Say whether what was done was recognised."""
        return all(operation.name not in ("changed", "unrelated") for operation in self.operations)


def _type(tensor: Tensor) -> str:
    name = stored_type(tensor)
    return _FLOAT8.get(name, name)


def as_matrix(tensor: Tensor) -> Tensor:
    """Return a tensor as [rows, columns]; a vector is one row, a stack of matrices stands one below the other."""
    if tensor.ndim < 2:
        return tensor.reshape(1, -1)
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 2 else tensor


def compare(name: str, before: Tensor, after: Tensor, *, head_size: int | None = None) -> Change:
    """Compare a tensor with its baseline and name what was done to it. `head_size` is that of an attention head."""
    types = (_type(before), _type(after))
    shape = tuple(after.shape)
    if before.shape != after.shape:
        return Change(name, shape, types, operations=tuple(_reshaped(before, after)))
    if before.dtype == after.dtype and _same_bytes(before, after):
        rows, columns = as_matrix(after).shape if after.numel() else (0, 0)
        return Change(name, shape, types, 0.0, 1.0, 1.0, 0.0, (0, rows), (0, columns), (Operation("identical"),))
    if not (before.is_floating_point() and after.is_floating_point()):
        count = int((before != after).sum())
        return Change(name, shape, types, operations=(Operation("changed", {"count": count, "of": after.numel()}),))
    old, new = as_matrix(before), as_matrix(after)
    sums = _Sums.of(old, new)
    if sums.spoilt:
        return Change(name, shape, types, operations=(Operation("not_finite", {"count": sums.spoilt}),))
    found = _Pair(old, new, sums, head_size)
    operations = tuple(found.operations())
    return Change(
        name,
        shape,
        types,
        math.sqrt(sums.dd / sums.aa) if sums.aa else None,
        found.cosine,
        math.sqrt(sums.bb / sums.aa) if sums.aa else None,
        sums.largest,
        (int(sums.rows.sum()), len(sums.rows)),
        (int(sums.columns.sum()), len(sums.columns)),
        operations,
        found.factors,
        found.order,
    )


def _same_bytes(before: Tensor, after: Tensor) -> bool:
    import torch

    if not before.numel():
        return True
    one, two = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (before, after))
    return torch.equal(one, two)


def _reshaped(before: Tensor, after: Tensor) -> Iterator[Operation]:
    """Name what a tensor of another shape is: transposed, or with rows added or taken away at the end."""
    import torch

    shapes = {"before": list(before.shape), "after": list(after.shape)}
    if (
        before.ndim == after.ndim == 2
        and before.shape == after.shape[::-1]
        and torch.equal(before.T.float(), after.float())
    ):
        yield Operation("transposed")
        return
    yield Operation("reshaped", shapes)
    if before.ndim == after.ndim and before.shape[1:] == after.shape[1:]:
        common = min(len(before), len(after))
        rest = compare("", before[:common], after[:common])
        yield from (operation for operation in rest.operations if operation.name != "identical")


class _Sums(NamedTuple):
    """Sums over all values of a pair, and which rows and columns differ."""

    aa: float
    bb: float
    ab: float
    dd: float
    largest: float
    rows: Tensor
    columns: Tensor
    changed: int
    spoilt: int

    @classmethod
    def of(cls, before: Tensor, after: Tensor) -> _Sums:
        import torch

        height, width = before.shape
        sums, largest, changed, spoilt = [0.0] * 4, 0.0, 0, 0
        rows, columns = torch.zeros(height, dtype=torch.bool), torch.zeros(width, dtype=torch.bool)
        step = max(1, _CHUNK // max(width, 1))
        for start in range(0, height, step):
            part = slice(start, start + step)
            a, b = before[part].float(), after[part].float()
            d = b - a
            x, y, z = a.reshape(-1), b.reshape(-1), d.reshape(-1)
            found = [float(torch.dot(x, x)), float(torch.dot(y, y)), float(torch.dot(x, y)), float(torch.dot(z, z))]
            if not math.isfinite(sum(found)):
                spoilt += int((~torch.isfinite(b)).sum()) or int((~torch.isfinite(a)).sum()) or 1
                continue
            sums = [total + value for total, value in zip(sums, found, strict=True)]
            if found[3] == 0.0:
                continue
            count = int(torch.count_nonzero(z))
            changed += count
            if count == d.numel():
                rows[part] = columns[:] = True
            else:
                moved = d.ne(0)
                rows[part], columns = moved.any(1), columns | moved.any(0)
            largest = max(largest, *(abs(float(end)) for end in torch.aminmax(z)))
        return cls(sums[0], sums[1], sums[2], sums[3], largest, rows, columns, changed, spoilt)


class _Pair:
    """A pair [m, n] of one type of numbers that differs, and the names of what made it differ."""

    def __init__(self, before: Tensor, after: Tensor, sums: _Sums, head_size: int | None = None) -> None:
        self.old, self.new, self.sums, self.head_size = before, after, sums, head_size
        self.cosine = sums.ab / math.sqrt(sums.aa * sums.bb) if sums.aa and sums.bb else (0.0 if sums.aa else None)
        self.factors: dict[str, Tensor] = {}
        self.order: dict[str, Tensor] = {}

    def operations(self) -> Iterator[Operation]:
        """Yield the operations in the order in which they explain the change."""
        sums = self.sums
        cast = self._cast()
        if cast is not None:
            yield cast
            if sums.dd == 0.0 or cast.facts["whole"]:
                return
            sums = _Sums.of(self.old.to(self.new.dtype), self.new)  # what the cast alone changed was not touched
        if not sums.changed:
            return
        rows, columns = sums.rows, sums.columns
        if sums.changed <= max(4, 1e-5 * self.new.numel()) and self.new.numel() > 64:
            places = ", ".join(str(int(row)) for row in rows.nonzero()[:3, 0])
            yield Operation("few_values", {"count": sums.changed, "rows": places})
            return
        part = _some(rows, self.old), _some(columns, self.old.T)
        if not any(part):
            yield from _Names(self.old, self.new, self.sums, self.factors, self.order, self.head_size).all()
            return
        if part[0]:
            yield Operation("rows", _span(rows, self.head_size))
        if part[1]:
            yield Operation("columns", _span(columns, self.head_size))
        old, new = (t[rows] if part[0] else t for t in (self.old, self.new))
        old, new = (t[:, columns] if part[1] else t for t in (old, new))
        yield from _Names(old, new, _Sums.of(old.float(), new.float()), {}, self.order).all()

    def _cast(self) -> Operation | None:
        """Return how the type changed, `whole` where the cast explains everything; None where it loses nothing."""
        import torch

        old, new = self.old, self.new
        if self.sums.dd == 0.0:
            return Operation("cast", {"to": _type(new), "exact": True, "whole": True})
        a, b = old[:: max(1, len(old) // _SAMPLE)].float(), new[:: max(1, len(new) // _SAMPLE)].float()
        for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
            if torch.equal(a.to(dtype).float(), b):
                return Operation("cast", {"to": _type(a.to(dtype)), "exact": False, "whole": True})
        wider = unit_roundoff(old), unit_roundoff(new)
        if old.dtype != new.dtype and wider[1] > 2 * wider[0] and wider[1] > 1e-6:
            return Operation("cast", {"to": _type(new), "exact": False, "whole": False})
        return None


def _span(lines: Tensor, size: int | None = None) -> dict[str, Any]:
    """Return which lines were touched, and which heads of that size where whole ones were."""
    at = lines.nonzero()[:, 0].tolist()
    facts: dict[str, Any] = {"count": len(at), "first": at[0], "last": at[-1], "listed": at[:4], "of": len(lines)}
    if size and len(lines) % size == 0 and len(lines) > size:
        heads = lines.reshape(-1, size)
        if bool((heads.all(1) == heads.any(1)).all()):
            facts["heads"] = heads.all(1).nonzero()[:, 0].tolist()
    return facts


def _some(mask: Tensor, lines: Tensor) -> bool:
    """Say whether only some lines were touched, though others could have been: those of zeros alone could not."""
    if len(mask) == 1 or float(mask.float().mean()) > _PART:
        return False
    return bool((lines[~mask] != 0).any())


class _Names:
    """The operations that turn `old` [m, n] into `new`, where every row is touched."""

    def __init__(
        self,
        old: Tensor,
        new: Tensor,
        sums: _Sums,
        factors: dict[str, Tensor],
        order: dict[str, Tensor] | None,
        head_size: int | None = None,
    ) -> None:
        self.head_size = head_size
        self.old, self.new, self.sums, self.factors, self.order = old, new, sums, factors, order
        picked = _picked(len(new), _SAMPLE)
        self.a, self.b = old[picked].float(), new[picked].float()
        across = _picked(new.shape[1], _SAMPLE)
        self.a_t, self.b_t = old[:, across].T.float().contiguous(), new[:, across].T.float().contiguous()
        self.unit = unit_roundoff(self.b)
        self.tolerance = max(2 * self.unit, _FLOOR)
        self.cosine = sums.ab / math.sqrt(sums.aa * sums.bb) if sums.aa and sums.bb else 0.0

    def all(self) -> Iterator[Operation]:
        """Yield the operations."""
        moved = (self._moved,) if self.cosine < _MOVED else ()
        named = (self._constant, self._scaled, self._shifted, self._lines, self._rounded, self._pruned)
        for recognise in (*named, *moved, self._low_rank):
            if found := list(recognise()):
                yield from found
                return
        if abs(self.cosine) < _UNRELATED and self.sums.aa:
            spread = math.sqrt(self.sums.bb / max(self.new.numel(), 1))
            yield Operation("unrelated", {"spread": spread})
        else:
            size = math.sqrt(self.sums.dd / self.sums.aa) if self.sums.aa else math.inf
            yield Operation("changed", {"size": size, "count": self.sums.changed, "of": self.new.numel()})

    def _constant(self) -> Iterator[Operation]:
        first = float(self.b.flatten()[0])
        if self.sums.bb == 0.0:
            yield Operation("zeroed")
        elif self.new.numel() > 1 and bool((self.new == self.new.flatten()[0]).all()):
            yield Operation("constant", {"value": first})

    def _scaled(self) -> Iterator[Operation]:
        sums = self.sums
        if not sums.aa or not sums.bb:
            return
        factor = sums.ab / sums.aa
        if _far(self.b, factor * self.a) <= self.tolerance and abs(factor - 1) > self.tolerance:
            yield Operation("sign") if abs(factor + 1) <= self.tolerance else Operation("scaled", {"by": factor})

    def _shifted(self) -> Iterator[Operation]:
        difference = self.b - self.a
        mean = float(difference.mean())
        if mean and _far(difference, mean * difference.new_ones(())) <= max(0.02 if self.unit > 1e-4 else 0, 1e-3):
            yield Operation("shifted", {"by": mean})

    def _lines(self) -> Iterator[Operation]:
        """Rows or columns each scaled by a factor of its own."""
        if len(self.new) == 1:
            if self.new.shape[1] > 1 and bool((self.a != 0).all()):
                self.factors["columns"] = (self.b / self.a)[0]
            return
        for axis, a, b in (("rows", self.a, self.b), ("columns", self.a_t, self.b_t)):
            factors = _ratios(a, b)
            if _far(b, factors[:, None] * a) <= self.tolerance and float((factors - 1).abs().max()) > self.tolerance:
                self._keep_factors(axis)
                signs = bool((factors.abs() - 1).abs().max() <= self.tolerance)
                yield Operation(
                    "lines_sign" if signs else "lines_scaled",
                    {"axis": axis, "least": float(factors.min()), "most": float(factors.max())},
                )
                return

    def _keep_factors(self, axis: str) -> None:
        old, new = (self.old, self.new) if axis == "rows" else (self.old.T, self.new.T)
        self.factors[axis] = _ratios(old.float(), new.float())

    def _pruned(self) -> Iterator[Operation]:
        """Zeros where there were none; what is left may be scaled, or changed in ways that have no name."""
        fresh = (self.b == 0) & (self.a != 0)
        share = float(fresh.float().mean())
        if share < 1e-3 or len(self.b) * self.b.shape[1] < 16 or (share < 0.05 and abs(self.cosine) < _UNRELATED):
            return
        pruned = Operation("pruned", {"share": float((self.b == 0).float().mean()), "pattern": self._pattern()})
        left = self.b != 0
        a, b = self.a[left], self.b[left]
        same = not len(b) or _far(b, a) <= self.tolerance
        factor = 1.0 if same else float((a @ b) / (a @ a))
        scaled = not same and _far(b, factor * a) <= self.tolerance
        rank = 0 if same or scaled or min(self.new.shape) < 4 else rank_of_kept(self.old, self.new)
        if rank:
            yield Operation("low_rank", {"rank": rank, "size": _far(b, a)})
        yield pruned
        if same or rank:
            return
        if scaled:
            yield Operation("scaled", {"by": factor})
        else:
            yield Operation("changed", {"size": _far(b, a), "count": self.sums.changed, "of": self.new.numel()})

    def _pattern(self) -> str:
        whole = (self.b == 0).all(1)
        if bool(whole.any()):
            return f"{int(whole.sum())} of {len(whole)} rows looked at are zero"
        for lines, along in ((self.b, ""), (self.b_t, " down the columns")):
            found: list[tuple[float, int, int]] = []
            for of in _CUTS:
                left = (lines[:, : lines.shape[1] // of * of].reshape(-1, of) != 0).sum(1).float()
                kept = int(left.quantile(0.999)) if 0 < len(left) <= 1 << 22 else of
                if kept < of and float(left.mean()) > 0.75 * kept:
                    found.append((kept / of, of, kept))
            if found:
                _, of, kept = min(found)
                return f"{kept}:{of}{along}"
        return ""

    def _rounded(self) -> Iterator[Operation]:
        if self.new.numel() < 64:
            return
        grid = find_grid(self.b, self.b_t) if len(self.new) > 1 else find_grid(self.b, self.b[:, :0])
        if grid is None:
            return
        rounded = Operation("rounded", {**grid._asdict(), "words": grid.words})
        old, left = find_grid(self.a, self.a_t) if len(self.new) > 1 else None, self.b != 0
        again = old is not None and old.bits <= grid.bits  # both are stored on a grid
        if again and _far(self.b[left], self.a[left]) <= self.tolerance:
            return
        if self.cosine < _MOVED and (moved := list(self._moved())):
            yield from moved
            if not again and moved[-1].name != "rounded":
                yield rounded
            return
        alike = abs(self.cosine) >= _UNRELATED
        before = list(self._before_rounding(grid)) if alike else []
        if again and not before and not self._within(grid):
            return
        if not alike:
            yield Operation("unrelated", {"spread": math.sqrt(self.sums.bb / self.new.numel())})
        yield from before
        yield rounded

    def _on(self, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sample before and after as groups [G, g] that share a scale, and about one step of each [G, 1]."""
        a, b = (self.a_t, self.b_t) if grid.axis == "column" else (self.a, self.b)
        size = grid.group or b.shape[1]
        a, b = (t[:, : t.shape[1] // size * size].reshape(-1, size) for t in (a, b))
        ends = b.reshape(1, -1) if grid.axis == "tensor" else b
        if grid.axis == "tensor" and grid.symmetric and grid.code == "integer":
            first = b[b != 0].abs().amin()  # a sample may lack the ends, and never the first step
            return a, b, first.expand(len(b), 1)
        if grid.symmetric:
            return a, b, ends.abs().amax(1, keepdim=True) / max(2 ** (grid.bits - 1) - 1, 1)
        return a, b, (ends.amax(1, keepdim=True) - ends.amin(1, keepdim=True)) / (2**grid.bits - 1)

    def _within(self, grid: Grid) -> bool:
        """Say whether the change is no more than rounding once more to the grid makes."""
        a, b, step = self._on(grid)
        return float((b - a).square().mean()) <= 0.2 * float(step.square().mean())

    def _before_rounding(self, grid: Grid) -> Iterator[Operation]:
        """Name what was done beside the rounding: more zeros than it makes, a scale, or a smooth part of the rest."""
        for axis, c, d in (("columns", self.a_t, self.b_t), ("rows", self.a, self.b)):
            factors = _ratios(c, d)
            spread = float(factors.log().std()) if bool((factors > 0).all()) and len(factors) > 4 else 0.0
            if grid.bits >= 3 and spread > 0.05 and _far(d, factors[:, None] * c) < 0.7 * _far(d, c):
                self._keep_factors(axis)
                yield Operation(
                    "lines_scaled", {"axis": axis, "least": float(factors.min()), "most": float(factors.max())}
                )
                return
        a, b, step = self._on(grid)
        if emptied := list(self._emptied(float(step.max()))):
            yield from emptied
            return
        zeros = b == 0
        if float(zeros.float().mean()) > 1.25 * float((a.abs() < 0.5 * step).float().mean()) + 0.05:
            yield Operation("pruned", {"share": float(zeros.float().mean()), "pattern": self._pattern()})
            left = self.b != 0
            factor = float((self.a * self.b)[left].sum() / self.a[left].square().sum())
            if grid.bits >= 3 and abs(factor - 1) > 0.05:
                yield Operation("sign") if abs(factor + 1) <= 0.05 else Operation("scaled", {"by": factor})
            return
        rest = float((b - a).square().mean())
        factor = float((self.a * self.b).sum() / (self.a * self.a).sum())
        if grid.bits >= 3 and abs(factor - 1) > 0.05 and _far(self.b, factor * self.a) < 0.7 * _far(self.b, self.a):
            yield Operation("sign") if abs(factor + 1) <= 0.05 else Operation("scaled", {"by": factor})
            return
        rank = rank_above_noise(self.old, self.new)
        if grid.bits >= 3 and rank and rest > 1.3 * float((step**2).mean()) / 12:
            yield Operation("low_rank", {"rank": rank, "size": _far(self.b, self.a)})

    def _emptied(self, step: float) -> Iterator[Operation]:
        """Yield the rows and columns of one block that became zero where rounding to this step would not have made it so."""
        fresh = (self.new == 0) & (self.old.abs() > step)
        if int(fresh.count_nonzero()) < 16:
            return
        rows, columns = fresh.any(1), fresh.any(0)
        if bool(rows.all() and columns.all()):
            return
        if float((self.new[rows][:, columns] == 0).float().mean()) < 0.995:
            return
        for what, lines in (("rows", rows), ("columns", columns)):
            if not bool(lines.all()):
                yield Operation(what, _span(lines, self.head_size))
        yield Operation("zeroed")

    def _low_rank(self) -> Iterator[Operation]:
        if min(self.new.shape) < 4 or abs(self.cosine) < 0.2:
            return
        size = math.sqrt(self.sums.dd / max(self.sums.aa, 1e-300))
        rank = rank_of_change(self.old, self.new, self.unit)
        if not rank and size < 8 * self.unit:  # an update hardly larger than the rounding of the type
            rank = rank_above_noise(self.old, self.new)
        if rank:
            yield Operation("low_rank", {"rank": rank, "size": size})
            return
        cut = rank_of(self.new, self.unit)
        if cut and not rank_of(self.old, self.unit):
            yield Operation("rank_cut", {"rank": cut, "size": size})
            return
        found = scaled_update(self.old, self.new, self.unit)
        if found is not None:
            least, most = float(found.factors.min()), float(found.factors.max())
            if found.axis == "tensor":
                yield Operation("sign") if abs(most + 1) <= 1e-3 else Operation("scaled", {"by": most})
            else:
                yield Operation("lines_scaled", {"axis": found.axis, "least": least, "most": most})
            yield Operation("low_rank", {"rank": found.rank, "size": size})

    def _moved(self) -> Iterator[Operation]:
        """Transposed, rows or columns in another order, or turned by an orthogonal matrix; and what else was done."""
        import torch

        if self.order is None:
            return
        if self.old.shape[0] == self.old.shape[1] and _like(self.old.T, self.new):
            yield Operation("transposed")
            yield from _rest(self.old.T, self.new)
            return
        for axis, old, new in (("rows", self.old, self.new), ("columns", self.old.T, self.new.T)):
            if len(old) > 1 and _reordered(old, new):
                came = self.order[axis] = _whole_order(old, new)
                yield Operation("permuted", {"axis": axis})
                yield from _rest(self.old[came] if axis == "rows" else self.old[:, came], self.new)
                return
        for axis, a, b in (("columns", self.a, self.b), ("rows", self.a_t, self.b_t)):
            if len(a) < 8 or a.shape[1] < 8 or abs(self.cosine) > _TURNED:
                continue
            old, new = a @ a.T, b @ b.T
            off = ~torch.eye(len(a), dtype=torch.bool)
            if _far(new, old) < 0.15 and _correlation(old[off], new[off]) > 0.8:
                yield Operation("rotated", {"axis": axis})
                return


def _picked(size: int, most: int) -> Tensor:
    import torch

    return torch.linspace(0, max(size - 1, 0), min(size, most)).long()


def _far(value: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over that of `value`."""
    return float((value - expected).norm() / value.norm().clamp_min(1e-30))


def _ratios(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1) / (a * a).sum(1).clamp_min(1e-30)


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / (a.norm() * b.norm()).clamp_min(1e-30))


def _like(old: Tensor, new: Tensor) -> bool:
    """Say whether `new` is mostly `old`."""
    picked = _picked(len(new), _SAMPLE)
    a, b = old[picked].float(), new[picked].float()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-30)) > _MOVED


def _rest(a: Tensor, b: Tensor) -> Iterator[Operation]:
    """Yield what was done to a rearranged tensor beside."""
    sums = _Sums.of(a, b)
    if sums.dd and _far(b, a) > max(2 * unit_roundoff(b), _FLOOR):
        yield from _Names(a, b, sums, {}, None).all()


def _reordered(old: Tensor, new: Tensor) -> bool:
    """Say whether the rows of `new` are those of `old` in another order, each perhaps scaled or rounded."""
    picked = _picked(len(new), _SAMPLE // 2)
    best = (_directions(new[picked].float()) @ _directions(old.float()).T).max(dim=1)
    moved = float((best.indices != picked).float().mean())
    alike = float((best.values > (_MOVED if old.shape[1] >= _LONG else 1 - 1e-4)).float().mean())
    distinct = len(set(best.indices.tolist())) / len(picked)
    return old.shape[1] > 1 and min(alike, distinct) >= 0.9 and moved >= min(0.3, 1.5 / len(picked))


def _directions(rows: Tensor) -> Tensor:
    found: Tensor = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return found


def _whole_order(old: Tensor, new: Tensor) -> Tensor:
    """Return for each row of `new` the row of `old` that it is, by random projections of both."""
    import torch

    along = torch.randn(old.shape[1], 64, generator=torch.Generator().manual_seed(0))
    if old.numel() <= _SMALL:
        along = torch.eye(old.shape[1])
    if len(old) <= _MANY:
        here, there = _directions(old.float() @ along), _directions(new.float() @ along)
        return torch.cat([(there[at : at + 1024] @ here.T).argmax(1) for at in range(0, len(there), 1024)])
    first, second = (old.float() @ along[:, 0]).argsort(), (new.float() @ along[:, 0]).argsort()
    order = torch.empty_like(first)
    order[second] = first
    return order
