"""A certificate as what its readers see: headline, figures, gates and sections. Every format shows these and no others.

All text in a view is clean (one visible line) and all numbers are formatted; what was not measured says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from invarlock.certificate.schema import (
    Certificate,
    Divergence,
    Gate,
    GateDecision,
    GuardSection,
    PluginGuardSection,
    Status,
)
from invarlock.certificate.verify import validate_certificate
from invarlock.reporting.wording import (
    DECISIONS,
    MISSING,
    change,
    clean,
    count,
    effect,
    gate_kind,
    interval,
    nats,
    number,
    percent,
    plain,
    points,
    ratio,
)

__all__ = ["Badge", "Column", "Fact", "Figure", "GateRow", "Section", "Table", "View", "growth_rows", "parse", "view"]

_TOP = 12  # rows of a table of modules
_FEW = 6
_FINDINGS = 20


class Badge(NamedTuple):
    """A cell that shows a decision as a mark and a word."""

    decision: GateDecision
    word: str


class Column(NamedTuple):
    label: str
    numeric: bool = False


class Fact(NamedTuple):
    label: str
    value: str


class Figure(NamedTuple):
    """A number of the headline with what it is held against."""

    label: str
    value: str
    note: str
    decision: GateDecision | None = None


@dataclass(frozen=True)
class Table:
    caption: str
    columns: tuple[Column, ...]
    rows: list[list[str | Badge]]


@dataclass(frozen=True)
class Section:
    """`plots` names figures of `plots.draw`; `wide` ones need the whole width, `folded` ones are
    details that a reader may open."""

    key: str
    title: str
    notes: list[str] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: tuple[str, ...] = ()
    commands: list[str] = field(default_factory=list)
    wide: bool = False
    folded: bool = False


@dataclass(frozen=True)
class GateRow:
    name: str
    title: str
    badge: Badge
    measured: str
    limit: str
    basis: str
    reason: str


@dataclass(frozen=True)
class View:
    status: Status
    headline: str
    subject: str
    baseline: str
    context: list[Fact]
    reasons: list[Fact]  # label: the code, value: the message
    warnings: list[Fact]
    figures: list[Figure]
    gates: list[GateRow]
    sections: list[Section]
    run_id: str
    created: str


def parse(certificate: Mapping[str, Any]) -> Certificate:
    """Return the typed certificate. Raises CertificateError where it does not follow the schema."""
    validate_certificate(certificate)
    return Certificate.model_validate(dict(certificate))


def view(c: Certificate) -> View:
    """Return what readers see of a certificate."""
    gates = [_gate_row(gate, c) for gate in c.gates]
    return View(
        status=c.verdict.status,
        headline=_headline(c),
        subject=clean(c.meta.subject_model.id),
        baseline=clean(c.meta.baseline_model.id),
        context=[
            Fact("Edit", clean(c.edit.get("label") or c.edit.get("name") or MISSING, 80)),
            Fact("Tier", clean(c.meta.tier)),
            Fact("Profile", clean(c.meta.profile)),
            Fact("Intent", clean(c.meta.intent)),
            Fact("Created", clean(c.meta.created)),
        ],
        reasons=_unique(Fact(clean(r.code, 60), _with_tensor(r.message, r.tensor)) for r in c.verdict.reasons),
        warnings=[Fact(row.title, row.reason) for row in gates if row.badge.decision == "warn"],
        figures=list(_figures(c)),
        gates=gates,
        sections=[section for build in _SECTIONS for section in build(c)],
        run_id=clean(c.run_id),
        created=clean(c.meta.created),
    )


def _unique(facts: Iterator[Fact]) -> list[Fact]:
    return list(dict.fromkeys(facts))


def _with_tensor(message: str, tensor: str | None) -> str:
    shown = clean(message)
    return shown if not tensor or clean(tensor) in shown else f"{shown} ({clean(tensor)})"


def _headline(c: Certificate) -> str:
    judged = [gate for gate in c.gates if gate.decision != "off"]
    failed = sum(gate.decision == "fail" for gate in judged)
    undecided = sum(gate.decision in ("inconclusive", "not_evaluated") for gate in judged)
    warned = sum(gate.decision == "warn" for gate in judged)
    if c.verdict.status == "PASS":
        extra = f", {warned} of them with a warning" if warned else ""
        return f"The subject may ship: all {len(judged)} gates passed{extra}."
    if c.verdict.status == "FAIL":
        refused = " It was refused before evaluation." if c.primary_metric.decision == "not_evaluated" else ""
        return f"The subject must not ship: {failed} of {len(judged)} gates failed.{refused}"
    return f"Not decided: {undecided} of {len(judged)} gates could not be settled, none failed."


def _gate_row(gate: Gate, c: Certificate) -> GateRow:
    kind = gate_kind(gate, c.primary_metric)

    def shown(value: float | str | None) -> str:
        return clean(value) if isinstance(value, str) else kind.form(value)

    limit = shown(gate.limit)
    return GateRow(
        name=clean(gate.name),
        title=kind.title,
        badge=Badge(gate.decision, DECISIONS[gate.decision]),
        measured=shown(gate.measured) if gate.measured is not None else "not measured",
        limit=f"{kind.bound} {limit}".strip() if limit != MISSING else MISSING,
        basis=clean(gate.basis),
        reason=clean(gate.reason),
    )


def _gate(c: Certificate, name: str) -> Gate | None:
    return next((gate for gate in c.gates if gate.name == name), None)


def _figures(c: Certificate) -> Iterator[Figure]:
    pm, d, level = c.primary_metric, c.divergence, f"{c.primary_metric.ci_level:.0%} interval"
    accuracy = pm.unit == "accuracy"
    label, value, form = (
        ("Accuracy, change", pm.delta_pp, points) if accuracy else ("Perplexity ratio", pm.ratio_vs_baseline, ratio)
    )
    bound = f"{'floor' if accuracy else 'limit'} {form(pm.limit)}"
    note = f"{level} {interval(pm.display_ci, form)}, {bound}" if value is not None else bound
    yield Figure(label, form(value) if value is not None else "not measured", note, pm.decision)
    for name, label, shown, pair in (
        ("divergence_kl", "Divergence (KL), nats a token", nats(d and d.kl_mean), interval(d.kl_ci, nats) if d else ""),
        ("token_flips", "Top-token flips", percent(d and d.flip_rate), interval(d.flip_ci, percent) if d else ""),
    ):
        gate = _gate(c, name)
        if gate is not None:
            limit = f"limit {gate_kind(gate, pm).form(gate.limit)}"
            note = f"{level} {pair}, {limit}" if d else limit
            yield Figure(label, shown if d else "not measured", note, gate.decision)
    drift = _gate(c, "preview_final_drift")
    if drift is not None:
        band = _at(c.resolved_policy, "metrics", "drift")
        yield Figure(
            "Drift, preview to final",
            ratio(drift.measured) if drift.measured is not None else "not measured",
            f"band {ratio(band.get('min'))} to {ratio(band.get('max'))}",
            drift.decision,
        )
    stats = c.dataset.windows.stats
    sample = _gate(c, "sample_size")
    windows = f"{count(c.dataset.windows.preview)} + {count(c.dataset.windows.final)}"
    note = f"{count(stats.get('tokens'))} scored tokens in {count(stats.get('documents'))} documents"
    yield Figure("Windows, preview + final", windows, note, sample.decision if sample else None)
    yield Figure("Confidence", c.confidence.label, clean(c.confidence.basis))


def _at(mapping: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """Return the mapping below these keys, or an empty one."""
    found: Any = mapping
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _records(value: object) -> list[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list | tuple) else []


def _metric(c: Certificate) -> Iterator[Section]:
    pm = c.primary_metric
    accuracy = pm.unit == "accuracy"
    form = percent if accuracy else ratio
    columns = (Column("Part of the text"), Column("Baseline", True), Column("Subject", True))
    table = Table(
        "Accuracy" if accuracy else "Perplexity",
        columns,
        [
            ["preview", form(pm.baseline_preview), form(pm.preview)],
            ["final", form(pm.baseline_final), form(pm.final)],
        ],
    )
    facts = [
        Fact("Metric", clean(pm.kind)),
        Fact("Interval", f"{pm.method}, {count(pm.replicates)} replicates, seed {pm.seed}, {pm.clusters} clusters"),
        Fact("Decided by", clean(pm.gating_basis)),
    ]
    if pm.minimum_detectable_effect is not None:
        facts.append(Fact("Detectable at 80 % power", f"{effect(pm)} from the limit"))
    if pm.windows_needed is not None:
        facts.append(Fact("Windows that would decide", count(pm.windows_needed)))
    if accuracy:
        facts.append(Fact("Right to wrong", count(pm.right_to_wrong)))
        facts.append(Fact("Wrong to right", count(pm.wrong_to_right)))
        facts.append(Fact("McNemar's exact test", f"p = {nats(pm.mcnemar_p)}"))
    measured = pm.decision != "not_evaluated"
    notes = [clean(pm.reason)] if measured else [f"Not measured: {clean(pm.reason)}."]
    tables = [table] if measured else []
    yield Section("metric", "Primary metric", notes, facts if measured else [], tables, ("interval",))


def _tail(c: Certificate) -> Iterator[Section]:
    if c.primary_metric.unit == "accuracy":
        return
    tail, title = c.primary_metric_tail, "Window by window"
    if tail is None:
        yield Section("windows", title, ["Not measured: no window was evaluated."])
        return
    facts = [
        *(Fact(name, nats(getattr(tail, name))) for name in ("q50", "q90", "q95", "q99", "max")),
        Fact(f"Windows above {nats(tail.epsilon)} nats", percent(tail.tail_mass)),
        Fact(f"Gated quantile q{100 * tail.quantile:g}, interval", interval(tail.ci, nats)),
    ]
    notes = [
        "Change of the mean log-loss in each window, in nats; above zero the subject is worse.",
        clean(tail.reason),
    ]
    yield Section("windows", title, notes, facts, plots=("windows",))


def _divergence(c: Certificate) -> Iterator[Section]:
    if c.primary_metric.unit == "accuracy":
        return
    d, title = c.divergence, "Divergence from the baseline"
    if d is None:
        yield Section("divergence", title, ["Not measured: there are no next-token distributions of both sides."])
        return
    notes = ["KL of the next-token distributions, baseline to subject, nats per token."]
    if d.lower_bound:
        notes.append("Distributions are coarsened to the baseline's most likely tokens, so these are lower bounds.")
    if not d.reference_matches:
        notes.append("The reference was another baseline's: these figures do not count.")
    facts = [
        Fact("Mean", f"{nats(d.kl_mean)} {interval(d.kl_ci, nats)}"),
        Fact("Median", nats(d.kl_q50)),
        Fact("q99", nats(d.kl_q99)),
        Fact("Largest", nats(d.kl_max)),
        Fact("Mean, exact", _exact(d)),
        Fact("Top-token flips", f"{percent(d.flip_rate)} {interval(d.flip_ci, percent)}"),
        Fact("Tokens", count(d.tokens)),
    ]
    yield Section("divergence", title, notes, facts, plots=("divergence",))


def _weights(c: Certificate) -> Iterator[Section]:
    title, w = "What changed in the weights", c.weights
    rows = sorted(_records(w.changes), key=lambda row: -_size(row))
    changed = [row for row in rows if _size(row) > 0]
    if w.identical:
        notes = ["The tensors of both sides are identical, digest for digest."]
    elif not rows:
        notes = ["Not measured: no weights were compared."]
    elif w.culprits:
        names = ", ".join(clean(name, 120) for name in w.culprits[:_TOP])
        notes = [f"{len(changed)} of {len(rows)} tensors changed. Standing out from their family: {names}."]
    else:
        spread = "; the change is uniform, none stands out" if w.uniform else ""
        notes = [f"{len(changed)} of {len(rows)} tensors changed{spread}."]
    tables = []
    if changed:
        labels = ("Tensor", "Family", "Relative change", "Cosine", "Norm ratio", "Remark")
        columns = tuple(Column(label, 2 <= i <= 4) for i, label in enumerate(labels))
        listed = [_change_row(row, set(w.culprits)) for row in changed[:_TOP]]
        tables = [Table(f"Most changed tensors ({len(listed)} of {len(changed)}), sketched", columns, listed)]
    yield Section("weights", title, notes, tables=tables, wide=bool(tables))


def _size(row: Mapping[str, Any]) -> float:
    value = number(row.get("rel_change"))
    return float("inf") if value is None else value


def _change_row(row: Mapping[str, Any], culprits: set[str]) -> list[str | Badge]:
    remarks = ["stands out"] if row.get("name") in culprits else []
    if row.get("matches"):
        remarks.append(f"holds what {clean(row['matches'], 120)} held")
    if row.get("transposed"):
        remarks.append("transposed")
    if number(row.get("rel_change")) is None:
        remarks.append("was zero" if row.get("was_zero") else "not finite or of another shape")
    name, family = clean(row.get("name"), 120), clean(row.get("family"), 40)
    figures = percent(row.get("rel_change")), ratio(row.get("cosine")), ratio(row.get("norm_ratio"))
    return [name, family, *figures, "; ".join(remarks)]


def growth_rows(section: GuardSection | None) -> list[tuple[str, str, float]]:
    """Return (module, family, relative growth of the largest singular value), in the model's order."""
    rows = []
    for module in _records((section.facts or {}).get("modules") if section else None):
        sigma = module.get("sigma")
        before, after = map(number, sigma) if isinstance(sigma, list | tuple) and len(sigma) == 2 else (None, None)
        if before and after is not None:
            rows.append((clean(module.get("name"), 120), clean(module.get("family"), 40), after / before - 1))
    return rows


