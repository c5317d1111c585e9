"""How a certificate's values read: one form for every number, one title and one piece of advice for every gate.

Text in a certificate comes from elsewhere (names of models, messages of plugins), so `clean` makes it one visible line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from invarlock.certificate.schema import Gate, PrimaryMetric

__all__ = [
    "DECISIONS",
    "MISSING",
    "Form",
    "GateKind",
    "change",
    "clean",
    "count",
    "effect",
    "family_order",
    "gate_kind",
    "interval",
    "middle_cut",
    "nats",
    "number",
    "percent",
    "plain",
    "points",
    "ratio",
]

MISSING = "—"
_LONGEST = 600
Form = Callable[[Any], str]

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
    def shown(value: Any) -> str:
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
count = _form(lambda value: f"{value:,.0f}")


def plain(value: Any) -> str:
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


def interval(pair: Iterable[float | None], form: Form) -> str:
    """Return `[lo, hi]`, or MISSING where a bound was not measured."""
    lo, hi = pair
    return MISSING if number(lo) is None or number(hi) is None else f"[{form(lo)}, {form(hi)}]"


def effect(metric: PrimaryMetric) -> str:
    """Return the minimum detectable effect in the metric's own unit, MISSING where there is none."""
    value = number(metric.minimum_detectable_effect)
    if value is None:
        return MISSING
    return f"{abs(value):.2f} pp" if metric.unit == "accuracy" else f"a factor of {ratio(value)}"


def family_order(families: Iterable[str]) -> list[str]:
    """Return families, each once: the known ones first in their usual order, then the others by name."""
    usual = ("embed", "attn", "ffn", "router", "other")
    return sorted(set(families), key=lambda f: (usual.index(f) if f in usual else len(usual), f))


class GateKind(NamedTuple):
    """What is known about a gate besides its outcome. `bound` stands before the limit; `undecided` also advises where
    the gate was not evaluated."""

    title: str
    form: Form
    bound: str
    meaning: str
    failed: str
    undecided: str


_WEAKEN = (
    "Weaken the edit (more bits, smaller groups, less pruning) or leave out the modules that stand out, "
    "then certify again"
)
_MORE = "Measure more windows: --profile release (400 + 400), or larger dataset.preview_n and dataset.final_n"
_RATIO = GateKind(
    "Primary metric",
    ratio,
    "≤",
    "How much worse the subject predicts the text: its perplexity over the baseline's. The whole interval has to lie "
    "within the limit.",
    f"The loss is larger than noise explains. {_WEAKEN}.",
    _MORE,
)
_POINTS = _RATIO._replace(
    form=points,
    bound="≥",
    meaning="How much accuracy was lost on the same examples. The whole interval has to lie above the floor.",
)
_GATES: Mapping[str, GateKind] = {
    "sample_size": GateKind(
        "Sample size", count, "≥", "Whether there was enough text to judge by.",
        f"{_MORE}.", f"{_MORE}; if the text runs out, give a larger data set.",
    ),
    "pairing": GateKind(
        "Pairing", percent, "=", "Whether both sides were measured on the same windows, preview and final apart.",
        "Measure the subject on the baseline's windows: certify both in one command, or pass --baseline-report.",
        "Certify both sides again in one command.",
    ),
    "preview_final_drift": GateKind(
        "Drift, preview to final", ratio, "≤", "Whether the two halves of the text agree about the change.",
        f"The change depends on the text. Look at the windows that moved most, and {_MORE[0].lower()}{_MORE[1:]}.",
        f"{_MORE}.",
    ),
    "primary_metric_tail": GateKind(
        "Tail of the windows", nats, "≤", "Whether some windows got much worse while the average did not.",
        f"Read the worst windows: they show what the edit broke. {_WEAKEN}.", f"{_MORE}.",
    ),
    "divergence_kl": GateKind(
        "Divergence (KL)", nats, "≤", "How far the next-token distributions moved, which an average loss can hide.",
        f"The subject answers differently. {_WEAKEN}; if it is meant to differ, certify it with --intent finetune.",
        "Measure the baseline again so that its per-token reference is stored, and pass that run by --baseline-report.",
    ),
    "token_flips": GateKind(
        "Top-token flips", percent, "≤", "How often the most likely next token is another one.",
        f"The subject writes other text. {_WEAKEN}; if it is meant to differ, certify it with --intent finetune.",
        "Measure the baseline again so that its per-token reference is stored, and pass that run by --baseline-report.",
    ),
    "invariants": GateKind(
        "Invariants", plain, "", "Whether the files hold the same tensors, finite, tied and configured as before.",
        "The files are damaged or another model's. Export the subject again; the tensors at fault are named.",
        "Give checkpoints as safetensors files so that their tensors can be read.",
    ),
    "spectral": GateKind(
        "Spectral guard", plain, "", "Whether any weight matrix stretched, shrank or lost its rank.",
        "Redo the edit of the matrices named, or leave them out of it.",
        "Keep the weights readable (not packed) on both sides, so that their spectra can be measured.",
    ),
    "rmt": GateKind(
        "Activation guard (RMT)", plain, "", "Whether the activations keep the structure that they had.",
        "Look at the modules named: their inputs or weights changed what they pass on. Redo the edit of those layers.",
        "Activations are needed: certify both sides with evaluation windows.",
    ),
    "variance": GateKind(
        "Variance guard", plain, "", "Whether equalising output variances would help; off is a normal outcome.",
        "Read its findings; in `run` it can equalise the outputs of the modules named.",
        "Certify both sides with evaluation windows, so that it can compare their outputs.",
    ),
    "guard_overhead": GateKind(
        "Guard overhead", ratio, "≤", "Whether watching the model changed what was measured.",
        "A guard disturbs the model that it watches: leave plugin guards out one by one to find which.",
        "Use a profile that measures it (release).",
    ),
    "measurement_contracts": GateKind(
        "Measurement contracts", count, "≤", "Whether both sides were measured in the same way.",
        "Measure both sides again with one version of the software.",
        "Measure both sides again with one version of the software.",
    ),
}  # fmt: skip


def gate_kind(gate: Gate, metric: PrimaryMetric) -> GateKind:
    """Return what is known about a gate; plugin guards and unknown gates get a general answer."""
    if gate.name == "primary_metric":
        return _POINTS if metric.unit == "accuracy" else _RATIO
    if gate.name in _GATES:
        return _GATES[gate.name]
    name = gate.name.removeprefix("plugin:")
    title = f"Plugin guard {clean(name)}" if name != gate.name else clean(name)
    return GateKind(
        title,
        plain,
        "",
        "A check that was added to the built-in ones.",
        "Read its findings and its own documentation.",
        "Read its message: it says why it could not be evaluated.",
    )
