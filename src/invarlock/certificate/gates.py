"""Every gate, in one table, and the verdict that follows from them.

A gate passes only on a measured, finite value within its limit; comparisons are written so that NaN and None fail. What
was asked for and could not be evaluated makes the verdict INCONCLUSIVE, never PASS. No gates at all do not pass either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from invarlock.certificate.figures import Figures
from invarlock.certificate.schema import (
    ExpertsRecord,
    Gate,
    GateDecision,
    GuardSection,
    LooksRecord,
    Overhead,
    PeaksRecord,
    PluginGuardSection,
    Reason,
    Validation,
    Verdict,
)
from invarlock.evidence.plain import finite_or_none
from invarlock.evidence.rows import Rows
from invarlock.guards.boundary import BUILT_IN_GUARDS
from invarlock.guards.sketch import NO_CHANGE, Culprits
from invarlock.policy.limits import Limits
from invarlock.stats.paired import safe_exp

__all__ = [
    "GATES",
    "PLUGINS",
    "GateKind",
    "Measured",
    "Outcome",
    "all_gates",
    "base_name",
    "kind_of_text",
    "validation_of",
    "verdict_of",
]


@dataclass(frozen=True)
class Measured:
    """All that the gates look at. `rows` is None where nothing was evaluated."""

    limits: Limits
    intent: str
    figures: Figures
    rows: Rows | None
    guards: Mapping[str, GuardSection]
    plugin_guards: Mapping[str, PluginGuardSection]
    overhead: Overhead
    counts: Mapping[str, float | int]
    contracts: Mapping[str, Mapping[str, str]]
    culprits: Culprits | None  # which weights changed most
    same_weights: bool = False
    peaks: PeaksRecord | None = None
    types: tuple[str | None, str | None] = (None, None)  # that the two sides ship in
    planned: LooksRecord | None = None  # where less than the planned text may decide
    experts: ExpertsRecord | None = None
    fortunes: Mapping[str, float] = field(default_factory=dict)  # at a glance: what bets against a gate came to

    def named(self, reason: str) -> str:
        """Add the weights at fault to a behavioural failure."""
        found = self.culprits
        return f"{reason}; {found.text}" if found is not None and found.text != NO_CHANGE else reason

    @property
    def culprit(self) -> str | None:
        """The weight that stands out most."""
        return str(self.culprits.named[0]["name"]) if self.culprits is not None and self.culprits.named else None


class Outcome(NamedTuple):
    """What one gate found: `basis` says what is held against the limit."""

    measured: float | str | None
    limit: float | str | None
    basis: str
    decision: GateDecision
    reason: str


def _within(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and value <= limit


def _primary(m: Measured) -> Outcome:
    pm = m.figures.metric
    end = 1 if pm.direction == "lower" else 0
    reason = m.named(pm.reason) if pm.decision == "fail" else pm.reason
    measured = None if pm.decision == "not_evaluated" else pm.display_ci[end]
    return Outcome(measured, pm.limit, pm.gating_basis, pm.decision, reason)


def _sample(m: Measured) -> Outcome:
    floor, counts = m.limits.sample, m.counts
    short = [
        f"{counts[f'actual_{name}']} {name} windows, {needed} needed"
        for name, needed in (("preview", floor.preview), ("final", floor.final))
        if not counts[f"actual_{name}"] >= needed
    ]
    if not counts["tokens"] >= floor.min_tokens:
        short.append(f"{counts['tokens']} scored tokens, {floor.min_tokens} needed")
    decision: GateDecision = "pass" if not short else "warn" if floor.shortfall == "warn" else "inconclusive"
    reason = "; ".join(short) or "enough windows and tokens"
    return Outcome(float(counts["tokens"]), float(floor.min_tokens), "counts", decision, reason)


def _pairing(m: Measured) -> Outcome:
    match, overlap = m.counts["window_match_fraction"], m.counts["window_overlap_fraction"]
    good = match == 1.0 and overlap == 0.0
    reason = f"{match:.4f} of the windows are paired, {overlap:.4f} of preview and final overlap"
    return Outcome(match, 1.0, "window ids", "pass" if good else "fail", reason)


def _drift(m: Measured) -> Outcome | None:
    band, drift = m.limits.drift, m.figures.drift
    if drift is None:
        return None
    value = finite_or_none(safe_exp(drift.estimate))
    good = value is not None and band.min <= value <= band.max
    shown = "not finite" if value is None else f"{value:.4f}"
    reason = f"final/preview relative to the baseline's is {shown}, band {band.min}-{band.max}"
    return Outcome(value, band.max, "point estimate", "pass" if good else "fail", reason)


def _tail(m: Measured) -> Outcome | None:
    tail = m.figures.tail
    if tail is None:
        return None
    return Outcome(tail.value, m.limits.tail.quantile_max, "point estimate", tail.status, tail.reason)


_NEAR = 0.9  # of a limit: from here on an estimate whose interval reaches beyond the limit is too weak to pass


def _divergence(m: Measured, *, figure: str, interval: str, limit: str, unit: str) -> Outcome | None:
    if m.figures.tail is None:  # answers were scored, not next tokens
        return None
    policy, d = m.limits.divergence, m.figures.divergence
    most: float = getattr(policy, limit)
    softened = m.intent == "finetune"
    mode = "warn" if policy.mode == "fail" and softened else policy.mode
    if mode == "off":
        return Outcome(None, most, "point estimate", "off", "switched off by policy")
    if d is None or not d.reference_matches:
        why = "not measured" if d is None else "measured against another baseline than this one"
        absent: GateDecision = "not_evaluated" if mode == "fail" else "warn"
        return Outcome(None, most, "point estimate", absent, f"divergence was {why}")
    value, reach = getattr(d, figure), getattr(d, interval)[1]
    reason = f"{'not finite' if value is None else f'{value:.4g}'} {unit}, limit {most}"
    decision: GateDecision = "pass"
    if not _within(value, most):
        decision, reason = "fail", m.named(reason)
    elif value > _NEAR * most and not _within(reach, most):
        decision = "inconclusive"
        shown = "no finite value" if reach is None else f"{reach:.4g}"
        reason += f", within a tenth of it, and the interval reaches {shown}: measure more windows"
    if decision != "pass" and mode == "warn":
        decision = "warn"
    return Outcome(value, most, "point estimate", decision, reason + " (only warns under intent finetune)" * softened)


def _result(section: GuardSection | PluginGuardSection, basis: str) -> Outcome:
    verdict = "passed" if section.passed else "failed"
    decision: GateDecision = "fail" if not section.passed else "warn" if section.warnings else "pass"
    return Outcome(verdict, "passed", basis, decision if section.evaluated else "not_evaluated", section.message)


def _guard(m: Measured, *, name: str) -> Outcome | None:
    section = m.guards.get(name)
    if section is None:
        return None
    found = _result(section, "guard")
    if section.evaluated:
        return found
    # one that passes so has nothing to do in this architecture, such as variance
    return found._replace(measured=None, decision="off" if section.passed else found.decision)


def _overhead(m: Measured) -> Outcome:
    limits, overhead = m.limits.overhead, m.overhead
    if not overhead.evaluated:
        absent: GateDecision = "not_evaluated" if limits.required else "off"
        reason = overhead.skipped or "not measured in this profile"
        return Outcome(None, limits.max_ratio, "point estimate", absent, reason)
    good = _within(overhead.ratio, limits.max_ratio)
    reason = f"metric with guards over metric without, on {overhead.windows} windows"
    return Outcome(overhead.ratio, limits.max_ratio, "point estimate", "pass" if good else "fail", reason)


def _contracts(m: Measured) -> Outcome:
    old, new = m.contracts["baseline"], m.contracts["subject"]
    differing = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    reason = f"measured differently: {', '.join(differing)}" if differing else f"{len(old)} contracts agree"
    return Outcome(float(len(differing)), 0.0, "digests", "fail" if differing else "pass", reason)


@dataclass(frozen=True)
class GateKind:
    """One gate. `check` returns None where it does not apply.

    `at_end`: it does not take part in the decision of a look, since what it looks at grows with the text.
    `said`: the boolean of `validation` that tells its outcome. `symptom`: it looks at what a model does, so that the
    cause of a failure is the weights that changed. `unevaluated`: it is there for a subject that was refused, too.
    """

    name: str
    check: Callable[[Measured], Outcome | None]
    said: str | None = None
    symptom: bool = False
    unevaluated: bool = False
    at_end: bool = False


_KL = partial(_divergence, figure="kl_mean", interval="kl_ci", limit="kl_max", unit="nats per token")
_FLIPS = partial(_divergence, figure="flip_rate", interval="flip_ci", limit="flip_max", unit="flips")
_SAID = {"invariants": "invariants_pass", "spectral": "spectral_stable", "rmt": "rmt_stable"}
#: the guards that look at what a model does
_ACTIVATIONS = ("rmt", "variance")
PLUGINS = "plugin"
#: every gate, in the order in which readers meet them; PLUGINS stands for one gate for each plugin guard
GATES: tuple[GateKind, ...] = (
    GateKind("primary_metric", _primary, "primary_metric_acceptable", symptom=True, unevaluated=True),
    GateKind("sample_size", _sample),
    GateKind("pairing", _pairing),
    GateKind("preview_final_drift", _drift, "preview_final_drift_acceptable", symptom=True),
    GateKind("primary_metric_tail", _tail, "primary_metric_tail_acceptable", symptom=True),
    GateKind("divergence_kl", _KL, symptom=True),
    GateKind("token_flips", _FLIPS, symptom=True),
    *(
        GateKind(name, partial(_guard, name=name), _SAID.get(name), name in _ACTIVATIONS, unevaluated=True)
        for name in BUILT_IN_GUARDS
    ),
    GateKind(PLUGINS, lambda m: None, unevaluated=True),
    GateKind("guard_overhead", _overhead, "guard_overhead_acceptable"),
    GateKind("measurement_contracts", _contracts),
)


def all_gates(m: Measured, kinds: Sequence[GateKind] = GATES) -> list[Gate]:
    """Return every gate that applies; of a subject that was refused those alone that need no evaluation."""
    gates: list[Gate] = []
    for kind in kinds:
        if m.rows is None and not kind.unevaluated:
            continue
        found: Iterator[tuple[str, Outcome | None]] = iter([(kind.name, kind.check(m))])
        if kind.name == PLUGINS:
            found = (
                (f"{PLUGINS}:{name}", _result(section, "plugin guard")) for name, section in m.plugin_guards.items()
            )
        for name, outcome in found:
            if outcome is not None:
                value = outcome.measured
                shown = finite_or_none(value) if isinstance(value, float) else value
                gates.append(Gate(name=name, **{**outcome._asdict(), "measured": shown}))
    return gates


def validation_of(gates: Sequence[Gate], m: Measured, kinds: Sequence[GateKind] = GATES) -> Validation:
    """Return the booleans of SPEC §6. True only where the gate was evaluated and passed."""
    said = {kind.name: kind.said for kind in kinds if kind.said is not None}
    values: dict[str, bool] = {}
    for gate in gates:
        name = base_name(gate.name)
        if name in said and gate.decision != "off":
            tolerated = ("pass", "warn") if name in BUILT_IN_GUARDS else ("pass",)
            held = gate.decision in tolerated and gate.measured is not None
            values[said[name]] = held and values.get(said[name], True)
    values["hysteresis_applied"] = m.figures.metric.hysteresis_applied
    families = [row.get("family") for section in m.guards.values() for row in (section.facts or {}).get("modules", ())]
    if "router" in families:
        values["moe_observed"] = True
    return Validation(**values)


def verdict_of(gates: Sequence[Gate], m: Measured, kinds: Sequence[GateKind] = GATES) -> Verdict:
    """FAIL where a gate fails, else INCONCLUSIVE where one that was asked for is undecided, else PASS.

    An empty list of gates is INCONCLUSIVE. Reasons list what decided, guards' findings with their tensor; what the files
    themselves show (a changed configuration, a lost tensor) comes before what follows from it.
    """
    failed = sorted((g for g in gates if g.decision == "fail"), key=lambda gate: gate.name != "invariants")
    undecided = [g for g in gates if g.decision in ("inconclusive", "not_evaluated")]
    if not failed and not undecided and gates:
        return Verdict(status="PASS", reasons=[])
    symptoms = {kind.name for kind in kinds if kind.symptom}
    reasons = [reason for gate in failed or undecided for reason in _reasons(gate, m, base_name(gate.name) in symptoms)]
    return Verdict(status="FAIL" if failed else "INCONCLUSIVE", reasons=reasons)


def base_name(gate: str) -> str:
    """Return what a gate is called without the kind of text that it is on: `primary_metric[code]` is `primary_metric`."""
    return gate if gate.startswith(f"{PLUGINS}:") else gate.partition("[")[0]


def kind_of_text(gate: str) -> str:
    """Return the kind of text that a gate is on: `primary_metric[code]` is on `code`; "" where it is on all."""
    return gate.removeprefix(base_name(gate)).strip("[]")


_MOST_REASONS = 5


def _reasons(gate: Gate, m: Measured, symptom: bool) -> list[Reason]:
    section = m.guards.get(gate.name)
    blamed = symptom and gate.decision == "fail"
    code = base_name(gate.name).upper()
    if section is None or not section.errors:
        return [Reason(code=code, message=gate.reason, gate=gate.name, tensor=m.culprit if blamed else None)]
    reasons = []
    for finding in section.errors[:_MOST_REASONS]:
        message, place = str(finding.get("message", gate.reason)), finding.get("tensor") or finding.get("module")
        if blamed and m.named(message) != message:
            message, place = m.named(message), m.culprit
        reasons.append(Reason(code=str(finding.get("code", code)), message=message, gate=gate.name, tensor=place))
    return reasons
