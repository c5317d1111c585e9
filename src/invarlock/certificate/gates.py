"""Every gate, in one table, and the verdict that follows from them.

A gate passes only on a measured, finite value within its limit; comparisons are written so that NaN and None fail. What
was asked for and could not be evaluated makes the verdict INCONCLUSIVE, never PASS. No gates at all do not pass either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from invarlock.certificate.schema import (
    Divergence,
    Gate,
    GateDecision,
    GuardSection,
    Overhead,
    PluginGuardSection,
    PrimaryMetric,
    Reason,
    Tail,
    Validation,
    Verdict,
)
from invarlock.evidence.model import finite_or_none
from invarlock.stats.intervals import Interval
from invarlock.stats.paired import is_accuracy, safe_exp

__all__ = ["Measured", "all_gates", "validation_of", "verdict_of"]


@dataclass(frozen=True)
class Measured:
    """All that the gates look at. `refused` names why nothing was evaluated, or is None."""

    policy: Mapping[str, Any]
    intent: str
    primary_metric: PrimaryMetric
    drift: Interval | None
    tail: Tail | None
    divergence: Divergence | None
    guards: Mapping[str, GuardSection]
    plugin_guards: Mapping[str, PluginGuardSection]
    overhead: Overhead
    window_stats: Mapping[str, Any]
    contracts: Mapping[str, Mapping[str, str]]
    refused: str | None
    culprits: str | None  # which weights changed most, in one line
    culprit: str | None = None  # the one that stands out most
    uniform: bool = False  # weights changed and none stands out


def _gate(name: str, measured: Any, limit: Any, basis: str, decision: GateDecision, reason: str) -> Gate:
    if isinstance(measured, float):
        measured = finite_or_none(measured)
    return Gate(name=name, measured=measured, limit=limit, basis=basis, decision=decision, reason=reason)


def _within(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and value <= limit


def _named(reason: str, m: Measured) -> str:
    """Add the weights at fault to a behavioural failure."""
    return f"{reason}; {m.culprits}" if m.culprits else reason


def _primary(m: Measured) -> Iterator[Gate]:
    pm = m.primary_metric
    accuracy = is_accuracy(pm.kind)
    measured = (pm.display_ci[0] if accuracy else pm.display_ci[1]) if pm.decision != "not_evaluated" else None
    reason = _named(pm.reason, m) if pm.decision == "fail" else pm.reason
    yield _gate("primary_metric", measured, pm.limit, pm.gating_basis, pm.decision, reason)


def _sample(m: Measured) -> Iterator[Gate]:
    floor, stats = m.policy["sample"], m.window_stats
    short = [
        f"{stats[f'actual_{name}']} {name} windows, {floor[name]} needed"
        for name in ("preview", "final")
        if not stats[f"actual_{name}"] >= floor[name]
    ]
    if not stats["tokens"] >= floor["min_tokens"]:
        short.append(f"{stats['tokens']} scored tokens, {floor['min_tokens']} needed")
    decision: GateDecision = "pass"
    if short:
        decision = "warn" if floor["shortfall"] == "warn" else "inconclusive"
    reason = "; ".join(short) or "enough windows and tokens"
    yield _gate("sample_size", float(stats["tokens"]), float(floor["min_tokens"]), "counts", decision, reason)


def _pairing(m: Measured) -> Iterator[Gate]:
    match, overlap = m.window_stats["window_match_fraction"], m.window_stats["window_overlap_fraction"]
    good = match == 1.0 and overlap == 0.0
    reason = f"{match:.4f} of the windows are paired, {overlap:.4f} of preview and final overlap"
    yield _gate("pairing", match, 1.0, "window ids", "pass" if good else "fail", reason)


def _drift(m: Measured) -> Iterator[Gate]:
    band = m.policy["metrics"]["drift"]
    if m.drift is None:
        return
    value = finite_or_none(safe_exp(m.drift.estimate))
    good = value is not None and band["min"] <= value <= band["max"]
    shown = "not finite" if value is None else f"{value:.4f}"
    reason = f"final/preview relative to the baseline's is {shown}, band {band['min']}-{band['max']}"
    yield _gate("preview_final_drift", value, band["max"], "point estimate", "pass" if good else "fail", reason)


def _tail(m: Measured) -> Iterator[Gate]:
    if m.tail is not None:
        limit = m.policy["metrics"]["pm_tail"]["quantile_max"]
        decision: Any = m.tail.status
        yield _gate("primary_metric_tail", m.tail.value, limit, "point estimate", decision, m.tail.reason)


_NEAR = 0.9  # of a limit: from here on an estimate whose interval reaches beyond the limit is too weak to pass


def _divergence(m: Measured) -> Iterator[Gate]:
    if is_accuracy(m.primary_metric.kind):  # answers are scored there, not next tokens
        return
    limits = m.policy["metrics"]["divergence"]
    mode = "warn" if limits["mode"] == "fail" and m.intent == "finetune" else limits["mode"]
    rows = (
        ("divergence_kl", "kl_mean", "kl_ci", "kl_max", "nats per token"),
        ("token_flips", "flip_rate", "flip_ci", "flip_max", "flips"),
    )
    for name, field, interval, limit_key, unit in rows:
        limit = limits[limit_key]
        if mode == "off":
            yield _gate(name, None, limit, "point estimate", "off", "switched off by policy")
            continue
        d = m.divergence
        if d is None or not d.reference_matches:
            why = "not measured" if d is None else "measured against another baseline than this one"
            absent: GateDecision = "not_evaluated" if mode == "fail" else "warn"
            yield _gate(name, None, limit, "point estimate", absent, f"divergence was {why}")
            continue
        value = getattr(d, field)
        shown = "not finite" if value is None else f"{value:.4g}"
        reason = f"{shown} {unit}, limit {limit}"
        decision: GateDecision = "pass"
        if not _within(value, limit):
            decision, reason = "fail", _named(reason, m)
        elif value > _NEAR * limit and not _within(getattr(d, interval)[1], limit):
            decision = "inconclusive"
            reason += (
                f", within a tenth of it, and the interval reaches {getattr(d, interval)[1]}: measure more windows"
            )
        if decision != "pass" and mode == "warn":
            decision = "warn"
        if m.intent == "finetune":
            reason += " (only warns under intent finetune)"
        yield _gate(name, value, limit, "point estimate", decision, reason)


def _guards(m: Measured) -> Iterator[Gate]:
    for name, section in m.guards.items():
        if not section.evaluated:  # one that passes so has nothing to do in this architecture, such as variance
            decision: GateDecision = "off" if section.passed else "not_evaluated"
        elif not section.passed:
            decision = "fail"
        else:
            decision = "warn" if section.warnings else "pass"
        verdict = "passed" if section.passed else "failed"
        yield _gate(name, verdict if section.evaluated else None, "passed", "guard", decision, section.message)


def _plugins(m: Measured) -> Iterator[Gate]:
    for name, section in m.plugin_guards.items():
        decision: GateDecision = "not_evaluated" if not section.evaluated else "pass" if section.passed else "fail"
        if decision == "pass" and section.warnings:
            decision = "warn"
        verdict = "passed" if section.passed else "failed"
        yield _gate(f"plugin:{name}", verdict, "passed", "plugin guard", decision, section.message)


def _overhead(m: Measured) -> Iterator[Gate]:
    limits, overhead = m.policy["metrics"]["guard_overhead"], m.overhead
    if not overhead.evaluated:
        decision: GateDecision = "not_evaluated" if limits["required"] else "off"
        reason = overhead.skipped or "not measured in this profile"
        yield _gate("guard_overhead", None, limits["max_ratio"], "point estimate", decision, reason)
        return
    good = _within(overhead.ratio, limits["max_ratio"])
    reason = f"metric with guards over metric without, on {overhead.windows} windows"
    yield _gate(
        "guard_overhead", overhead.ratio, limits["max_ratio"], "point estimate", "pass" if good else "fail", reason
    )


def _contracts(m: Measured) -> Iterator[Gate]:
    old, new = m.contracts["baseline"], m.contracts["subject"]
    differing = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    reason = f"measured differently: {', '.join(differing)}" if differing else f"{len(old)} contracts agree"
    decision: GateDecision = "fail" if differing else "pass"
    yield _gate("measurement_contracts", float(len(differing)), 0.0, "digests", decision, reason)


_BEHAVIOUR: tuple[Callable[[Measured], Iterator[Gate]], ...] = (
    _primary,
    _sample,
    _pairing,
    _drift,
    _tail,
    _divergence,
)
_ALWAYS: tuple[Callable[[Measured], Iterator[Gate]], ...] = (_guards, _plugins)
_EVALUATED: tuple[Callable[[Measured], Iterator[Gate]], ...] = (_overhead, _contracts)


def all_gates(m: Measured) -> list[Gate]:
    """Return every gate in the order in which readers meet them. A refused checkpoint has its guards' gates only."""
    if m.refused is not None:
        refused = _gate("primary_metric", None, m.primary_metric.limit, "not evaluated", "not_evaluated", m.refused)
        return [refused, *(gate for check in _ALWAYS for gate in check(m))]
    return [gate for check in (*_BEHAVIOUR, *_ALWAYS, *_EVALUATED) for gate in check(m)]