def _growth_tables(section: GuardSection) -> list[Table]:
    grown = sorted((row for row in growth_rows(section) if row[2]), key=lambda row: -abs(row[2]))[:_FEW]
    columns = (Column("Matrix"), Column("Family"), Column("Growth", True))
    rows: list[list[str | Badge]] = [[name, family, change(growth)] for name, family, growth in grown]
    return [Table("Largest singular values: most changed", columns, rows)] if rows else []


def _edge_tables(section: GuardSection) -> list[Table]:
    families = [(name, row) for name, row in _at(section.metrics, "families").items() if isinstance(row, Mapping)]
    labels = ("Family", "Baseline", "Subject", "Change", "Allowed", "Accepted")
    columns = tuple(Column(label, 0 < i < 4) for i, label in enumerate(labels))
    rows: list[list[str | Badge]] = []
    for name, row in families:
        good = row.get("accepted") is True
        badge = Badge("pass" if good else "fail", "yes" if good else "no")
        figures = ratio(row.get("baseline")), ratio(row.get("subject")), change(row.get("change"))
        rows.append([clean(name, 40), *figures, clean(row.get("expected", MISSING), 60), badge])
    return [Table("Activation edge ratios by family", columns, rows)] if rows else []


_GUARDS: Mapping[str, tuple[str, Callable[[GuardSection], list[Table]], tuple[str, ...]]] = {
    "spectral": ("Spectral guard", _growth_tables, ("growth",)),
    "invariants": ("Invariants", lambda _: [], ()),
    "rmt": ("Activation guard (rmt)", _edge_tables, ()),
    "variance": ("Variance guard", lambda _: [], ()),
}


