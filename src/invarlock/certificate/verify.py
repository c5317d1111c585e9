"""Re-check a certificate without models, text or network.

Everything that follows from what was recorded is derived again by the code that made it, and compared value by value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import ValidationError

from invarlock.certificate.make import derive, recall
from invarlock.certificate.schema import Certificate, PairedRows
from invarlock.core.exceptions import CertificateError, InvarlockError
from invarlock.eval.divergence import HISTOGRAM_EDGES
from invarlock.policy.resolve import resolve_policy

__all__ = ["SIGNATURE_ONLY", "STEPS", "Verification", "validate_certificate", "verify_certificate"]

#: recorded facts that nothing else in a certificate determines; only a signature can bind them against a forger who
#: changes them together with everything that follows
SIGNATURE_ONLY = (
    "meta (names of models, tool, device, time)",
    "the choice of tier, profile, overrides, intent and metric kind (the limits that follow from it are resolved again)",
    "edit, auto, plugins, telemetry, system_overhead, baseline_ref, versions, environment and evidence digests",
    "per-window losses, token counts, correctness, KL sums and flips, as measured",
    "that the divergence was measured against this baseline (reference_matches)",
    "tables of tensors, configurations, spectra, activation statistics and sketches, as measured",
    "results of plugin guards and guard_overhead, as measured",
    "digests of the measurement contracts, where both sides agree",
    "window ids, documents, counts asked for and the provider digest (the text itself is not in the certificate)",
)
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Verification:
    """The outcome. `intact`: every step held. `passed`: intact, and the verdict is PASS."""

    intact: bool
    verdict: str
    failed_step: str | None = None
    problems: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    not_checked: tuple[str, ...] = SIGNATURE_ONLY

    @property
    def passed(self) -> bool:
        return self.intact and self.verdict == "PASS"


def _parse(certificate: Mapping[str, Any]) -> Certificate:
    if not isinstance(certificate, Mapping):
        raise CertificateError(f"a certificate is {type(certificate).__name__}; expected a JSON object")
    try:
        return Certificate.model_validate(dict(certificate))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the top level"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise CertificateError(f"the certificate does not follow schema v1 at {where}: {first['msg']}{more}") from None


def validate_certificate(certificate: Mapping[str, Any]) -> None:
    """Check the schema. Returns None; raises CertificateError with the first place that does not follow it."""
    _parse(certificate)


@dataclass(frozen=True)
class _Case:
    given: dict[str, Any]
    parsed: Certificate
    derived: dict[str, Any]
    tolerance: float
    baseline: Mapping[str, Any] | None
    weights: Mapping[str, str]


def _differences(given: Any, derived: Any, path: str, tolerance: float) -> Iterator[str]:
    """Yield `path: got, expected` for every value that differs beyond the tolerance (relative, for floats)."""
    if isinstance(given, Mapping) and isinstance(derived, Mapping):
        for key in sorted(given.keys() | derived.keys()):
            if key not in given or key not in derived:
                yield f"{path}.{key} is {'missing' if key in derived else 'not part of it'}"
            else:
                yield from _differences(given[key], derived[key], f"{path}.{key}", tolerance)
    elif isinstance(given, list) and isinstance(derived, list):
        if len(given) != len(derived):
            yield f"{path} has {len(given)} entries; the evidence gives {len(derived)}"
        for index, (left, right) in enumerate(zip(given, derived, strict=False)):
            yield from _differences(left, right, f"{path}[{index}]", tolerance)
    elif _are_numbers(given, derived):  # JSON has one kind of number: 1 and 1.0 are the same
        if not math.isclose(given, derived, rel_tol=tolerance, abs_tol=tolerance * 1e-3):
            yield f"{path} is {given!r}; the evidence gives {derived!r}"
    elif type(given) is not type(derived) or given != derived:
        yield f"{path} is {given!r}; the evidence gives {derived!r}"


def _are_numbers(given: Any, derived: Any) -> bool:
    """Say whether the two compare as floats: both numbers and not both whole, for whole ones must be equal."""
    kinds = {type(given), type(derived)}
    return kinds <= {int, float} and kinds != {int}


def _compared(*sections: str) -> Callable[[_Case], Iterator[str]]:
    def check(case: _Case) -> Iterator[str]:
        for section in sections:
            if (section in case.given) != (section in case.derived):
                yield f"{section} is {'missing' if section in case.derived else 'not part of it'}"
            yield from _differences(case.given.get(section), case.derived.get(section), section, case.tolerance)

    return check


def _pairing(case: _Case) -> Iterator[str]:
    c = case.parsed
    for name, rows in c.evaluation_windows.items():
        count = len(rows.window_ids)
        for column, values in rows:
            if values is not None and len(values) != count:
                yield f"evaluation_windows.{name}.{column} has {len(values)} rows; expected {count}"
        if len(set(rows.window_ids)) != count:
            yield f"evaluation_windows.{name}.window_ids repeat"
        if any(n < 1 for n in rows.tokens):
            yield f"evaluation_windows.{name}.tokens has a window without scored tokens"
        yield from _possible(name, rows)
    yield from _compared("dataset")(case)
    if case.baseline is not None:
        yield from _baseline_rows(case)


def _possible(name: str, rows: PairedRows) -> Iterator[str]:
    """No window's KL sum lies under its largest token's or above as many of them; scores are shares."""
    for total, top, tokens in zip(rows.kl_sum or (), rows.kl_max or (), rows.tokens, strict=False):
        if total is not None and top is not None and not 0.0 <= top <= total * (1 + 1e-9) <= tokens * top * (1 + 2e-9):
            yield f"evaluation_windows.{name}: {tokens} tokens of KL {top:.6g} at most cannot sum to {total:.6g}"
    for side, scores in (("baseline", rows.baseline_correct), ("subject", rows.subject_correct)):
        if any(not 0.0 <= score <= 1.0 for score in scores or ()):
            yield f"evaluation_windows.{name}.{side}_correct has a score outside [0, 1]"


def _baseline_rows(case: _Case) -> Iterator[str]:
    """Hold the recorded baseline rows against the baseline's own report."""
    from invarlock.certificate.reports import evidence_of

    evidence = evidence_of(case.baseline or {}, "baseline")
    for name, rows in case.parsed.evaluation_windows.items():
        own = getattr(evidence, name)
        if rows.window_ids and (rows.window_ids != own.window_ids or rows.baseline_loss != own.loss):
            yield f"evaluation_windows.{name} differs from the baseline report that was given"
    recorded = case.parsed.baseline_ref.evidence_digest
    if recorded and recorded != evidence.digest():
        yield "baseline_ref.evidence_digest is not that of the baseline report that was given"


