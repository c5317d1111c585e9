"""The operations that a fingerprint names, and how each reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["OPERATIONS", "Operation"]


class Operation(NamedTuple):
    """One recognised operation: a key of `OPERATIONS`, and its figures."""

    name: str
    facts: Mapping[str, Any] = {}

    @property
    def words(self) -> str:
        """Return the operation in words."""
        return OPERATIONS[self.name](self.facts)

    @property
    def value(self) -> str:
        """Return the figure that `--expect NAME:VALUE` compares: bits, rank, type, share, factor."""
        return str(next((self.facts[key] for key in _VALUES if key in self.facts), ""))


def _share(facts: Mapping[str, Any]) -> str:
    return f"{facts['share']:.0%}".rstrip()


def _lines_words(facts: Mapping[str, Any], what: str) -> str:
    listed: Sequence[int] = facts["listed"]
    if facts.get("heads"):
        heads, its = facts["heads"], "their" if len(facts["heads"]) > 1 else "its"
        return f"head{'s' * (len(heads) > 1)} {', '.join(map(str, heads[:6]))} only ({its} {what}s)"
    run = facts["last"] - facts["first"] + 1 == facts["count"]
    if facts["count"] == 1:
        return f"{what} {facts['first']} only"
    if run:
        return f"{what}s {facts['first']}–{facts['last']} only"
    more = ", …" if facts["count"] > len(listed) else ""
    return f"{facts['count']} of {facts['of']} {what}s only ({', '.join(map(str, listed))}{more})"


def _pruned_words(facts: Mapping[str, Any]) -> str:
    return f"pruned, {_share(facts)} zeros" + (f" ({facts['pattern']})" if facts["pattern"] else "")


def _changed_words(facts: Mapping[str, Any]) -> str:
    part = f", {facts['count']} of {facts['of']} values" if facts.get("count", 0) < 0.9 * facts.get("of", 0) else ""
    return (f"changed by {facts['size']:.2g}" if "size" in facts else "changed") + part


#: every operation by name, and how it reads
OPERATIONS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "identical": lambda f: "identical",
    "cast": lambda f: f"stored as {f['to']}, values unchanged" if f["exact"] else f"cast to {f['to']}",
    "rounded": lambda f: str(f["words"]),
    "pruned": _pruned_words,
    "low_rank": lambda f: f"rank-{f['rank']} update",
    "rank_cut": lambda f: f"cut to rank {f['rank']}",
    "scaled": lambda f: f"scaled by {f['by']:.4g}",
    "shifted": lambda f: f"shifted by {f['by']:+.3g}",
    "sign": lambda f: "sign flipped",
    "lines_scaled": lambda f: f"{f['axis']} scaled, each by a factor of its own",
    "lines_sign": lambda f: f"signs of some {f['axis']} flipped",
    "zeroed": lambda f: "zeroed",
    "constant": lambda f: f"constant {f['value']:.4g}",
    "transposed": lambda f: "transposed",
    "permuted": lambda f: f"{f['axis']} in another order",
    "rotated": lambda f: f"{f['axis']} turned by an orthogonal matrix",
    "swapped": lambda f: f"holds what {f['with']} held",
    "unrelated": lambda f: f"unrelated to what it was (re-initialised?), spread {f['spread']:.2g}",
    "rows": lambda f: _lines_words(f, "row"),
    "columns": lambda f: _lines_words(f, "column"),
    "few_values": lambda f: f"{f['count']} value{'s' * (f['count'] > 1)} (row {f['rows']})",
    "not_finite": lambda f: f"{f['count']} values are not finite",
    "reshaped": lambda f: f"shape {f['before']} became {f['after']}",
    "changed": _changed_words,
}
_VALUES = ("bits", "rank", "to", "by", "share", "axis", "value", "with")