def _guard(c: Certificate, name: str) -> Iterator[Section]:
    section: GuardSection | None = getattr(c, name)
    title, tables, plots = _GUARDS[name]
    if section is None or _gate(c, name) is None:
        yield Section(name, title, ["Not measured: this guard did not run."])
    else:
        yield Section(name, title, _outcome(section), _scalars(section.metrics), tables(section), plots)


def _findings(c: Certificate) -> Iterator[Section]:
    """All that the built-in guards found, in one table."""
    found = [(name, section) for name in _GUARDS if (section := getattr(c, name)) is not None]
    rows = [[name, *row] for name, section in found for row in _finding_rows(section)]
    table = Table("Errors and warnings of the built-in guards", (Column("Guard"), *_FINDING), rows)
    notes = [] if rows else ["The built-in guards found nothing."]
    yield Section("findings", "Findings of the guards", notes, tables=[table] if rows else [], wide=bool(rows))


def _plugins(c: Certificate) -> Iterator[Section]:
    for index, (name, section) in enumerate(c.plugin_guards.items()):
        title = f"Plugin guard {clean(name, 80)}"
        facts = [Fact(clean(key, 80), plain(value)) for key, value in section.metrics.items()]
        rows = _finding_rows(section)
        tables = [Table("Errors and warnings", _FINDING, rows)] if rows else []
        yield Section(f"plugin-{index}", title, _outcome(section), facts, tables, wide=bool(rows))


