"""How a certificate's values read: one form for every number, one title and one piece of advice for every gate.

Text in a certificate comes from elsewhere (names of models, messages of plugins), so `clean` makes it one visible line.
`templates/words.toml` holds the words; `fill` puts values into them.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from string import Formatter
from typing import Any, NamedTuple

from invarlock.certificate.gates import base_name, kind_of_text
from invarlock.certificate.schema import Gate, PrimaryMetric
from invarlock.guards.sketch import rough

__all__ = [
    "DECISIONS",
    "FORMS",
    "GATES",
    "MISSING",
    "WORDS",
    "Form",
    "GateWords",
    "Reading",
    "change",
    "clean",
    "count",
    "effect",
    "excess",
    "family_order",
    "fill",
    "find",
    "gate_words",
    "interval",
    "middle_cut",
    "nats",
    "number",
    "percent",
    "plain",
    "points",
    "ratio",
    "reading",
    "share",
    "two",
    "worse",
]

MISSING = "—"
_LONGEST = 600
Form = Callable[[object], str]

#: what each decision of a gate is called
DECISIONS: Mapping[str, str] = {
    "pass": "pass",
    "fail": "FAIL",
    "warn": "warning",
    "inconclusive": "undecided",
    "not_evaluated": "not evaluated",
    "off": "off",
}


def clean(value: object, longest: int = _LONGEST) -> str:
    """Return text on one line in which nothing is invisible: control and direction characters show as escapes."""
    text = str(value)
    shown = "".join(
        c if c.isprintable() else " " if c in "\n\r\t" else c.encode("unicode_escape").decode("ascii")
        for c in text[:longest]
    )
    return shown if len(text) <= longest else f"{shown} … ({len(text) - longest} more characters)"


def middle_cut(text: str, width: int) -> str:
    """Shorten text to `width` characters, keeping both ends: names of modules and models differ there."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[-(width - 1 - head) :]}"


def number(value: object) -> float | None:
    """Return a finite float, or None for whatever else stands there."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _form(pattern: Callable[[float], str]) -> Form:
    def shown(value: object) -> str:
        found = number(value)
        return MISSING if found is None else pattern(found)

    return shown


def _four(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"


def _small(value: float) -> str:
    if value == 0.0:
        return "0"
    return f"{value:.1e}" if abs(value) < 1e-3 else _four(value)


#: ratios to four digits, shares and changes in per cent, nats, percentage points, whole numbers; MISSING for none
ratio = _form(_four)
percent = _form(lambda value: f"{value:.2%}")
change = _form(lambda value: f"{value:+.2%}" if abs(value) < 1e3 else f"{value:+.3g}")
nats = _form(_small)
points = _form(lambda value: f"{value:+.2f} pp")
#: for sentences: two digits; a share in per cent; a ratio as what it means
two = _form(lambda value: _two(value))
share = _form(lambda value: _percent(value))
excess = _form(lambda value: _percent(value - 1))
worse = _form(lambda value: _worse(value - 1))
count = _form(lambda value: f"{value:,.0f}")


def _percent(value: float) -> str:
    """Return a share with as many digits as a reader takes in: 66%, 2.5%, 0.04%."""
    shown = abs(100 * value)
    if shown >= 10 or shown == 0:
        return f"{100 * value:.0f}%"
    return f"{100 * value:.2g}%" if shown >= 0.01 else "under 0.01%"


def _two(value: float) -> str:
    small = 0 < abs(value) < 1e-3
    return "under 0.001" if small else f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"


def _worse(value: float) -> str:
    if abs(value) < 5e-4:
        return "as well as the baseline"
    return f"{_percent(abs(value))} {'worse' if value > 0 else 'better'} than the baseline"


def plain(value: object) -> str:
    """Return whatever a plugin or setting holds in one line: numbers to six digits, lists and mappings flattened."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        found = number(value)
        return "not finite" if found is None else f"{found:.6g}" if isinstance(value, float) else str(value)
    if isinstance(value, Mapping):
        return clean(", ".join(f"{clean(key)}: {plain(item)}" for key, item in value.items()) or MISSING)
    if isinstance(value, list | tuple):
        return clean(", ".join(plain(item) for item in value) or MISSING)
    return clean(value)


