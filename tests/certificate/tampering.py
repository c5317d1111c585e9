"""Every way to change one recorded value of a certificate."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

__all__ = ["alterations", "replaced"]

Path = tuple[str | int, ...]
_DROPPED = object()


def alterations(document: Any) -> Iterator[tuple[Path, str, Any]]:
    """Yield (path, what, altered document): one change of each value, taking turns among the possible ones, and every
    key dropped. Of a long list the last entry stands for all."""
    for turn, (path, value) in enumerate(_places(document, ())):
        others = list(_other_values(value))
        if others:
            what, new = others[turn % len(others)]
            yield path, what, replaced(document, path, new)
        if path and isinstance(path[-1], str) and not isinstance(value, int | float):
            yield path, "dropped", replaced(document, path, _DROPPED)


def replaced(document: Any, path: Path, value: Any) -> Any:
    """Return the document with `value` at `path`; everything else is shared with the original."""
    out = copy.copy(document)
    inner = out
    for key in path[:-1]:
        inner[key] = copy.copy(inner[key])
        inner = inner[key]
    if value is _DROPPED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return out


def _places(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    keys: Any = ()
    if isinstance(value, dict):
        keys = value
    elif isinstance(value, list):
        keys = range(len(value)) if len(value) <= 2 else (len(value) - 1,)
    for key in keys:
        yield (*path, key), value[key]
        yield from _places(value[key], (*path, key))


def _other_values(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, bool):
        yield "flipped", not value
    elif isinstance(value, int | float):
        yield "off by a thousandth", value * 1.001 if value else 1e-3
        yield "negated", -value if value else -1
        yield "nulled", None
    elif isinstance(value, str):
        yield "suffixed", value + "x"
    elif value is None:
        yield "made a number", 0.0
        yield "made a text", "x"
    elif isinstance(value, list):
        if value:
            yield "shortened", value[:-1]
            yield "repeated", [*value, value[-1]]
        if len(value) > 1 and value[0] != value[1]:
            yield "swapped", [value[1], value[0], *value[2:]]
    elif isinstance(value, dict):
        yield "extended", {**value, "unheard_of": 1}