def _outcome(section: GuardSection | PluginGuardSection) -> list[str]:
    word = "passed" if section.passed else "failed"
    return [f"{'Not evaluated' if not section.evaluated else word.capitalize()}: {clean(section.message)}"]


def _scalars(metrics: Mapping[str, Any]) -> list[Fact]:
    return [
        Fact(clean(key, 80).replace("_", " "), plain(value))
        for key, value in metrics.items()
        if not isinstance(value, Mapping | list)
    ]


_FINDING = (Column("Level"), Column("Code"), Column("Where"), Column("Finding"))


def _finding_rows(section: GuardSection | PluginGuardSection) -> list[list[str | Badge]]:
    """Return one row a finding, errors first; at most _FINDINGS and a row that counts the rest."""
    findings: list[tuple[Badge, Any]] = [(Badge("fail", "error"), item) for item in section.errors]
    findings += [(Badge("warn", "warning"), item) for item in section.warnings]
    rows = [_finding(*finding) for finding in findings[:_FINDINGS]]
    rest = len(findings) - len(rows)
    return [*rows, [MISSING, MISSING, MISSING, f"and {rest} more"]] if rest else rows


def _finding(badge: Badge, item: Any) -> list[str | Badge]:
    if not isinstance(item, Mapping):
        return [badge, MISSING, MISSING, plain(item)]
    where = item.get("module") or item.get("tensor") or MISSING
    message = item.get("message")
    return [badge, clean(item.get("code", MISSING), 60), clean(where, 120), plain(item if message is None else message)]