def _rows_and_metrics(case: _Case) -> Iterator[str]:
    c = case.parsed
    if c.divergence is not None:
        yield from _histogram(c)
    yield from _compared("evaluation_windows", "data")(case)


def _histogram(c: Certificate) -> Iterator[str]:
    """The KL histogram must count the tokens of the rows, and its bins must hold their sums and maxima."""
    assert c.divergence is not None
    windows = c.evaluation_windows.values()
    sums = [value for rows in windows for value in rows.kl_sum or []]
    tokens = sum(sum(rows.tokens) for rows in windows)
    if any(value is None for value in sums):
        return  # not finite: the gate fails on that, and the histogram counts finite tokens only
    counts = np.array(c.divergence.histogram, dtype=float)
    if len(counts) != len(HISTOGRAM_EDGES) or counts.sum() != tokens or (counts < 0).any():
        yield f"divergence.histogram counts {counts.sum():.0f} tokens in {len(counts)} bins; the rows have {tokens}"
        return
    upper = np.array([*HISTOGRAM_EDGES[1:], math.inf])
    total = math.fsum(float(value or 0.0) for value in sums)
    least = float((counts * np.array(HISTOGRAM_EDGES)).sum())
    most = float((counts[counts > 0] * upper[counts > 0]).sum())
    if not least * (1 - 1e-9) <= total <= most * (1 + 1e-9) + 1e-12:
        yield f"divergence.histogram holds between {least:.6g} and {most:.6g} nats; the rows sum to {total:.6g}"
    top = max((value or 0.0) for rows in windows for value in rows.kl_max or [0.0])
    last = int(np.flatnonzero(counts)[-1]) if counts.any() else 0
    if not HISTOGRAM_EDGES[last] <= top * (1 + 1e-9) + 1e-12 or not top <= upper[last] * (1 + 1e-9):
        yield f"divergence.histogram ends at bin {last}; the rows' largest KL is {top:.6g}"


def _policy(case: _Case) -> Iterator[str]:
    """Resolve the policy again from tier, profile and overrides. Its digest is compared by the derived sections."""
    where = case.parsed.policy_provenance
    try:
        again = resolve_policy(
            where["tier"],
            where["profile"],
            overrides=where["overrides"],
            edit_adjustments=where["edit_adjustments"],
            relaxed=where["tiny_relax"],
        )
    except KeyError as error:
        yield f"policy_provenance lacks {error}"
        return
    except (InvarlockError, TypeError, AttributeError) as error:  # the last two: values of another type
        yield f"policy_provenance does not resolve: {error}"
        return
    if where.get("tiers_digest") != again.tiers_digest or where.get("tiers_version") != again.tiers_version:
        yield (
            f"policy_provenance names tiers {where.get('tiers_version')}/{where.get('tiers_digest')}; this release has "
            f"{again.tiers_version}/{again.tiers_digest}"
        )
    for field_name, named in (("tier", case.parsed.meta.tier), ("profile", case.parsed.meta.profile)):
        if where[field_name] != named:
            yield f"meta.{field_name} is {named!r}; policy_provenance has {where[field_name]!r}"
    yield from _differences(case.given["resolved_policy"], again.values, "resolved_policy", 0.0)
    yield from _compared("policy_digest")(case)


