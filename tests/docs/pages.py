"""Read the code blocks of Markdown pages.

A block runs unless a comment before it says why not: `<!-- not run: reason -->`. After `<!-- file: path -->` stands a file of
the source, or a diff of one: a page with such blocks runs on a copy of the source (`test_developers.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

__all__ = ["DOCS", "ROOT", "Block", "blocks", "chapter", "pages"]

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_FENCE = re.compile(
    r"(?:^<!-- (?P<remark>(?:not run|output of|help|file)[^\n]*?) -->\n+)?^```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One fenced block; `remark` is the comment before it, such as `not run: needs the network`."""

    page: Path
    line: int
    language: str
    code: str
    remark: str | None

    @property
    def reason(self) -> str | None:
        """Why the block is not run, or None."""
        return self.remark.partition(":")[2].strip() if self.remark and self.remark.startswith("not run:") else None

    @property
    def file(self) -> str | None:
        """The file of the source that the block is, or changes."""
        return self.remark.partition(":")[2].strip() if self.remark and self.remark.startswith("file:") else None

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, match.start("language")) + 1, match["language"], match["code"], match["remark"])
        for match in _FENCE.finditer(text)
    ]


def chapter(title: str) -> list[Path]:
    """Return the pages of a chapter in the order of the site's navigation."""
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    entries = next(part[title] for part in navigation if title in part)
    return [DOCS / page for entry in entries for page in entry.values()]


def pages() -> list[Path]:
    """Return every page of the documentation, and those beside it."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
