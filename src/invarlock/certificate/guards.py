"""Built-in guards in a certificate: the measurements of both sides paired, and judged from the certificate alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from invarlock import guards
from invarlock.certificate.schema import GuardRecord, GuardSection, Recorded
from invarlock.evidence.model import Evidence
from invarlock.guards.base import Facts, Policy, Result, StatsGuard, result
from invarlock.guards.boundary import BUILT_IN_GUARDS
from invarlock.guards.invariants import InvariantsGuard
from invarlock.guards.packing import inside

__all__ = ["GUARDS", "judge_guards", "not_measured", "pair_guards"]

#: name -> the guard as it pairs and judges
GUARDS: Mapping[str, StatsGuard] = {g.name: g for g in (getattr(guards, name)() for name in guards.__all__)}


def pair_guards(baseline: Evidence, subject: Evidence, order: Sequence[str]) -> dict[str, GuardRecord]:
    """Pair what each built-in guard in `order` measured on the two sides; no facts where a side has none.

    What `invariants` compares stands in the structures.
    """
    records = {}
    for name in BUILT_IN_GUARDS[1:]:
        if name in order:
            old, new = baseline.guards.get(name), subject.guards.get(name)
            facts = GUARDS[name].pair(old, new) if old is not None and new is not None else None
            if facts is not None and name == "spectral" and _packed(baseline, subject):
                shapes = {module["name"]: module["shape"] for module in old["modules"]} if old else {}
                alike = bool(subject.model.describe.get("rounded_alike"))
                facts["packed"] = inside(baseline.sketches, subject.sketches, shapes, alike)
            records[name] = GuardRecord(facts=facts)
    return records


def _packed(*sides: Evidence) -> bool:
    """Whether weights of either side were read out of a packing."""
    return any(side.model.describe.get("quant_method") for side in sides)


def judge_guards(r: Recorded, judges: Mapping[str, StatsGuard]) -> dict[str, GuardSection]:
    """Judge every guard that the policy asks for; a subject refused for its files is judged by its structure alone."""
    policies = r.resolved_policy["guards"]
    sections: dict[str, GuardSection] = {}
    for name in BUILT_IN_GUARDS:
        policy = dict(policies.get(name, {}))
        facts = r.guard_facts.get(name)
        if name == InvariantsGuard.name:
            if name in policies["order"] or r.refused is not None:
                policy["intent"] = r.meta.intent
                absent = _served(r) and not (r.structure.baseline.tensors and r.structure.subject.tensors)
                outcome = _not_given(name, r) if absent else judges[name].judge(_structures(r), policy)
                sections[name] = _section(outcome, None, policy)
        elif name in policies["order"] and r.refused is None:
            sections[name] = (
                _section(_not_given(name, r), None, policy)
                if facts is None
                else _section(judges[name].judge(facts, policy), facts, policy)
            )
    return sections


def not_measured(name: str, policy: Policy) -> GuardSection:
    """Return the section of a guard that a side has no measurements for."""
    outcome = result(False, f"{name} was not measured on both sides", action="none", evaluated=False)
    return _section(outcome, None, policy)


def _served(r: Recorded) -> list[str]:
    """Say which sides were scored by a served engine."""
    engines = {side: runtime.engine for side, runtime in r.provenance.runtime.items()}
    return [f"the {side} was served by {engine.kind}" for side, engine in engines.items() if engine is not None]


def _not_given(name: str, r: Recorded) -> Result:
    """Return the result of a guard that a side has no measurements for.

    An engine gives no activations: such a guard is left out, and so is every guard where behaviour alone is judged.
    Weights that were to be judged and are not at hand leave the verdict open.
    """
    served, needs = _served(r), GUARDS[name].needs
    if not served:
        return result(False, f"{name} was not measured on both sides", action="none", evaluated=False)
    message = f"{name} is not evaluated: {' and '.join(served)}, which gives no {needs}"
    if r.meta.intent == "engine" or needs == "activations":
        return result(True, message, action="none", evaluated=False)
    files = "; give the checkpoint's folder, or judge behaviour alone with --intent engine"
    return result(False, message + files, action="none", evaluated=False)


def _structures(r: Recorded) -> Facts:
    s, guard = r.structure, InvariantsGuard()
    old = guard.stats_from(s.baseline, s.baseline_behaviour, *s.baseline_tokenizer, s.baseline_usage)
    new = guard.stats_from(s.subject, s.subject_behaviour, *s.subject_tokenizer, s.subject_usage)
    return guard.pair(old, new)


def _section(outcome: Result, facts: Facts | None, policy: Policy) -> GuardSection:
    return GuardSection(facts=facts, policy=dict(policy), **outcome)
