"""What derivations 3 to 5 estimate, gate and judge otherwise than the second. The fourth words sentences otherwise; the
fifth, that of new certificates, may have a glance before its looks, and no other has one.

A rule changes here and nowhere else: an estimator in THIRD_ESTIMATORS, a gate in `_CHANGED` (one of the second's, by its
name) or `_ADDED`, the verdict of a guard in THIRD_JUDGES. What the first two derivations use stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from invarlock.certificate.gates import PLUGINS, GateKind, Measured, Outcome
from invarlock.certificate.guards import GUARDS
from invarlock.certificate.schema import Coverage, GateDecision
from invarlock.certificate.second import SECOND_ESTIMATORS, SECOND_GATES, UNITS, sample_outcome
from invarlock.guards.base import StatsGuard
from invarlock.guards.routing import expert_of, not_exercised
from invarlock.stats.betting import GLANCE_ERROR, won
from invarlock.stats.coverage import smallest_share

__all__ = ["GATE_NAMES", "THIRD_ESTIMATORS", "THIRD_GATES", "THIRD_JUDGES", "coverage_of"]

THIRD_ESTIMATORS = SECOND_ESTIMATORS


def _sample(m: Measured) -> Outcome:
    """Hold what was planned to the floors of windows and tokens, and what was used to that of documents.

    A glance, which can only fail, is held to no floor.
    """
    plan, counts, floor = m.planned, m.counts, m.limits.sample.min_tokens
    if plan is not None and plan.ended_at_glance:
        few = f"{counts['documents']} documents were enough to fail; the floors are those of a PASS"
        return Outcome(float(counts["tokens"]), float(floor), "counts", "off", few)
    if plan is None:
        return sample_outcome(m, (counts["actual_preview"], counts["actual_final"]), counts["tokens"])
    return sample_outcome(m, plan.planned_windows, plan.planned_tokens, "planned ")


def coverage_of(m: Measured) -> Coverage | None:
    """Return what the text would have met; None where nothing was evaluated."""
    if m.rows is None:
        return None
    tokens, documents = int(m.counts["tokens"]), int(m.counts["documents"])
    return Coverage(
        tokens=tokens,
        smallest_share=smallest_share(tokens),
        documents=documents,
        smallest_share_of_documents=smallest_share(documents),
    )


def _second(name: str, **changes: Any) -> GateKind:
    return replace(next(kind for kind in SECOND_GATES if kind.name == name), **changes)


def _experts(m: Measured) -> Outcome | None:
    """Let no change of an expert pass that the text did not reach, and say which those are."""
    if m.experts is None:
        return None
    idle = not_exercised(m.experts.baseline, m.experts.subject)
    total = sum(map(len, m.experts.baseline.values()))
    if not idle:
        return Outcome(0.0, 0.0, "tokens routed", "pass", f"each of {total} experts got tokens on a side")
    reason = f"experts not exercised: {len(idle)} of {total}, {_listed(idle)}"
    rows = m.culprits.named if m.culprits is not None else []
    struck = [row for row in rows if expert_of(str(row["name"])) in idle]
    decision: GateDecision = "pass" if m.same_weights else "warn"
    if struck:
        decision = "warn" if m.intent == "finetune" else "fail"
        reason += f"; their weights stand out: {struck[0]['name']} ({struck[0]['what']})"
        reason += f" and {len(struck) - 1} more" if len(struck) > 1 else ""
    return Outcome(float(len(idle)), 0.0, "tokens routed", decision, reason)


def _listed(experts: set[tuple[str, int]]) -> str:
    blocks: dict[str, list[int]] = {}
    for block, number in sorted(experts):
        blocks.setdefault(block, []).append(number)
    shown = [f"{block} {', '.join(map(str, numbers[:8]))}" for block, numbers in list(blocks.items())[:3]]
    return "; ".join(shown) + (" and more" if len(blocks) > 3 or any(len(n) > 8 for n in blocks.values()) else "")


def _or_at_a_glance(name: str) -> GateKind:
    """A gate on a figure of the divergence that also fails where bets against its limit, on a few documents, were won."""
    kind = _second(name)

    def check(m: Measured) -> Outcome | None:
        found, fortune = kind.check(m), m.fortunes.get(name, 0.0)
        if found is None or found.decision in ("fail", "warn", "off") or not won(fortune):
            return found
        reason = f"{found.measured:.4g} {UNITS[name]} in the first {m.counts['documents']} documents, limit {found.limit:g}: "
        reason += f"within the limit so much has a chance below 1 in {1.0 / GLANCE_ERROR:,.0f}"
        return found._replace(decision="fail", basis="bets on documents", reason=m.named(reason))

    return replace(kind, check=check)


_CHANGED: Mapping[str, GateKind] = {
    "sample_size": _second("sample_size", check=_sample),
    "divergence_kl": _or_at_a_glance("divergence_kl"),
    "token_flips": _or_at_a_glance("token_flips"),
    "activation_range": _second("activation_range", at_end=True),
}
_ADDED: tuple[GateKind, ...] = (GateKind("experts_exercised", _experts, at_end=True),)
THIRD_GATES: tuple[GateKind, ...] = (*(_CHANGED.get(kind.name, kind) for kind in SECOND_GATES), *_ADDED)
#: what a gate may be called; that of a plugin guard is `plugin:<its name>`
GATE_NAMES = tuple(kind.name for kind in THIRD_GATES if kind.name != PLUGINS)

#: guards whose verdict on recorded facts is another one than before, by name
_JUDGES: Mapping[str, StatsGuard] = {}
THIRD_JUDGES: Mapping[str, StatsGuard] = {**GUARDS, **_JUDGES}
