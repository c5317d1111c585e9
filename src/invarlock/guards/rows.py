"""Rows of embeddings and output layers, compared one by one: what no text of the windows touches is seen here alone.

Each row is kept as its norm and 16 projections of its direction on fixed +-1 vectors, in steps of 1/32, so that the change
of a row relative to its norm is known to about 18 %. A row stands out where that change is beyond both

- 5 times the median change of all rows. Rounding to 8, 4, 3 or 2 bits, by row, by group of 32 or by tensor, changed no row
  of nine tables of six trained models by more than 3.6 times the median;
- 0.15, and in absolute terms what noise that is alike in all entries does to one row in a thousand, times what 16
  projections add to that: 1.8 times the median with 512 columns, 2.6 with 16, 3.5 with 5. Such noise, and rounding by
  tensor, changes small rows by much of their norm, and the rows of a narrow table by very unlike amounts.

Where more than half of all rows moved there is no such median. Where it is beyond 10 times what the change of the quietest
twentieth would be the median of (3.4 times that change itself, at most, in the tables above), that takes its place, with 10
for the 5: a text holds few of a large vocabulary, and nothing else would see the rest. Then, too, rows are looked for under
other numbers. Two tables of which one was rotated, or scaled column by column, have no row that stands out, and are judged
by behaviour.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from invarlock.guards.boundary import Finding, finding
from invarlock.stats.linalg import sign_vectors, unpack

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NamedTokens", "changed_rows", "compare_rows", "row_codes", "row_findings", "standing_rows"]

_K, _STEP = 16, 32.0
_CHUNK = 1 << 23  # elements worked on at once
_TIMES, _FLOOR, _RARE = 5.0, 0.15, 1e-3
_QUIETEST, _APART = 20, 10.0
_DEAD, _ZEROED = 1e-3, 0.05
_MATCH, _CLOSER, _SAMPLE, _FEWEST = 0.25, 0.35, 2048, 3
_MOST_NAMED = 8
_SHOWN = 3
#: what happened to rows: the code of its finding, and how it is said
_KINDS = {
    "moved": ("rows_moved", "that hold what other rows held"),
    "zeroed": ("rows_zeroed", "zeroed"),
    "scaled": ("rows_scaled", "of another length"),
    "overwritten": ("rows_overwritten", "with other values"),
}

_Array = NDArray[np.float64]
NamedTokens = Sequence[tuple[int, str]]  # ids and their texts, those to be named first in front


def row_codes(matrix: Tensor) -> str:
    """Return the directions of the rows of [n, width], n * 16 signed bytes in base64."""
    import torch

    rows, width = matrix.shape
    signs = torch.from_numpy(np.array(sign_vectors(width, _K))).to(matrix.device)
    out = np.zeros((rows, _K), dtype=np.int8)
    step = max(1, _CHUNK // width)
    for start in range(0, rows, step):
        part = matrix[start : start + step].detach().to(torch.float32)
        unit = (part @ signs) / part.norm(dim=1, keepdim=True).clamp_min(1e-30)
        codes = torch.nan_to_num(unit * _STEP, nan=0.0).round().clamp(-127, 127)
        out[start : start + len(part)] = codes.to(torch.int8).cpu().numpy()
    return base64.b64encode(out.tobytes()).decode("ascii")


def compare_rows(
    old: tuple[_Array, str], new: tuple[_Array, str], width: int, names: Iterable[int] = ()
) -> dict[str, Any] | None:
    """Compare two tables of rows of `width` values, each table (norms [n], codes); rows beyond the shorter one are new, and
    not compared.

    Returns the number of rows compared, the limit, how many changed in which way, and up to 8 of each, those in `names`
    first: {row, kind, change, norm_ratio, from}. None where a norm is not finite.
    """
    found = changed_rows(old, new, width)
    if found is None:
        return None
    wanted = {row: place for place, row in enumerate(names)}
    listed = sorted(found["rows"], key=lambda row: (wanted.get(row["row"], len(wanted)), row["row"]))
    counts = Counter(row["kind"] for row in found["rows"])
    kept = [row for kind in _KINDS for row in [row for row in listed if row["kind"] == kind][:_MOST_NAMED]]
    return {**found, "counts": dict(sorted(counts.items())), "rows": kept}


def changed_rows(old: tuple[_Array, str], new: tuple[_Array, str], width: int) -> dict[str, Any] | None:
    """Return {compared, limit, median, rows}: every row that stands out, in order; None where a norm is not finite."""
    count = min(len(old[0]), len(new[0]))
    (length, before), (length_now, after) = ((norms[:count], _unpacked(codes)[:count]) for norms, codes in (old, new))
    if not count or not (np.isfinite(length).all() and np.isfinite(length_now).all()):
        return None
    absolute = np.linalg.norm(after * length_now[:, None] - before * length[:, None], axis=1) / _K**0.5
    living = length > _DEAD * float(np.median(length))
    change = np.where(living, absolute / np.where(living, length, 1.0), 0.0)
    (median, quiet), (typical, least) = _usual(change[living], width), _usual(absolute[living], width)
    limit = max(_FLOOR, _TIMES * median)
    if median > _APART * quiet:
        limit, typical = max(_FLOOR, _APART * quiet), least
    unlike = _noise(width, _RARE) * typical
    standing = np.flatnonzero((change > limit) & (absolute > _noise(_K, _RARE) * unlike))
    zeroed = living & (length_now < _ZEROED * length) & (absolute > unlike)
    standing = np.union1d(standing, np.flatnonzero(zeroed))
    turned = np.linalg.norm(after - before, axis=1) / _K**0.5
    if median > _FLOOR:
        standing = np.union1d(standing, _moved_among_many(before, after, turned, np.flatnonzero(living)))
    origin = dict(zip(standing.tolist(), _origins(before, after, turned, standing), strict=True))
    rows = []
    for row in standing.tolist():
        ratio = float(length_now[row] / length[row])
        kind = "scaled" if turned[row] < _FLOOR else "overwritten"
        kind = "zeroed" if ratio < _ZEROED else "moved" if origin[row] is not None else kind
        told = {"row": row, "kind": kind, "change": round(float(change[row]), 3), "norm_ratio": round(ratio, 3)}
        rows.append(told | ({"from": origin[row]} if kind == "moved" else {}))
    return {"compared": count, "median": round(median, 6), "limit": round(limit, 6), "rows": rows}


def _noise(terms: int, chance: float) -> float:
    """Return the norm of so many normal values that a share `chance` of such norms exceeds, in units of their median."""
    from scipy.special import chdtri

    return float(np.sqrt(chdtri(terms, chance) / chdtri(terms, 0.5)))


def _usual(changes: _Array, width: int) -> tuple[float, float]:
    """Return the median of changes, and what it would be if all rows of this width changed as their quietest twentieth
    did; 0 where there is none."""
    if not len(changes):
        return 0.0, 0.0
    quietest = float(np.sort(changes)[(len(changes) - 1) // _QUIETEST])
    return float(np.median(changes)), quietest / _noise(width, 1.0 - 1.0 / _QUIETEST)


def standing_rows(before: Mapping[str, Any], after: Mapping[str, Any], at_least: int) -> list[int]:
    """Return the numbers of the rows that stand out, and of those whose values they hold, in the tables of at least so many
    rows; `before` and `after` are what was measured on the two sides, by module."""
    found: set[int] = set()
    now = {module["name"]: module for module in after["modules"]}
    for old in before["modules"]:
        new = now.get(old["name"], {})
        if "directions" in old and "directions" in new and old["shape"][0] >= at_least:
            tables = ((unpack(side["rows"]), side["directions"]) for side in (old, new))
            for row in (changed_rows(next(tables), next(tables), old["shape"][1]) or {"rows": ()})["rows"]:
                found |= {row["row"], row.get("from", row["row"])}
    return sorted(found)


def row_findings(name: str, facts: Mapping[str, Any] | None, tokens: NamedTokens) -> list[Finding]:
    """Return one finding for each way in which rows of `name` changed, with the texts of the tokens that are known."""
    found: list[Finding] = []
    if not facts:
        return found
    texts = dict(tokens)
    for kind, (code, said) in _KINDS.items():
        count = int(facts["counts"].get(kind, 0))
        if not count:
            continue
        named = [row for row in facts["rows"] if row["kind"] == kind]
        shown = ", ".join(_shown(row, texts) for row in named[:_SHOWN])
        more = f" and {count - _SHOWN} more" if count > _SHOWN else ""
        text = f"{name}: rows {said} ({count} of {facts['compared']}): {shown}{more}"
        found.append(finding(code, name, text))
    return found


def _shown(row: Mapping[str, Any], texts: Mapping[int, str]) -> str:
    def called(number: int) -> str:
        return f"{number} {texts[number]!r}" if number in texts else str(number)

    return called(row["row"]) + (f" (that of {called(row['from'])})" if "from" in row else "")


def _unpacked(codes: str) -> _Array:
    values = np.frombuffer(base64.b64decode(codes, validate=True), dtype=np.int8)
    return values.reshape(-1, _K).astype(np.float64) / _STEP


def _origins(before: _Array, after: _Array, turned: _Array, rows: Sequence[int] | NDArray[np.intp]) -> list[int | None]:
    """Return, for each of `rows`, the other row of the baseline that it holds now; None where it holds none of them."""
    found: list[int | None] = []
    picked, ours = np.asarray(rows, dtype=np.intp), (before**2).sum(axis=1)
    step = max(1, _CHUNK // max(len(before), 1))
    for start in range(0, len(picked), step):
        part = picked[start : start + step]
        now = after[part]
        apart = (now**2).sum(axis=1)[:, None] + ours[None, :] - 2.0 * (now @ before.T)
        apart[np.arange(len(part)), part] = np.inf
        nearest = apart.argmin(axis=1)
        distance = np.sqrt(np.maximum(apart[np.arange(len(part)), nearest], 0.0) / _K)
        close = distance <= np.minimum(_MATCH, _CLOSER * turned[part])
        found += [int(there) if near else None for there, near in zip(nearest, close, strict=True)]
    return found


def _moved_among_many(before: _Array, after: _Array, turned: _Array, living: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return the rows that hold another row's values, where most rows changed: all of them, once a sample shows a few."""
    sample = living[:: max(1, len(living) // _SAMPLE)]
    if sum(origin is not None for origin in _origins(before, after, turned, sample)) < _FEWEST:
        return sample[:0]
    origins = _origins(before, after, turned, living)
    return living[[origin is not None for origin in origins]]
