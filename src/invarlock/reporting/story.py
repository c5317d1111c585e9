"""What a reader takes away first: how much the verdict rests on, why it is what it is, what comes next, what is not shown."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from invarlock.certificate.gates import base_name, kind_of_text
from invarlock.certificate.schema import Certificate, Gate
from invarlock.guards.boundary import BUILT_IN_GUARDS
from invarlock.reporting.wording import GATES, MISSING, WORDS, clean, count, fill, gate_words, number

__all__ = ["FOUND_BY_TENSOR", "points", "next_steps", "not_shown", "reason_why", "strength", "told", "warnings"]

_CLAUSES = 4
_JARGON = re.compile(r" \(z = [^)]*\)")  # for the file
#: gates whose reasons name a tensor each
FOUND_BY_TENSOR = {*BUILT_IN_GUARDS, "activation_range"}
_MEASURES = ("primary_metric", "divergence_kl", "token_flips")
_UNDECIDED = ("inconclusive", "not_evaluated")


def strength(c: Certificate) -> str:
    """Say on how much text the verdict rests; "" where none was measured."""
    stats = c.dataset.windows.stats
    if not stats.get("tokens"):
        return ""
    said = fill("{documents:count} documents ({tokens:count} tokens)", stats)
    return f"{said}. A look, not a release certificate" if c.meta.profile == "dev" else said


def reason_why(c: Certificate) -> str:
    """Return one sentence: what failed, what stayed open, or how close the subject is. Each clause stands there once."""
    status = c.verdict.status
    if status == "PASS":
        shown = [gate for gate in c.gates if gate.name in _MEASURES]
        clauses = [_clause(gate, c) for gate in shown]
    else:
        clauses = [_clause(gate, c) for gate in _deciding(c)]
        if status == "FAIL" and c.weights.culprits:
            named = ", ".join(clean(name, 120) for name in c.weights.culprits[:3])
            clauses.append(f"what changed most stands in {named}")
        elif status == "FAIL" and c.weights.uniform and c.weights.changes:
            clauses.append("the weights changed alike everywhere")
    clauses = list(dict.fromkeys(clauses))
    more = len(clauses) - _CLAUSES
    said = clauses[:_CLAUSES] + ([f"and {more} more"] if more > 0 else [])
    return _sentence("; ".join(said)) if said else ""


def told(gate: Gate, c: Certificate) -> str:
    """Return in a sentence what a gate found; its recorded reason where there are no words for that."""
    name, kind = base_name(gate.name), kind_of_text(gate.name)
    moved = gate.decision in ("fail", "warn", "inconclusive") and name in ("preview_final_drift", "primary_metric_tail")
    passed = gate.decision == "pass" and gate_words(gate, c.primary_metric).passed
    if (moved or passed or name in _MEASURES) and gate.measured is not None:
        what = _clause(gate, c).removeprefix(f"on {clean(kind)}, ")
        _, _, where = clean(gate.reason).partition("; ")  # the tensors that stand out, or that none does
        return _sentence(f"{what}; {where}" if gate.decision == "fail" and where else what)
    return clean(gate.reason.removeprefix(f"on {kind}: ").removeprefix(f"{name}: "))


def _deciding(c: Certificate) -> list[Gate]:
    """Return the gates that failed, or stayed open where none failed; none of a PASS."""
    asked = {"FAIL": ("fail",), "INCONCLUSIVE": _UNDECIDED}.get(c.verdict.status, ())
    return [gate for gate in _each_once(c) if gate.decision in asked]


def _each_once(c: Certificate) -> list[Gate]:
    """Return the gates without those on one kind of text that decided as the gate on all of it did."""
    whole = {gate.name: gate.decision for gate in c.gates}
    return [gate for gate in c.gates if gate.name == (base := base_name(gate.name)) or whole.get(base) != gate.decision]


def _sentence(text: str) -> str:
    """Begin with a capital, unless that is a name of a tensor, and end with a full stop."""
    first = text.partition(" ")[0]
    return f"{text[:1].upper() if first.isalpha() else text[:1]}{text[1:]}."


def _clause(gate: Gate, c: Certificate) -> str:
    words = gate_words(gate, c.primary_metric)
    template = {"inconclusive": words.doubt, "pass": words.passed or words.clause}.get(gate.decision, words.clause)
    kind = kind_of_text(gate.name)
    part = (c.slices or {}).get(kind)
    source = part if part is not None else c
    low, high = source.primary_metric.display_ci or (None, None)
    known = {
        "pm": source.primary_metric,
        "d": source.divergence,
        "tail": source.primary_metric_tail,
        "gate": gate,
        "low": low,
        "high": high,
    }
    told = gate.decision == "not_evaluated" or (gate.decision == "warn" and gate.name in BUILT_IN_GUARDS)
    text = fill(template, known) if template and not told else MISSING
    if MISSING in text:
        text = _told(gate, words.title, kind)
    return f"on {clean(kind)}, {text}" if kind else text


def points(c: Certificate) -> list[tuple[str, str]]:
    """Return why the verdict is not PASS, point by point: what the check is called, and a sentence."""
    told: list[tuple[str, str]] = []
    for gate in _deciding(c):
        title, name = gate_words(gate, c.primary_metric).title, base_name(gate.name)
        found = [_JARGON.sub("", clean(r.message)) for r in c.verdict.reasons if r.gate == gate.name]
        texts = found if name in FOUND_BY_TENSOR and found else [_sentence(_clause(gate, c))]
        told += [(title, text) for text in texts]
    return list(dict.fromkeys(told))


def warnings(c: Certificate) -> list[str]:
    """Return what is no failure but should be known, a sentence each."""
    told = (_clause(gate, c) for gate in _each_once(c) if gate.decision == "warn")
    return list(dict.fromkeys(map(_sentence, told)))


def _told(gate: Gate, title: str, kind: str) -> str:
    reason = clean(gate.reason, 200).removeprefix(f"on {kind}: ")
    plain = gate.name in ("primary_metric", *BUILT_IN_GUARDS)
    return reason if plain else f"{title.lower().removesuffix(f' on {kind}')}: {reason}"


def next_steps(c: Certificate, place: Path | None = None) -> list[tuple[str, str]]:
    """Return what to do next: a sentence and, where there is one, the command. `place` is the certificate's folder."""
    where = shlex.quote(str(place)) if place is not None else "CERTIFICATE"
    steps: list[tuple[str, str]] = []
    if c.verdict.status == "PASS":
        if c.meta.profile == "dev":
            steps.append(("For a certificate to rely on, measure more", "--profile ci, or --profile release"))
        steps.append(("Anyone can check it again, without the models", f"invarlock verify {where}"))
    elif c.verdict.status == "FAIL":
        steps.append(("See what each check measured, and what to do", f"invarlock report explain {where}"))
    else:
        steps += _more(c)
        steps.append(("See what stayed open, and why", f"invarlock report explain {where}"))
    return steps


