"""Which tensors an edit would hurt most, before it ships: the ranking of `bisect` on an edit made in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from invarlock.checkpoints.structure import stored_names
from invarlock.core import registry
from invarlock.core.files import plain
from invarlock.flow import steps
from invarlock.flow.bisect import Search
from invarlock.flow.damage import Changed, changed_tensors, rank
from invarlock.flow.repair import ignore_lists

__all__ = ["Sensitivity", "sensitivity"]


@dataclass
class Sensitivity:
    """Expected damage of an edit by tensor, worst first, and what to keep as it is within `budget` bytes."""

    model: str
    edit: dict[str, Any]
    ranking: list[Changed]
    windows: int
    budget: int
    keep: list[str] = field(default_factory=list)
    ignore: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def expected(self) -> float:
        """Expected damage of the whole edit in nats a token, as if every tensor's added up."""
        return sum(change.expected for change in self.ranking)

    @property
    def lines(self) -> list[str]:
        """Return it in words."""
        kept = {change.name: change for change in self.ranking if change.name in set(self.keep)}
        saved = sum(change.expected for change in kept.values())
        size = sum(change.bytes for change in kept.values())
        lines = [
            f"{self.edit['name']} of {len(self.ranking)} tensors: about {self.expected:.4f} nats a token expected in all"
        ]
        for change in self.ranking[:3]:
            lines.append(f"{change.name}: about {change.expected:.4f} nats (± {change.spread:.4f})")
        if kept:
            lines.append(
                f"keep {len(kept)} as they are ({size / 2**20:.2f} MB): about {saved:.4f} nats saved "
                f"({saved / self.expected:.0%})"
            )
        lines.append("expected to second order: it orders tensors; certify the edited model for a verdict")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        kept = ("model", "edit", "windows", "budget", "keep", "ignore", "expected", "lines", "timings", "notes")
        found: dict[str, Any] = plain({key: getattr(self, key) for key in kept})
        return {**found, "ranking": [plain(change.to_dict()) for change in self.ranking]}


def sensitivity(search: Search, edit: str, plan: Mapping[str, Any], share: float) -> Sensitivity:
    """Rank what an edit would do to a model. `search` holds the model twice; `share` of the changed bytes may be kept.

    Raises EditError for an edit that changes nothing or does not exist.
    """
    job = search.job
    made = registry.edits.create(edit, **dict(plan))
    facts, _ = steps.apply_edit(job, search.subject, search.sides[0], made, {})
    changes = changed_tensors(search.baseline, search.subject)
    with job.timed("ranking"):
        windows = rank(job, search.baseline, search.subject, changes, search.windows.preview, stop=search.late)
    ranking = sorted(changes.values(), key=lambda change: -change.expected)
    budget = int(share * sum(change.bytes for change in ranking))
    found = Sensitivity(search.sides[0].id, {"name": edit, "plan": dict(plan)}, ranking, windows, budget)
    left = budget
    for change in sorted(ranking, key=lambda change: -change.expected / max(change.bytes, 1)):
        if change.bytes <= left:
            found.keep.append(change.name)
            left -= change.bytes
    found.ignore = ignore_lists(stored_names(search.baseline, found.keep), Path(str(search.sides[0].folder)))
    found.timings, found.notes = dict(job.timings), list(job.notes)
    return found
