"""Several kinds of text in one certificate: the gates on text hold on all of it together and on each kind alone.

- PASS needs every kind to pass, each at the level of the whole: that the worst kind is beyond a limit and all pass has
  at most the error of one test (an intersection-union test; Berger, 1982), so that nothing is added for their number.
- FAIL needs one kind to fail. With k kinds there are k chances to fail for nothing, so that a kind fails by its interval
  at 1 - (1 - level) / k alone (Bonferroni); what fails at the level of the whole and not there is undecided.
- Guards on weights and activations do not depend on the kind of text; they are judged once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial

from invarlock.certificate.figures import Comparison, figures
from invarlock.certificate.gates import GateKind, Measured, Outcome
from invarlock.certificate.schema import DivergenceRecord, Gate, SliceSection
from invarlock.core.exceptions import CertificateError
from invarlock.evidence.model import DataFacts
from invarlock.evidence.plain import finite_or_none
from invarlock.policy.limits import Limits

__all__ = ["SLICED", "Slices", "at_level", "measured_slices", "slice_gates", "slice_sections"]

#: the gates that hold on each kind of text
SLICED = (
    "primary_metric",
    "sample_size",
    "preview_final_drift",
    "primary_metric_tail",
    "divergence_kl",
    "token_flips",
)
#: what a gate on one kind of text is called: `primary_metric[code]`
_NAME = "{gate}[{slice}]"

#: by name: judged at the level of the whole, and what judges at the one at which a kind of text may fail
Slices = Mapping[str, tuple[Measured, Callable[[], Measured]]]


def measured_slices(whole: Measured, c: Comparison, data: DataFacts, divergence: DivergenceRecord | None) -> Slices:
    """Compare the two sides on each kind of text. Raises CertificateError where rows and data name different ones."""
    named, known = set(c.rows.slices or ()), dict(data.slices or {})
    if named != set(known):
        got, expected = (", ".join(sorted(names)) or "none" for names in (named, known))
        raise CertificateError(f"the rows are of the slices {got}; the data have {expected}")
    record = None if divergence is None else divergence.model_copy(update={"histogram": []})  # that is of all text
    level = 1 - (1 - c.limits.ratio.ci_level) / max(len(known), 1)
    strict, found = at_level(c.limits, level), {}
    for name, facts in known.items():
        here = replace(c, rows=c.rows.of_slice(name))
        there = partial(_measured, whole, replace(here, limits=strict), facts, record)
        found[name] = _measured(whole, here, facts, record), cache(there)  # most pass, and need no second look
    return found


def at_level(limits: Limits, level: float) -> Limits:
    """Return the limits with another confidence level (two-sided)."""
    return limits.model_copy(update={"ratio": limits.ratio.model_copy(update={"ci_level": level})})


def _measured(whole: Measured, c: Comparison, facts: DataFacts, divergence: DivergenceRecord | None) -> Measured:
    preview, final = facts.requested
    floor = {"preview": preview, "final": final, "min_tokens": 0}
    limits = c.limits.model_copy(update={"sample": c.limits.sample.model_copy(update=floor)})
    is_final = int(c.rows.is_final.sum())
    counts = {
        "actual_preview": len(c.rows.tokens) - is_final,
        "actual_final": is_final,
        "tokens": int(c.rows.tokens.sum()),
        "documents": len(set(c.rows.documents)),
    }
    found = figures(c, divergence)
    return replace(whole, limits=limits, figures=found, rows=c.rows, counts=counts, fortunes={})  # bets are on all text


def slice_gates(slices: Slices, kinds: Sequence[GateKind]) -> Iterator[Gate]:
    """Yield the gates on each kind of text, slice by slice."""
    for name, (here, strict) in slices.items():
        for kind in (kind for kind in kinds if kind.name in SLICED):
            outcome = kind.check(here)
            if outcome is None:
                continue
            if outcome.decision == "fail":
                outcome = _still(outcome, kind.check(strict()), strict().limits.ratio.ci_level)
            value = finite_or_none(outcome.measured) if isinstance(outcome.measured, float) else outcome.measured
            found = outcome._replace(measured=value, reason=f"on {name}: {outcome.reason}")
            yield Gate(name=_NAME.format(gate=kind.name, slice=name), **found._asdict())


def _still(outcome: Outcome, strict: Outcome | None, level: float) -> Outcome:
    """Let a kind of text fail only where it also does at the level divided by the number of kinds."""
    if strict is None or strict.decision == "fail":
        return outcome
    reason = f"{outcome.reason}; at {level:.4g}, the level at which one of several kinds of text fails, it does not"
    return outcome._replace(decision="inconclusive", reason=reason)


def slice_sections(slices: Slices, data: DataFacts, gates: Sequence[Gate]) -> dict[str, SliceSection] | None:
    """Return the figures of each kind of text with what its gates decided; None where there is one kind alone."""
    sections = {}
    for name, (m, _) in slices.items():
        decisions = {gate.decision for gate in gates if gate.name.endswith(f"[{name}]")}
        undecided = decisions & {"inconclusive", "not_evaluated"}
        sections[name] = SliceSection(
            provider=(data.slices or {})[name].provider,
            windows=int(m.counts["actual_preview"] + m.counts["actual_final"]),
            documents=int(m.counts["documents"]),
            tokens=int(m.counts["tokens"]),
            decision="fail" if "fail" in decisions else "inconclusive" if undecided else "pass",
            primary_metric=m.figures.metric,
            primary_metric_tail=m.figures.tail,
            divergence=m.figures.divergence,
        )
    return sections or None
