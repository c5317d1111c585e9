"""Re-check a certificate without models, text, network or environment.

Everything that follows from what was recorded is derived again, by the rules of the certificate's own derivation, and
compared value by value. Certificates of every earlier release hold; what may differ between releases and libraries
stands in two tables, PROSE and TOLERANCES.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple

from packaging.version import InvalidVersion, Version
from pydantic import ValidationError

from invarlock import __version__
from invarlock.certificate.derive import CURRENT, Rules, derive, rules_of
from invarlock.certificate.reports import evidence_of
from invarlock.certificate.schema import Certificate, Recorded
from invarlock.core.exceptions import CertificateError, InvarlockError
from invarlock.core.reading import check_size
from invarlock.evidence.histogram import histogram_problems
from invarlock.evidence.plain import canonical, is_canonical
from invarlock.evidence.rows import COLUMNS, row_problems
from invarlock.guards.boundary import BUILT_IN_GUARDS
from invarlock.policy.resolve import resolve_recorded

__all__ = [
    "PROSE",
    "SIGNATURE_ONLY",
    "STEPS",
    "TOLERANCES",
    "Step",
    "Tolerance",
    "Verification",
    "parse_certificate",
    "validate_certificate",
    "verify_certificate",
]

#: recorded facts that nothing else in a certificate determines; only a signature can bind them against a forger who
#: changes them together with everything that follows
SIGNATURE_ONLY = (
    "meta (names of models, tool, device, time) and the number of the derivation (verify says where it is an earlier one)",
    "the choice of tier, profile, overrides, intent and metric kind (the limits that follow from it are resolved again)",
    "tiers and a profile of one's own, where the certificate embeds them (verify says so)",
    "edit, auto, plugins, telemetry, system_overhead, baseline_ref, versions, environment and evidence digests",
    "per-window losses, token counts, correctness, KL sums and flips, as measured",
    "that the divergence was measured against this baseline (reference_matches)",
    "tables of tensors, configurations, spectra, activation statistics and sketches, as measured",
    "results of plugin guards, guard_overhead and noise_floor, as measured",
    "digests of the measurement contracts, where both sides agree",
    "window ids, documents, kinds of text, counts asked for and the provider digest (the text is not in the certificate)",
    "sentences in a certificate of another release (its numbers, names, decisions and codes are derived again)",
)

#: free text, place by place (* is any name or index): compared only where derivation and tool version are this
#: release's, since a later one may word it better
PROSE = (
    "gates.*.basis",
    "gates.*.reason",
    "verdict.reasons.*.message",
    "primary_metric.gating_basis",
    "primary_metric.reason",
    "primary_metric_tail.reason",
    "divergence.histogram_edges",
    "confidence.basis",
    "slices.*.primary_metric.gating_basis",
    "slices.*.primary_metric.reason",
    "slices.*.primary_metric_tail.reason",
    "slices.*.divergence.histogram_edges",
    "*.message",  # of the built-in guards
    "*.warnings.*.message",
    "*.errors.*.message",
    "rmt.metrics.families.*.expected",
    "variance.metrics.reason",
)


class Tolerance(NamedTuple):
    """How far two derivations of a figure may lie apart, and why."""

    place: str
    relative: float
    absolute: float
    why: str


_DEFAULT = 1e-9
_SCIPY = (
    "uses a quantile of scipy: Student's t at fractional degrees of freedom differs by 1.4e-9 between 1.11 and 1.17"
)
#: the figures that need more than the default (1e-9 relative, for the order of sums in numpy)
TOLERANCES = (
    *(
        Tolerance(place, 1e-6, 1e-7, _SCIPY)
        for place in (
            "primary_metric.ci.*",
            "primary_metric.display_ci.*",
            "primary_metric.minimum_detectable_effect",
            "gates.*.measured",  # the end of that interval
            "slices.*.primary_metric.ci.*",
            "slices.*.primary_metric.display_ci.*",
            "slices.*.primary_metric.minimum_detectable_effect",
            "slices.*.divergence.kl_ci.*",
            "slices.*.divergence.flip_ci.*",
            "divergence.kl_ci.*",
            "divergence.flip_ci.*",
            "variance.metrics.interval.*",
        )
    ),
    Tolerance("primary_metric.windows_needed", 1e-6, 0.0, f"whole number of windows; {_SCIPY}"),
)


@dataclass(frozen=True)
class Verification:
    """The outcome. `intact`: every step held. `passed`: intact, and the verdict is PASS. `mismatch`: the certificate itself
    holds, but the report or the weights given beside it are others than those it was made of. `notes`: what a reader
    should know beyond that, such as limits of one's own."""

    intact: bool
    verdict: str
    failed_step: str | None = None
    problems: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    not_checked: tuple[str, ...] = SIGNATURE_ONLY
    notes: list[str] = field(default_factory=list)
    mismatch: bool = False

    @property
    def passed(self) -> bool:
        return self.intact and self.verdict == "PASS"


