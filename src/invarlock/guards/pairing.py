"""Which layer of a model that was pruned in depth (or in experts) is which of its baseline: by what they hold, not by number.

Dropping layer 1 of four renumbers the two after it. Compared by name, each would be held against another layer. Sketches
of equal shapes are comparable, so that a layer is found again under its old number where most of its matrices are.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from invarlock.stats.linalg import unpack

__all__ = ["renamed", "renumbered"]

_LAYER = re.compile(r"^(?P<stack>.*?\b(?:h|layers?|blocks?)\.)(?P<number>\d+)(?P<rest>\..*)?$")
_EXPERT = re.compile(r"^(?P<stack>.*\[)(?P<number>\d+)(?P<rest>\])$")
_MATRIX = 256  # numbers in the sketch of a matrix
_ALIKE = 0.9

_Sketch = NDArray[np.float64]


def renumbered(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str]:
    """Return the layers, and within them the experts, that stand under another number in `after`: {its name there: its
    name in the baseline}, such as {"model.layers.1.": "model.layers.2."}. Empty where none was renumbered.

    `before` and `after` are sketches by name. A layer is found where the median cosine of its matrices with those of one
    layer of the baseline is above 0.9; order is kept, so that nothing is renamed where layers were merely swapped.
    """
    layers = _matched(before, after, _LAYER)
    inside = {renamed(name, layers): sketch for name, sketch in after.items()}
    return {**layers, **_matched(before, inside, _EXPERT)}


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """Return JSON data with every renumbered layer or expert under its baseline's name, in keys and in texts."""
    if isinstance(value, str):
        for _ in range(2):  # the layer, then the expert within it
            whole = f"{value}."  # a layer's own path ends where its parts' have a dot
            moved = (there + whole[len(here) :] for here, there in names.items() if whole.startswith(here))
            new = next(moved, whole)[:-1]
            if new == value:
                break
            value, names = new, {here: there for here, there in names.items() if here.endswith("]")}
        return value
    if isinstance(value, dict):
        return {renamed(key, names): renamed(entry, names) for key, entry in value.items()}
    return [renamed(entry, names) for entry in value] if isinstance(value, list) else value


def _matched(before: Mapping[str, str], after: Mapping[str, str], pattern: re.Pattern[str]) -> dict[str, str]:
    old, new = _stacks(before, pattern), _stacks(after, pattern)
    found: dict[str, str] = {}
    for stack in old.keys() & new.keys():
        if len(old[stack]) <= len(new[stack]):
            continue
        places = [_best(parts, old[stack]) for _, parts in sorted(new[stack].items())]
        known = [place for place in places if place is not None]
        if len(known) < len(places) or known != sorted(set(known)):
            continue
        for number, place in zip(sorted(new[stack]), known, strict=True):
            if number != place:
                end = "]" if stack.endswith("[") else "."
                found[f"{stack}{number}{end}"] = f"{stack}{place}{end}"
    return found


def _stacks(sketches: Mapping[str, str], pattern: re.Pattern[str]) -> dict[str, dict[int, dict[str, _Sketch]]]:
    stacks: dict[str, dict[int, dict[str, _Sketch]]] = defaultdict(lambda: defaultdict(dict))
    for name, sketch in sketches.items():
        found = pattern.match(name)
        if found is not None:
            stacks[found["stack"]][int(found["number"])][found["rest"] or ""] = unpack(sketch)
    return stacks


def _best(parts: Mapping[str, _Sketch], layers: Mapping[int, Mapping[str, _Sketch]]) -> int | None:
    """Return the number of the layer that is most alike, None where none is."""
    scores = {number: float(np.median([*_cosines(parts, theirs)] or [-1.0])) for number, theirs in layers.items()}
    best = max(scores, key=lambda number: scores[number])
    return best if scores[best] > _ALIKE else None


def _cosines(ours: Mapping[str, _Sketch], theirs: Mapping[str, _Sketch]) -> Iterator[float]:
    for name in ours.keys() & theirs.keys():
        here, there = ours[name], theirs[name]
        size = float(np.linalg.norm(here) * np.linalg.norm(there)) if len(here) == len(there) == _MATRIX else 0.0
        if size > 0:
            yield float(here @ there) / size