def _more(c: Certificate) -> Iterator[tuple[str, str]]:
    stats, needed = c.dataset.windows.stats, c.primary_metric.documents_needed
    documents = int(number(stats.get("documents")) or 0)
    if needed and documents and needed > documents:
        windows = c.dataset.windows.preview + c.dataset.windows.final
        each = math.ceil(windows / documents * needed / 2)
        sentence = f"About {count(needed)} documents of this kind would decide ({count(documents)} were measured)"
        yield sentence, f"dataset.preview_n: {each} and dataset.final_n: {each} in a preset"
    elif c.meta.profile != "release":
        yield "Measure more text", "--profile release (400 + 400 windows)"


def not_shown(c: Certificate) -> list[str]:
    """Return what the certificate says nothing about, one sentence each."""
    words: Mapping[str, str] = WORDS["not_shown"]
    measured = c.primary_metric.decision != "not_evaluated"
    known = {"c": c, "kinds": ", ".join(c.slices) if c.slices else c.dataset.provider}
    told = [fill(words[key], known) for key in (("text", "length", "generation") if measured else ("refused",))]
    idle = [gate_words(gate, c.primary_metric).title for gate in c.gates if gate.decision in ("off", "not_evaluated")]
    ran = {base_name(gate.name) for gate in c.gates}
    idle += [GATES[name].title for name in BUILT_IN_GUARDS if name not in ran]
    if idle and measured:
        told.append(f"{words['gates']}: {', '.join(dict.fromkeys(idle))}.")
    return [*told, words["derived"], words["unsigned"]]
