"""Figures per window, as columns: one table says which there are, and every form of them follows from it.

    WindowRows (one side, in its evidence) ─┐
                                            ├─ pair_rows ──▶ PairedRows (in a certificate) ──▶ Rows (arrays)
    WindowRows (the other side) ────────────┘

A new figure is one entry in COLUMNS. A source computes it, and a gate reads it as `rows["its_name"]`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import create_model

from invarlock.core.exceptions import DataError, PairingError
from invarlock.evidence.plain import ABSENT, Plain, finite_or_none

__all__ = ["COLUMNS", "Array", "Column", "PairedRows", "Rows", "WindowRows", "pair_rows", "row_problems"]

Array = NDArray[np.float64]
_Values = Sequence[float | None]


@dataclass(frozen=True)
class Column:
    """One figure per window.

    `holds` says what one entry is: a text, a count, a share (0 to 1) or a number (None where it is not finite). `owner`:
    a `pair` shares it, each `side` has its own (baseline_x and subject_x in a certificate), or only the `subject` has
    it, as it compares with the baseline. `largest_of` names the column whose sum over a window's tokens this one holds
    the largest term of. `null`: a figure that was not measured is written as null and not left out, as the first
    certificates had it.
    """

    name: str
    holds: Literal["text", "count", "share", "number"]
    owner: Literal["pair", "side", "subject"]
    unit: str
    required: bool = False
    largest_of: str | None = None
    null: bool = False

    @property
    def paired(self) -> tuple[tuple[str, str], ...]:
        """The names that it has in a certificate, each with the side that it comes from."""
        if self.owner == "side":
            return tuple((f"{side}_{self.name}", side) for side in ("baseline", "subject"))
        return ((self.name, "baseline" if self.owner == "pair" else "subject"),)

    @property
    def field(self) -> tuple[Any, Any]:
        """Its type and default in the JSON forms."""
        entry: Any = {"text": str, "count": int, "share": float, "number": float | None}[self.holds]
        if self.required:
            return list[entry], ...
        return (list[entry] | None if self.null else Annotated[list[entry] | None, ABSENT]), None

    def plain(self, values: Sequence[Any]) -> list[Any]:
        """Return what a source measured in the JSON form: whole counts, and None for what is not finite."""
        if self.holds == "text":
            return list(values)
        if self.holds == "count":
            return [int(value) for value in values]
        return [None if value is None else finite_or_none(value) for value in values]


#: every figure per window
COLUMNS: tuple[Column, ...] = (
    Column("window_ids", "text", "pair", "digest of the content", required=True),
    Column("document_ids", "text", "pair", "windows of one document depend on each other", required=True),
    Column("tokens", "count", "pair", "scored tokens", required=True),
    Column("loss", "number", "side", "mean log-loss, nats per scored token", required=True),
    Column("kl_sum", "number", "subject", "KL of the compact distributions, nats, summed over the tokens", null=True),
    Column("kl_max", "number", "subject", "largest KL of a token, nats", largest_of="kl_sum", null=True),
    Column("kl_exact_sum", "number", "subject", "KL of whole distributions, nats; a few windows", null=True),
    Column("flips", "count", "subject", "tokens whose most likely next token is another one", null=True),
    Column("correct", "share", "side", "share of right answers", null=True),
    Column("slices", "text", "pair", "kind of text, where there are several"),
)
_SCORED = tuple(column for column in COLUMNS if column.holds != "text")


class _Columns(Plain):
    if TYPE_CHECKING:  # made from COLUMNS below
        window_ids: list[str]
        document_ids: list[str]
        slices: list[str] | None
        tokens: list[int]

        def __getattr__(self, name: str) -> list[Any]: ...

    def head(self, count: int) -> Self:
        """Return the first `count` rows."""
        return type(self)(**{name: None if values is None else values[:count] for name, values in self})


class _WindowRows(_Columns):
    """What one side showed, one row a window, as columns."""

    @classmethod
    def of(
        cls, window_ids: Sequence[str], document_ids: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> WindowRows:
        """Make the rows of what was measured; `columns` are named as in COLUMNS, and others are refused."""
        given = {"window_ids": window_ids, "document_ids": document_ids, **columns}
        known = {column.name: column for column in COLUMNS}
        unknown = sorted(given.keys() - known.keys())
        if unknown:
            raise DataError(f"got a figure {unknown[0]!r}; expected only: {', '.join(known)}")
        made: WindowRows = WindowRows(**{name: known[name].plain(values) for name, values in given.items()})
        return made

    def followed_by(self, more: WindowRows) -> WindowRows:
        """Return these rows and then those; a figure that one of the two lacks is None there."""
        columns = {}
        for name, values in self:
            parts = (values, getattr(more, name))
            sizes = (len(self.window_ids), len(more.window_ids))
            filled = [[None] * size if part is None else part for part, size in zip(parts, sizes, strict=True)]
            columns[name] = None if parts == (None, None) else [*filled[0], *filled[1]]
        made: WindowRows = WindowRows(**columns)
        return made


class _PairedRows(_Columns):
    """What both sides showed on one split, side by side, as columns."""


def _form(base: type[_Columns], fields: dict[str, tuple[Any, Any]]) -> Any:
    return create_model(base.__name__.strip("_"), __base__=base, __module__=__name__, __doc__=base.__doc__, **fields)  # type: ignore[call-overload]


if TYPE_CHECKING:

    class WindowRows(_WindowRows): ...

    class PairedRows(_PairedRows): ...
else:
    WindowRows = _form(_WindowRows, {column.name: column.field for column in COLUMNS})
    PairedRows = _form(_PairedRows, {name: column.field for column in COLUMNS for name, _ in column.paired})


def pair_rows(baseline: WindowRows, subject: WindowRows, split: str) -> PairedRows:
    """Put the rows of one split side by side. Raises PairingError where windows, their order or tokens differ."""
    if baseline.window_ids != subject.window_ids:
        ours, theirs = set(subject.window_ids), set(baseline.window_ids)
        raise PairingError(
            f"{split}: {len(ours & theirs)} of {len(theirs)} windows are paired; expected the same windows in the same "
            "order: measure the subject with the baseline's report",
            code="E006",
        )
    if baseline.tokens != subject.tokens:
        raise PairingError(f"{split}: the two sides scored other tokens; expected the same masks", code="E003")
    sides = {"baseline": baseline, "subject": subject}
    names = [(name, sides[side], column.name) for column in COLUMNS for name, side in column.paired]
    return PairedRows(**{name: getattr(side, source) for name, side, source in names})


def row_problems(where: str, rows: PairedRows) -> Iterator[str]:
    """Say what cannot be in the rows of one split, whatever was measured."""
    count = len(rows.window_ids)
    for name, entries in rows:
        if entries is not None and len(entries) != count:
            yield f"{where}.{name} has {len(entries)} rows; expected {count}"
    if len(set(rows.window_ids)) != count:
        yield f"{where}.window_ids repeat"
    if any(n < 1 for n in rows.tokens):
        yield f"{where}.tokens has a window without scored tokens"
    for column in COLUMNS:
        for name, _ in column.paired:
            values = getattr(rows, name) or ()
            if column.holds == "share" and any(not 0.0 <= value <= 1.0 for value in values):
                yield f"{where}.{name} has a value outside [0, 1]"
            if column.largest_of is not None:
                yield from _impossible_sums(where, rows.tokens, getattr(rows, column.largest_of) or (), values)


def _impossible_sums(where: str, tokens: Sequence[int], sums: _Values, largest: _Values) -> Iterator[str]:
    """No window's sum lies below its largest token's or above as many of them."""
    for total, top, n in zip(sums, largest, tokens, strict=False):
        if total is not None and top is not None and not 0.0 <= top <= total * (1 + 1e-9) <= n * top * (1 + 2e-9):
            yield f"{where}: {n} tokens of at most {top:.6g} nats cannot sum to {total:.6g}"


@dataclass(frozen=True)
class Rows:
    """The rows of both splits as float64 arrays, preview first; what is not finite is NaN, what was not measured None."""

    documents: list[str]
    is_final: NDArray[np.bool_]
    columns: Mapping[str, Array | None]
    slices: list[str] | None = None  # the kind of each window's text, where there are several

    @classmethod
    def of(cls, preview: PairedRows, final: PairedRows) -> Rows:
        names = [name for column in _SCORED for name, _ in column.paired]
        return cls(
            documents=preview.document_ids + final.document_ids,
            is_final=np.array([False] * len(preview.tokens) + [True] * len(final.tokens)),
            columns={name: _joined(getattr(preview, name), getattr(final, name)) for name in names},
            slices=preview.slices + final.slices if preview.slices and final.slices else None,
        )

    def of_slice(self, name: str) -> Rows:
        """Return the rows of one kind of text."""
        mine = np.array([found == name for found in self.slices or ()], dtype=bool)
        return Rows(
            documents=[document for document, is_mine in zip(self.documents, mine, strict=True) if is_mine],
            is_final=self.is_final[mine],
            columns={column: None if values is None else values[mine] for column, values in self.columns.items()},
        )

    def __getitem__(self, name: str) -> Array | None:
        """Return a column under its name in a certificate; KeyError where COLUMNS has none of that name."""
        return self.columns[name]

    def need(self, name: str) -> Array:
        """Return a column that must have been measured."""
        found = self.columns[name]
        if found is None:
            raise DataError(f"the rows have no {name}; expected one value a window")
        return found

    @property
    def tokens(self) -> Array:
        return self.need("tokens")

    @property
    def baseline(self) -> Array:
        """Log-loss of the baseline, nats."""
        return self.need("baseline_loss")

    @property
    def subject(self) -> Array:
        """Log-loss of the subject, nats."""
        return self.need("subject_loss")


def _joined(*parts: _Values | None) -> Array | None:
    present = [part for part in parts if part is not None]
    if len(present) < len(parts):
        return None
    return np.array([math.nan if value is None else value for part in present for value in part], dtype=np.float64)
