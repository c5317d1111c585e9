"""What was done to the weights, in words that point at a cause: an operation on a role, not a list of tensors.

A role is a tensor's name without the number of its layer: `self_attn.q_proj.bias` in all layers is one role. Where every
tensor of a role changed by one recognised operation (zeroed, shifted or scaled by a constant, sign flipped), the role is
named; what stands out beyond that is told tensor by tensor, and a change without a pattern as uniform.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from invarlock.guards.sketch import Culprits, culprits
from invarlock.stats.linalg import finite, sign_vectors, unpack

__all__ = ["Row", "diagnose", "diagnose_by_role", "mark_shifts"]

Row = Mapping[str, Any]
_VECTORS = 64  # a longer vector is kept as so many projections
_UNCHANGED = 1e-5
_EVEN = 0.02  # deviation of a shift over its size up to which it counts as a constant
_NUMBER = re.compile(r"\.\d+\.")
_MOST_ROLES = 4


def mark_shifts(
    rows: list[dict[str, Any]], before: Mapping[str, str], after: Mapping[str, str], lengths: Mapping[str, int]
) -> None:
    """Add `shift` to the rows of vectors to which one constant was added; `lengths` are theirs, by name.

    A vector's sketch is linear, so the difference of two is the sketch of the difference, and that of a constant is known.
    """
    for row in rows:
        length, size = lengths.get(row["name"]), finite(row.get("rel_change"))
        if length is None or row["family"] != "vector" or not size or size < _UNCHANGED:
            continue
        difference = unpack(after[row["name"]]) - unpack(before[row["name"]])
        ones = np.ones(length) if length <= _VECTORS else sign_vectors(length, _VECTORS).sum(axis=0, dtype=np.float64)
        if len(ones) != len(difference) or not ones.any():
            continue
        constant = float(difference @ ones / (ones @ ones))
        if _norm(difference - constant * ones) <= _EVEN * _norm(difference):
            row["shift"] = constant


def diagnose(rows: Sequence[Row]) -> Culprits:
    """Name the roles that one operation changed, else the tensors that stand out, else say that the change is uniform."""
    found, touched = culprits(rows), [row for row in rows if _changed(row)]
    told = {row.get("operation") for row in touched}  # a certificate of an earlier derivation has none
    if found.uniform and told != {None} and _whole_families(rows, touched):
        return Culprits(found.named, True, f"{found.text}: {told.pop()}" if len(told) == 1 else found.text)
    roles: dict[str, list[Row]] = {}
    for row in rows:
        roles.setdefault(_NUMBER.sub(".*.", str(row["name"])), []).append(row)
    done: dict[str, list[tuple[str, list[Row]]]] = {}
    for role, members in roles.items():
        alike = {_operation(row) for row in members}
        if len(alike) == 1 and len(members) > 1 and (name := alike.pop()) is not None:
            done.setdefault(name, []).append((role, members))
    named = [row for group in done.values() for _, members in group for row in members]
    if not named or len(named) == len(rows) or 2 * len(named) < len(touched):
        return found
    parts = [f"{_roles(group)}: {what}" for what, group in done.items()]
    rest = [row for row in found.named if row["name"] not in {row["name"] for row in named}]
    more = f"; also {rest[0]['name']} ({rest[0]['what']})" if rest else ""
    listed = [{**row, "what": what} for what, group in done.items() for _, members in group for row in members]
    return Culprits([*listed, *rest], False, f"changed alike in every layer: {'; '.join(parts)}{more}")


def diagnose_by_role(rows: Sequence[Row]) -> Culprits:
    """Diagnose, and count: a change is uniform only where every tensor of the families that it touched changed, else the
    roles are told, and the layer where it is one; the text ends with how many tensors changed and how many did not."""
    found, changed = diagnose(rows), [row for row in rows if _changed(row)]
    if not changed or (found.uniform and _whole_families(rows, changed)):
        return found
    text, same = _by_role(rows, changed) if found.uniform else found.text, len(rows) - len(changed)
    counts = f"{len(changed)} of {len(rows)} tensors changed" + (f", {same} are as they were" if same else "")
    return Culprits(found.named, False, f"{text}; {counts}")


def _whole_families(rows: Sequence[Row], changed: Sequence[Row]) -> bool:
    families = {row["family"] for row in changed}
    return all(_changed(row) for row in rows if row["family"] in families)


def _by_role(rows: Sequence[Row], changed: Sequence[Row]) -> str:
    """Say which roles changed in how many layers, and by how much."""
    every, some = (Counter(_NUMBER.sub(".*.", str(row["name"])) for row in part) for part in (rows, changed))
    parts = [f"{role.rpartition('.*.')[2]} ({count} of {every[role]})" for role, count in some.most_common(_MOST_ROLES)]
    more = f" and {len(some) - _MOST_ROLES} more roles" if len(some) > _MOST_ROLES else ""
    layers = {found[0].strip(".") if (found := _NUMBER.search(str(row["name"]))) else None for row in changed}
    where = f" in layer {layers.pop()}" if len(layers) == 1 and None not in layers else ""
    sizes = sorted(size for row in changed if (size := finite(row.get("rel_change"))) is not None)
    spread = f", relative change {sizes[0]:.1g} to {sizes[-1]:.1g}" if sizes else ""
    return f"changed{where}: {', '.join(parts)}{more}{spread}"


def _roles(group: Sequence[tuple[str, list[Row]]]) -> str:
    names = [role.rpartition(".*.")[2] for role, _ in group]
    more = f" and {len(names) - _MOST_ROLES} more" if len(names) > _MOST_ROLES else ""
    return f"all {', '.join(names[:_MOST_ROLES])}{more} ({sum(len(members) for _, members in group)} tensors)"


def _changed(row: Row) -> bool:
    size = finite(row.get("rel_change"))
    return size is None or size >= _UNCHANGED


def _operation(row: Row) -> str | None:
    """Return what was done to a tensor: as its values told, where both were at hand, else where its sketch shows one plain
    operation, rounded so that layers agree."""
    if _changed(row) and row.get("operation"):
        return str(row["operation"])
    cosine, ratio = finite(row.get("cosine")), finite(row.get("norm_ratio"))
    if ratio is None or not _changed(row):
        return None
    if row.get("shift") is not None:
        return f"shifted by {row['shift']:+.2g}"
    if ratio < 1e-6:
        return "zeroed"
    if cosine is None or abs(cosine) < 0.9999:
        return None
    if abs(ratio - 1) > 0.005:
        return f"scaled by {np.copysign(ratio, cosine):.3g}"
    return "sign flipped" if cosine < 0 else None


def _norm(values: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(values))