def _later(version: object) -> bool:
    try:
        return Version(str(version)) > Version(__version__)
    except InvalidVersion:
        return False


def _known_part(certificate: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the certificate without the sections that only a later release knows, and their names."""
    if not isinstance(certificate, Mapping):
        raise CertificateError(f"a certificate is {type(certificate).__name__}; expected a JSON object")
    meta = certificate.get("meta")
    later = isinstance(meta, Mapping) and _later(meta.get("tool_version"))
    unknown = [key for key in certificate if later and key not in Certificate.model_fields]
    return {key: value for key, value in certificate.items() if key not in unknown}, unknown


_MOST_ERRORS = 1000


def parse_certificate(certificate: Mapping[str, Any]) -> Certificate:
    """Return the typed certificate, without sections of a later release. Raises CertificateError with the first place that
    does not follow the schema."""
    known = _known_part(certificate)[0]
    foreign = len(known.keys() - Certificate.model_fields.keys())
    if foreign > _MOST_ERRORS:  # a million of them take seconds to be found wrong one by one
        raise CertificateError(f"the certificate does not follow schema v1 in {foreign:,} places")
    try:
        return Certificate.model_validate(known)
    except ValidationError as error:
        if error.error_count() > _MOST_ERRORS:  # each of them would be spelled out
            raise CertificateError(
                f"the certificate does not follow schema v1 in {error.error_count():,} places"
            ) from None
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the top level"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise CertificateError(f"the certificate does not follow schema v1 at {where}: {first['msg']}{more}") from None


def validate_certificate(certificate: Mapping[str, Any]) -> None:
    """Check the schema. Returns None; raises CertificateError with the first place that does not follow it."""
    parse_certificate(certificate)


@dataclass(frozen=True)
class _Case:
    given: dict[str, Any]
    parsed: Certificate
    derived: dict[str, Any]
    rules: Rules
    tolerance: float
    baseline: Mapping[str, Any] | None
    weights: Mapping[str, str]

    @property
    def words_count(self) -> bool:
        """Whether this release made it, so that its sentences are those that it would write again."""
        return (self.parsed.derivation, self.parsed.meta.tool_version) == (CURRENT, __version__)

    def differences(self, given: object, derived: object, *path: str) -> Iterator[str]:
        """Yield `path: got, expected` for every value that differs."""
        if isinstance(given, Mapping) and isinstance(derived, Mapping):
            for key in sorted(given.keys() | derived.keys()):
                if key not in given or key not in derived:
                    yield f"{'.'.join((*path, key))} is {'missing' if key in derived else 'not part of it'}"
                else:
                    yield from self.differences(given[key], derived[key], *path, key)
        elif isinstance(given, list) and isinstance(derived, list):
            if len(given) != len(derived):
                yield f"{'.'.join(path)} has {len(given)} entries; the evidence gives {len(derived)}"
            for index, (left, right) in enumerate(zip(given, derived, strict=False)):
                yield from self.differences(left, right, *path, str(index))
        elif not self._agree(given, derived, path):
            yield f"{'.'.join(path)} is {given!r}; the evidence gives {derived!r}"

    def _agree(self, given: object, derived: object, path: Sequence[str]) -> bool:
        if type(given) in (int, float) and type(derived) in (int, float):
            return _close(given, derived, path, self.tolerance)  # type: ignore[arg-type]  # both are numbers
        if given == derived or not (isinstance(given, str) and isinstance(derived, str)):
            return type(given) is type(derived) and given == derived
        prose = any(_matches(place, path) for place in PROSE)
        return prose and (not self.words_count or _same_words(given, derived))


def _matches(place: str, path: Sequence[str]) -> bool:
    parts = place.split(".")
    return len(parts) == len(path) and all(part in ("*", key) for part, key in zip(parts, path, strict=True))


_NUMBER = re.compile(r"(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)")


def _same_words(given: str, derived: str) -> bool:
    """Say whether two sentences differ in nothing but the last digit of rounded fractions (see TOLERANCES)."""
    pieces = [_NUMBER.split(text) for text in (given, derived)]
    if len(pieces[0]) != len(pieces[1]):
        return False
    for left, right in zip(*pieces, strict=True):
        if left != right:
            if not (_NUMBER.fullmatch(left) and _NUMBER.fullmatch(right)):
                return False
            a, b = Decimal(left), Decimal(right)
            place = min(int(number.as_tuple().exponent) for number in (a, b))
            if place >= 0 or abs(a - b) > Decimal(1).scaleb(place):
                return False
    return True


def _close(given: float, derived: float, path: Sequence[str], tolerance: float) -> bool:
    """JSON has one kind of number, so 1 and 1.0 are the same; whole numbers must be equal where nothing else is said."""
    whole = type(given) is type(derived) is int
    if given == derived or (not whole and math.isclose(given, derived, rel_tol=tolerance, abs_tol=tolerance * 1e-3)):
        return True
    allowed = next((t for t in TOLERANCES if _matches(t.place, path)), None)
    return allowed is not None and math.isclose(given, derived, rel_tol=allowed.relative, abs_tol=allowed.absolute)


def _spelling(case: _Case) -> Iterator[str]:
    """Numbers have one spelling (RFC 8785), so that whoever hashes a certificate gets the same digest."""

    def walk(value: object, path: str) -> Iterator[str]:
        if isinstance(value, (Mapping, list)):
            for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
                yield from walk(item, f"{path}.{key}" if path else str(key))
        elif not is_canonical(value):
            yield f"{path} is spelled {value!r}; expected {canonical(value)!r}"

    if case.rules.one_spelling:
        yield from walk(case.given, "")


def _rows(case: _Case) -> Iterator[str]:
    for name, rows in case.parsed.evaluation_windows.items():
        yield from row_problems(f"evaluation_windows.{name}", rows)


def _baseline_given(case: _Case) -> Iterator[str]:
    if case.baseline is None:
        return
    evidence = evidence_of(case.baseline, "baseline")
    names = [(name, column.name) for column in COLUMNS for name, side in column.paired if side == "baseline"]
    for split, rows in case.parsed.evaluation_windows.items():
        own = getattr(evidence, split)
        own = own if case.parsed.looks is None else own.head(len(rows.window_ids))
        if rows.window_ids and any(getattr(rows, name) != getattr(own, source) for name, source in names):
            yield f"evaluation_windows.{split} differs from the baseline report that was given"
    pack = (case.baseline.get("meta") or {}).get("pack")
    if case.parsed.baseline_ref.pack != pack:
        yield f"baseline_ref.pack is {case.parsed.baseline_ref.pack}; the address of what was given is {pack}"
    recorded = case.parsed.baseline_ref.evidence_digest
    if recorded and recorded != evidence.digest():
        yield "baseline_ref.evidence_digest is not that of the baseline report that was given"


def _histogram(case: _Case) -> Iterator[str]:
    """The KL histogram must count the tokens of the rows, and its bins must hold their sums and maxima."""
    windows = case.parsed.evaluation_windows.values()
    if case.parsed.divergence is not None:
        sums, largest = ([x for rows in windows for x in getattr(rows, name) or ()] for name in ("kl_sum", "kl_max"))
        tokens = sum(sum(rows.tokens) for rows in windows)
        yield from histogram_problems(case.parsed.divergence.histogram, tokens, sums, largest)


def _policy(case: _Case) -> Iterator[str]:
    """Resolve the policy again from the recorded version, tier, profile and overrides."""
    where, meta = case.parsed.policy_provenance, case.parsed.meta
    try:
        again = resolve_recorded(where)
    except InvarlockError as error:
        yield f"policy_provenance does not resolve: {error}"
        return
    digest = case.rules.tiers_digest(again)
    if digest != where.get("tiers_digest"):
        tiers = f"{where.get('tiers_version')}/{where.get('tiers_digest')}"
        yield f"policy_provenance names tiers {tiers}; no release issued these"
    expected = canonical({**again.provenance(), "tiers_digest": digest})
    yield from case.differences(canonical(where), expected, "policy_provenance")
    for name, named in (("tier", meta.tier), ("profile", meta.profile)):
        if where[name] != named:
            yield f"meta.{name} is {named!r}; policy_provenance has {where[name]!r}"
    if canonical(case.given["resolved_policy"]) != canonical(again.values):
        yield from case.differences(case.given["resolved_policy"], again.values, "resolved_policy")
        yield "resolved_policy does not follow from tier, profile and overrides"


def _weights_given(case: _Case) -> Iterator[str]:
    for side, digest in case.weights.items():
        recorded = getattr(case.parsed.weights, f"{side}_digest")
        if recorded != digest:
            yield f"weights.{side}_digest is {recorded[:16]}…; the files given have {digest[:16]}…"


def _names(case: _Case) -> Iterator[str]:
    """Facts that stand in two places must agree."""
    c = case.parsed
    doubles: list[tuple[str, object, object]] = [
        ("baseline_ref.evidence_digest", c.baseline_ref.evidence_digest, c.provenance.evidence_digests.get("baseline")),
        ("data.digest", c.data.digest, c.provenance.provider_digest),
        ("meta.adapter", c.meta.adapter, c.meta.subject_model.adapter),
    ]
    for side, model in (("baseline", c.meta.baseline_model), ("subject", c.meta.subject_model)):
        facts = (model.tokenizer_digest, model.tokenizer_size)
        behaviour = getattr(c.structure, f"{side}_behaviour")
        doubles.append((f"meta.{side}_model.behaviour", model.behaviour, behaviour))
        doubles.append((f"meta.{side}_model.usage", model.usage, getattr(c.structure, f"{side}_usage")))
        doubles.append((f"structure.{side}_tokenizer", tuple(getattr(c.structure, f"{side}_tokenizer")), facts))
        runtime = c.provenance.runtime.get(side)
        if runtime is not None:
            here = c.meta.device if c.meta.device != "served" else runtime.device
            expected = here if runtime.engine is None else "served"
            doubles.append((f"provenance.runtime.{side}.device", runtime.device, expected))
    for path, left, right in doubles:
        if left != right:
            yield f"{path} disagrees with what stands elsewhere in the certificate"


def _nothing(case: _Case) -> Iterator[str]:
    yield from ()


class Step(NamedTuple):
    """One step of a verification: the sections that it compares, what else it looks at before, and what it holds the
    certificate against where the caller gave it."""

    name: str
    sections: tuple[str, ...] = ()
    check: Callable[[_Case], Iterator[str]] = _nothing
    given: Callable[[_Case], Iterator[str]] = _nothing


_STEPS = (
    Step("spelling of numbers", (), _spelling),  # 2
    Step("pairing and counts", ("dataset",), _rows, _baseline_given),  # 3
    Step("window rows and metrics", ("evaluation_windows", "data"), _histogram),  # 4
    Step("ratio, interval and decision", ("primary_metric", "confidence")),  # 5
    Step("tail, drift and divergence", ("primary_metric_tail", "divergence", "slices")),  # 6
    Step("guard verdicts", (*BUILT_IN_GUARDS, "plugin_guards", "guard_overhead")),  # 7
    Step("measurement contracts", ("provenance",)),  # 8
    Step("policy", ("policy_digest",), _policy),  # 9
    Step("weights", ("weights",), given=_weights_given),  # 10
    Step("gates and verdict", ("gates", "validation", "verdict")),  # 11
)
_COMPARED = {section for step in _STEPS for section in step.sections}
#: the steps of a verification after the schema, in order (SPEC §6); the last one compares every section that is left
STEPS = (
    *_STEPS,
    Step("names and run id", tuple(name for name in Certificate.model_fields if name not in _COMPARED), _names),  # 12
)
_MOST_PROBLEMS = 10


def verify_certificate(
    certificate: Mapping[str, Any],
    *,
    baseline: Mapping[str, Any] | None = None,
    weights: Mapping[str, str] | None = None,
    tolerance: float = _DEFAULT,
) -> Verification:
    """Re-derive the certificate.

    1. the schema; 2. numbers in their one spelling (from derivation 2 on); 3. pairing and counts (against `baseline`, a
    loaded report.json, where given); 4. window rows against metrics; 5. ratio, interval (same seed, same replicates) and
    decision; 6. tail, drift, divergence, kinds of text; 7. guard verdicts from their recorded statistics and policy;
    8. measurement contracts; 9. the policy and its digest; 10. the weights' digests (against `weights`,
    {baseline|subject: digest}, where given); 11. gates and verdict; 12. names and the run id.

    It stops at the first step that fails and names it; what was given beside the certificate and is not its own
    (`mismatch`) comes last, so that it is said of a certificate that holds.

    Not checked: `SIGNATURE_ONLY`. `tolerance` is relative, for floats
    that TOLERANCES does not name. Raises CertificateError where the certificate does not follow the schema, or is of a
    derivation that only a later release knows.
    """
    if not 0.0 <= tolerance < 1e-3:
        raise CertificateError(f"tolerance is {tolerance}; expected at least 0 and below 0.001 (relative)")
    parsed = parse_certificate(certificate)  # 1
    given, unknown = _known_part(certificate)
    _check_work(parsed)
    rules = rules_of(parsed.derivation)
    done, notes = ["schema"], list(_notes(parsed, unknown))
    try:
        derived = canonical(derive(Recorded.model_validate(given)).model_dump(mode="json"))
    except (InvarlockError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError) as error:
        message = f"the recorded evidence does not give a certificate ({type(error).__name__}: {error})"
        return Verification(False, parsed.verdict.status, "window rows and metrics", [message], done, notes=notes)
    case = _Case(given, parsed, derived, rules, tolerance, baseline, weights or {})
    other: tuple[str, list[str]] | None = None
    for step in STEPS:
        ours, theirs = ({name: side[name] for name in step.sections if name in side} for side in (given, derived))
        problems = [*step.check(case), *case.differences(ours, theirs)]
        if problems:
            found = problems[:_MOST_PROBLEMS]
            return Verification(False, parsed.verdict.status, step.name, found, done, notes=notes)
        done.append(step.name)
        if other is None and (problems := list(step.given(case))):
            other = step.name, problems[:_MOST_PROBLEMS]
    if other is not None:
        done.remove(other[0])
        return Verification(False, parsed.verdict.status, *other, done, notes=notes, mismatch=True)
    return Verification(True, parsed.verdict.status, steps=done, notes=notes)


def _check_work(c: Certificate) -> None:
    """Refuse what would take minutes to derive again: rows and replicates are numbers that anybody can write."""
    replicates = c.resolved_policy.get("bootstrap", {}).get("replicates", 0)
    rows = max((len(rows.window_ids) for rows in c.evaluation_windows.values()), default=0)
    work = 2 * rows * replicates if type(replicates) is int else 0
    check_size(
        "resamples",
        f"the certificate, of {2 * rows:,} windows with {replicates} replicates,",
        CertificateError,
        values=work,
    )


def _notes(c: Certificate, unknown: list[str]) -> Iterator[str]:
    """Say what a reader should know of an intact certificate."""
    for name in unknown:
        yield f"the section {name!r} is of a later release ({c.meta.tool_version}) and was not checked"
    if c.policy_provenance.get("custom"):
        yield "the limits are custom: not the packaged ones but those that the certificate embeds (policy_provenance.custom)"
    if (c.derivation, c.meta.tool_version) != (CURRENT, __version__):
        made = f"release {c.meta.tool_version}, derivation {c.derivation or 1}"
        yield f"made by {made}: numbers, names, decisions and codes were derived again; sentences were not compared"