def _weights(case: _Case) -> Iterator[str]:
    yield from _compared("weights")(case)
    for side, digest in case.weights.items():
        recorded = getattr(case.parsed.weights, f"{side}_digest")
        if recorded != digest:
            yield f"weights.{side}_digest is {recorded[:16]}…; the files given have {digest[:16]}…"


def _names(case: _Case) -> Iterator[str]:
    """Facts that stand in two places must agree; the run id covers all that was recorded."""
    c = case.parsed
    models = {"baseline": c.meta.baseline_model, "subject": c.meta.subject_model}
    tokenizers = {"baseline": c.structure.baseline_tokenizer, "subject": c.structure.subject_tokenizer}
    doubles: list[tuple[str, Any, Any]] = [
        ("meta.baseline_model.behaviour", c.meta.baseline_model.behaviour, c.structure.baseline_behaviour),
        ("meta.subject_model.behaviour", c.meta.subject_model.behaviour, c.structure.subject_behaviour),
        ("baseline_ref.evidence_digest", c.baseline_ref.evidence_digest, c.provenance.evidence_digests.get("baseline")),
        ("data.digest", c.data.digest, c.provenance.provider_digest),
        ("meta.adapter", c.meta.adapter, c.meta.subject_model.adapter),
    ]
    for side, model in models.items():
        facts = (model.tokenizer_digest, model.tokenizer_size)
        doubles.append((f"structure.{side}_tokenizer", tuple(tokenizers[side]), facts))
        if side in c.provenance.runtime:
            doubles.append((f"provenance.runtime.{side}.device", c.provenance.runtime[side].device, c.meta.device))
    for path, left, right in doubles:
        if left != right:
            yield f"{path} disagrees with what stands elsewhere in the certificate"
    yield from _compared(*(key for key in case.derived if key not in _OTHERWISE))(case)


#: the steps of a verification, in order: a name and the check (SPEC §6)
STEPS: tuple[tuple[str, Callable[[_Case], Iterator[str]]], ...] = (
    ("pairing and counts", _pairing),  # 2
    ("window rows and metrics", _rows_and_metrics),  # 3
    ("ratio, interval and decision", _compared("primary_metric", "confidence")),  # 4
    ("tail, drift and divergence", _compared("primary_metric_tail", "divergence")),  # 5
    ("guard verdicts", _compared("invariants", "spectral", "rmt", "variance", "plugin_guards", "guard_overhead")),  # 6
    ("measurement contracts", _compared("provenance")),  # 7
    ("policy", _policy),  # 8
    ("weights", _weights),  # 9
    ("gates and verdict", _compared("gates", "validation", "verdict")),  # 10
    ("names and run id", _names),  # 11
)
_OTHERWISE = {"resolved_policy"}
_MOST_PROBLEMS = 10


def verify_certificate(
    certificate: Mapping[str, Any],
    *,
    baseline: Mapping[str, Any] | None = None,
    weights: Mapping[str, str] | None = None,
    tolerance: float = _TOLERANCE,
) -> Verification:
    """Re-derive the certificate.

    1. the schema; 2. pairing and counts (against `baseline`, a loaded report.json, where given); 3. window rows against
    metrics; 4. ratio, interval (same seed, same replicates) and decision; 5. tail, drift and divergence; 6. guard
    verdicts from their recorded statistics and policy; 7. measurement contracts; 8. the policy and its digest; 9. the
    weights' digests (against `weights`, {baseline|subject: digest}, where given); 10. gates and verdict; 11. names and
    the run id.

    It stops at the first step that fails and names it. Not checked: `SIGNATURE_ONLY`. `tolerance` is relative, for
    floats. Raises CertificateError where the certificate does not follow the schema.
    """
    if not 0.0 <= tolerance < 1e-3:
        raise CertificateError(f"tolerance is {tolerance}; expected at least 0 and below 0.001 (relative)")
    parsed = _parse(certificate)  # 1
    done = ["schema"]
    try:
        derived = derive(recall(parsed)).model_dump(mode="json")
    except (InvarlockError, ValueError, KeyError, TypeError, IndexError, ArithmeticError) as error:
        message = f"the recorded evidence does not give a certificate ({type(error).__name__}: {error})"
        return Verification(False, parsed.verdict.status, "window rows and metrics", [message], done)
    derived["validation"] = {key: value for key, value in derived["validation"].items() if value is not None}
    case = _Case(dict(certificate), parsed, derived, tolerance, baseline, weights or {})
    for name, check in STEPS:
        problems = list(check(case))
        if problems:
            return Verification(False, parsed.verdict.status, name, problems[:_MOST_PROBLEMS], done)
        done.append(name)
    return Verification(True, parsed.verdict.status, steps=done)