def _sample(c: Certificate) -> Iterator[Section]:
    stats, data = c.dataset.windows.stats, c.data
    facts = [
        Fact("Text", clean(c.dataset.provider) + (f" ({plain(c.dataset.options)})" if c.dataset.options else "")),
        Fact("Split", clean(c.dataset.split or MISSING)),
        Fact("Windows", f"{c.dataset.windows.preview} preview, {c.dataset.windows.final} final, seed {data.seed}"),
        Fact(
            "Requested", f"{plain(stats.get('requested_preview'))} preview, {plain(stats.get('requested_final'))} final"
        ),
        Fact("Tokens of a window, at most", f"{c.dataset.seq_len}, stride {plain(c.dataset.stride)}"),
        Fact("Scored tokens", count(stats.get("tokens"))),
        Fact("Documents", count(stats.get("documents"))),
        Fact("Paired windows", f"{count(stats.get('paired_windows'))} ({percent(stats.get('window_match_fraction'))})"),
        Fact("Preview and final overlap", percent(stats.get("window_overlap_fraction"))),
        Fact("Coverage of what was requested", percent(stats.get("coverage"))),
        Fact("Windows reused from the baseline's report", plain(data.reused)),
    ]
    yield Section("sample", "Sample and pairing", facts=facts)


def _policy(c: Certificate) -> Iterator[Section]:
    source = c.policy_provenance
    facts = [
        Fact("Tier and profile", f"{clean(c.meta.tier)}, {clean(c.meta.profile)}"),
        Fact("Intent", clean(c.meta.intent)),
        Fact("Overrides", plain(source.get("overrides") or "none")),
        Fact("Edit adjustments", plain(source.get("edit_adjustments") or "none")),
        Fact("Tiers", f"version {plain(source.get('tiers_version'))}, digest {plain(source.get('tiers_digest'))}"),
        Fact("Policy digest", clean(c.policy_digest)),
        Fact("Text digest", clean(c.provenance.provider_digest)),
        Fact("Baseline weights", clean(c.weights.baseline_digest)),
        Fact("Subject weights", clean(c.weights.subject_digest)),
        *(Fact(f"{clean(side)} evidence".capitalize(), clean(d)) for side, d in c.provenance.evidence_digests.items()),
    ]
    notes = []
    if source.get("tiny_relax"):
        notes.append("The sample floors were lowered (INVARLOCK_TINY_RELAX): this certificate is for development only.")
    if c.meta.intent == "finetune":
        notes.append("Intent finetune: the subject is meant to differ, so divergence only warns.")
    yield Section("policy", "Policy and digests", notes, facts)