def validation_of(gates: Sequence[Gate], m: Measured) -> Validation:
    """Return the booleans of SPEC §6. True only where the gate was evaluated and passed."""
    names = {
        "primary_metric": "primary_metric_acceptable",
        "primary_metric_tail": "primary_metric_tail_acceptable",
        "preview_final_drift": "preview_final_drift_acceptable",
        "guard_overhead": "guard_overhead_acceptable",
        "invariants": "invariants_pass",
        "spectral": "spectral_stable",
        "rmt": "rmt_stable",
    }
    values: dict[str, bool] = {}
    for gate in gates:
        if gate.name in names and gate.decision != "off":
            tolerated = ("pass", "warn") if gate.basis == "guard" else ("pass",)
            values[names[gate.name]] = gate.decision in tolerated and gate.measured is not None
    values["hysteresis_applied"] = m.primary_metric.hysteresis_applied
    return Validation(**values)


def verdict_of(gates: Sequence[Gate], m: Measured) -> Verdict:
    """FAIL where a gate fails, else INCONCLUSIVE where one that was asked for is undecided, else PASS.

    An empty list of gates is INCONCLUSIVE. Reasons list what decided, guards' findings with their tensor; what the files
    themselves show (a changed configuration, a lost tensor) comes before what follows from it.
    """
    failed = sorted((g for g in gates if g.decision == "fail"), key=lambda gate: gate.name != "invariants")
    open_ones = [g for g in gates if g.decision in ("inconclusive", "not_evaluated")]
    if failed:
        return Verdict(status="FAIL", reasons=[reason for gate in failed for reason in _reasons(gate, m)])
    if open_ones or not gates:
        return Verdict(status="INCONCLUSIVE", reasons=[reason for gate in open_ones for reason in _reasons(gate, m)])
    return Verdict(status="PASS", reasons=[])


_MOST_REASONS = 5
#: gates on what a model does: a symptom, whose cause is the weights that changed
_SYMPTOMS = frozenset(
    ("primary_metric", "preview_final_drift", "primary_metric_tail", "divergence_kl", "token_flips", "rmt", "variance")
)


def _reasons(gate: Gate, m: Measured) -> list[Reason]:
    section = m.guards.get(gate.name)
    symptom = gate.name in _SYMPTOMS and gate.decision == "fail"
    if section is None or not section.errors:
        return [
            Reason(code=gate.name.upper(), message=gate.reason, gate=gate.name, tensor=m.culprit if symptom else None)
        ]
    reasons = []
    for finding in section.errors[:_MOST_REASONS]:
        message, place = str(finding.get("message", gate.reason)), finding.get("tensor") or finding.get("module")
        if symptom and (m.culprit or m.uniform):
            message, place = _named(message, m), m.culprit
        reasons.append(
            Reason(code=str(finding.get("code", gate.name.upper())), message=message, gate=gate.name, tensor=place)
        )
    return reasons