def interval(pair: Iterable[object], form: Form) -> str:
    """Return `[lo, hi]`, or MISSING where a bound was not measured."""
    lo, hi = pair
    return MISSING if number(lo) is None or number(hi) is None else f"[{form(lo)}, {form(hi)}]"


#: what may stand after the colon of a field in a template; `[nats]` is an interval of `nats`, `<nats>` the
#: same in words
FORMS: Mapping[str, Form] = {
    "": plain,
    "name": lambda value: plain(value) if value is None else clean(value, 120),
    "some": lambda value: plain(value or "none"),
    "ratio": ratio,
    "percent": percent,
    "rough": _form(rough),
    "change": change,
    "nats": nats,
    "points": points,
    "count": count,
    "two": two,
    "share": share,
    "excess": excess,
    "worse": worse,
}


def find(value: object, path: str) -> object:
    """Return what stands at a dotted path of mappings and typed sections; None where a mapping lacks it, or where a value
    of another kind stands in a mapping's place, as in an altered certificate."""
    for part in path.split("."):
        if value is None or isinstance(value, bool | int | float | str | list):
            return None
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part)
    return value


class _Filler(Formatter):
    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[object, str]:
        return find(kwargs, field_name), field_name

    def format_field(self, value: object, format_spec: str) -> str:
        if format_spec.startswith(("[", "<")):
            pair = value if isinstance(value, list | tuple) and len(value) == 2 else (None, None)
            shown = interval(pair, FORMS[format_spec[1:-1]])
            return shown if format_spec.startswith("[") else shown.strip("[]").replace(", ", " and ")
        return FORMS[format_spec](value)


def fill(template: str, values: Mapping[str, object]) -> str:
    """Fill a template: `{pm.limit:ratio}` is the field `limit` of `pm` in the form `ratio`, MISSING where there is none."""
    return _Filler().vformat(template, (), values)


WORDS: Mapping[str, Any] = tomllib.loads(
    resources.files("invarlock.reporting").joinpath("templates/words.toml").read_text(encoding="utf-8")
)


class GateWords(NamedTuple):
    """What is known about a gate besides its outcome. `bound` stands before the limit; `undecided` also advises where
    the gate was not evaluated."""

    title: str
    meaning: str
    failed: str
    undecided: str
    form: str = ""
    bound: str = ""
    clause: str = ""
    doubt: str = ""
    passed: str = ""


#: by the gate's name, with the metric's unit behind it where that makes a difference
GATES: Mapping[str, GateWords] = {
    name: GateWords(
        **{
            k: text if k in ("clause", "doubt", "passed") else text.format(**WORDS["advice"])
            for k, text in words.items()
        }
    )
    for name, words in WORDS["gates"].items()
}


def gate_words(gate: Gate, metric: PrimaryMetric) -> GateWords:
    """Return what is known about a gate; plugin guards and unknown gates get a general answer."""
    plugin, name = gate.name.removeprefix("plugin:"), base_name(gate.name)
    title = f"Plugin guard {clean(plugin)}" if plugin != gate.name else clean(gate.name)
    known = GATES.get(f"{name}:{metric.unit}") or GATES.get(name)
    kind = kind_of_text(gate.name)
    if known and kind:
        return known._replace(title=f"{known.title} on {clean(kind)}")
    return known or GATES["other"]._replace(title=title)


class Reading(NamedTuple):
    """How a metric of one unit reads: the field that is judged and its form, the form of either side, what is no change."""

    label: str
    short: str
    value: str
    form: str
    side: str
    side_form: str
    bound: str
    neutral: float
    axis: str
    effect: str


def reading(metric: PrimaryMetric) -> Reading:
    """Return how this metric reads."""
    return Reading(**WORDS["readings"].get(metric.unit, WORDS["readings"]["perplexity"]))


def effect(metric: PrimaryMetric) -> str:
    """Return the minimum detectable effect in the metric's own unit, MISSING where there is none."""
    value = number(metric.minimum_detectable_effect)
    return MISSING if value is None else reading(metric).effect.format(abs(value))


def family_order(families: Iterable[str]) -> list[str]:
    """Return families, each once: the known ones first in their usual order, then the others by name."""
    usual = ("embed", "attn", "ffn", "router", "other")
    return sorted(set(families), key=lambda f: (usual.index(f) if f in usual else len(usual), f))