def _recheck(c: Certificate) -> Iterator[Section]:
    notes = [
        "Every figure and decision on this page can be derived again from the rows in the certificate, offline and "
        "without the models. With the models at hand, their weights are checked against the digests too.",
    ]
    commands = [
        "invarlock verify evaluation.cert.json",
        "invarlock verify evaluation.cert.json --baseline-model DIR --subject-model DIR",
    ]
    yield Section("recheck", "Check it again", notes, commands=commands, wide=True)


_RUNTIME = ("Side", "Device", "Type", "Tokens a batch", "Threads")


def _provenance(c: Certificate) -> Iterator[Section]:
    meta, origin = c.meta, c.provenance
    models = [
        [
            side,
            clean(m.id),
            clean(m.model_class or MISSING),
            count(m.parameters),
            clean(m.dtype or MISSING),
            clean(m.adapter),
        ]
        for side, m in (("baseline", meta.baseline_model), ("subject", meta.subject_model))
    ]
    labels = ("Side", "Model", "Class", "Parameters", "Type", "Adapter")
    tables = [Table("Models", tuple(Column(label, label == "Parameters") for label in labels), _rows(models))]
    if origin.runtime:
        columns = tuple(Column(x, x in ("Tokens a batch", "Threads")) for x in _RUNTIME)
        runs = [
            [clean(side), clean(r.device), clean(r.dtype), count(r.batch_tokens), count(r.threads)]
            for side, r in origin.runtime.items()
        ]
        tables.append(Table("Measured on", columns, _rows(runs)))
    for caption, pairs in (("Versions", origin.versions), ("Environment variables", origin.env_flags)):
        if pairs:
            rows = _rows([[clean(key, 80), clean(value, 200)] for key, value in pairs.items()])
            tables.append(Table(caption, (Column("Name"), Column("Value")), rows))
    facts = [
        Fact("Tool", f"{clean(meta.tool)} {clean(meta.tool_version)}"),
        Fact("Run", clean(c.run_id)),
        Fact("Baseline run", clean(c.baseline_ref.run_id or MISSING)),
        Fact("Edit", plain(c.edit) if c.edit else MISSING),
        Fact("Guard overhead", ratio(c.guard_overhead.ratio) if c.guard_overhead.evaluated else "not measured"),
    ]
    yield Section("provenance", "Environment and provenance", facts=facts, tables=tables, folded=True)


def _rows(cells: Sequence[Sequence[str]]) -> list[list[str | Badge]]:
    return [list(row) for row in cells]


_SECTIONS: tuple[Callable[[Certificate], Iterator[Section]], ...] = (
    _metric,
    _tail,
    _divergence,
    partial(_guard, name="spectral"),
    _weights,
    _findings,
    partial(_guard, name="invariants"),
    partial(_guard, name="rmt"),
    partial(_guard, name="variance"),
    _plugins,
    _sample,
    _policy,
    _recheck,
    _provenance,
)


def _exact(d: Divergence) -> str:
    """Show the exact figure with the coarsened one on the same windows."""
    if d.kl_exact_mean is None:
        return "not measured"
    return f"{nats(d.kl_exact_mean)} on {d.kl_exact_windows} windows (coarsened there: {nats(d.kl_coarsened_there)})"
