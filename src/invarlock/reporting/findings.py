"""Pages of findings that are no certificates (diff, bisect, sensitivity): words, a picture by layer, a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from invarlock.reporting.html import page_environment

__all__ = ["Findings", "render_findings"]

_MOST_ROWS = 400


class _Cell(NamedTuple):
    share: float  # of the largest, in [0, 1]
    text: str


@dataclass(frozen=True)
class Findings:
    """What a page shows. `picture` maps (layer, role) to a size that is not negative; `rows` are cells of text."""

    title: str
    headline: str
    lines: Sequence[str]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    picture: Mapping[tuple[str, str], float]
    measure: str
    notes: Sequence[str] = ()

    @property
    def layers(self) -> list[str]:
        """The rows of the picture."""
        return list(dict.fromkeys(layer for layer, _ in self.picture))

    @property
    def roles(self) -> list[str]:
        """The columns of the picture."""
        return list(dict.fromkeys(role for _, role in self.picture))

    def cell(self, layer: str, role: str) -> _Cell | None:
        """Return how dark a cell is and what it says; None where the model has no such tensor."""
        size = self.picture.get((layer, role))
        if size is None:
            return None
        top = max((value for value in self.picture.values() if math.isfinite(value)), default=0.0)
        share = 1.0 if not math.isfinite(size) else math.sqrt(size / top) if top else 0.0
        return _Cell(round(share, 3), f"{size:.3g}")

    @property
    def shown(self) -> Sequence[Sequence[str]]:
        """The rows of the table that fit on a page."""
        return self.rows[:_MOST_ROWS]


def render_findings(findings: Findings) -> str:
    """Return the page, which stands alone; all that it is given is escaped."""
    return page_environment().get_template("findings.html").render(page=findings)
