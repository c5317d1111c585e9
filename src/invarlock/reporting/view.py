"""A certificate as what its readers see: headline, figures, gates and sections. Every format shows these and no others.

All text in a view is clean (one visible line) and all numbers are formatted; what was not measured says so. Words,
facts and columns stand in `templates/words.toml`; here is what has to be computed for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from invarlock.certificate.schema import (
    Certificate,
    Gate,
    GateDecision,
    GuardSection,
    Looks,
    PluginGuardSection,
    Status,
)
from invarlock.certificate.verify import parse_certificate
from invarlock.guards.boundary import BUILT_IN_GUARDS
from invarlock.reporting.story import next_steps, not_shown, points, reason_why, strength, told
from invarlock.reporting.wording import (
    DECISIONS,
    FORMS,
    GATES,
    MISSING,
    WORDS,
    clean,
    count,
    effect,
    fill,
    find,
    gate_words,
    number,
    plain,
    reading,
)

__all__ = [
    "Badge",
    "Column",
    "Fact",
    "Figure",
    "GateRow",
    "LayerRow",
    "Section",
    "Table",
    "View",
    "growth_rows",
    "layer_rows",
    "parse",
    "table",
    "values",
    "view",
]

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
    """A number of the headline with what it is held against; `short` labels it on a terminal."""

    label: str
    short: str
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
    notes: Sequence[str] = ()
    facts: Sequence[Fact] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[str] = ()
    commands: Sequence[str] = ()
    wide: bool = False
    folded: bool = False


@dataclass(frozen=True)
class GateRow:
    """One gate in words; `next_step` is empty where there is nothing to do."""

    gate: str
    title: str
    badge: Badge
    measured: str
    limit: str
    basis: str
    meaning: str
    why: str
    next_step: str

    @property
    def decision(self) -> GateDecision:
        return self.badge.decision


@dataclass(frozen=True)
class View:
    status: Status
    headline: str
    why: str
    subject: str
    baseline: str
    names: tuple[str, str]  # of subject and baseline, without the folders that they lie in
    context: Sequence[Fact]
    reasons: list[Fact]  # label: the code, value: the message
    points: list[Fact]  # the same for people. label: what the check is called, value: a sentence
    warnings: list[Fact]
    figures: list[Figure]
    gates: list[GateRow]
    sections: list[Section]
    next_steps: list[tuple[str, str]]
    run_id: str
    created: str

    @property
    def usual_bases(self) -> set[str]:
        """What so many gates are held by that saying it beside each tells nothing."""
        return {"guard", "plugin guard", "counts", "digests", "window ids", "point estimate", "not evaluated"}


def parse(certificate: Mapping[str, Any]) -> Certificate:
    """Return the typed certificate. Raises CertificateError where it does not follow the schema."""
    return parse_certificate(certificate)


def view(c: Certificate) -> View:
    """Return what readers see of a certificate."""
    gates = [_gate_row(gate, c) for gate in c.gates]
    reasons = [Fact(clean(r.code, 60), _with_tensor(r.message, r.tensor)) for r in c.verdict.reasons]
    return View(
        status=c.verdict.status,
        headline=_headline(c),
        why=reason_why(c),
        subject=clean(c.meta.subject_model.id),
        baseline=clean(c.meta.baseline_model.id),
        names=_names(c),
        context=[fact for section in _section(c, "context") for fact in section.facts],
        reasons=list(dict.fromkeys(reasons)),
        points=[Fact(*point) for point in points(c)],
        warnings=[Fact(row.title, row.why) for row in gates if row.decision == "warn"],
        figures=list(_figures(c)),
        gates=gates,
        sections=list(_sections(c)),
        next_steps=next_steps(c, Path("evaluation.cert.json")),
        run_id=clean(c.run_id),
        created=clean(c.meta.created),
    )


def _names(c: Certificate) -> tuple[str, str]:
    """Return what subject and baseline are called: the edit's label, or the last part of a path; longer where those agree."""
    subject, baseline = clean(c.meta.subject_model.id), clean(c.meta.baseline_model.id)
    for parts in (1, 2, 3):
        short = tuple("/".join(name.rstrip("/").split("/")[-parts:]) or name for name in (subject, baseline))
        if short[0] != short[1] or subject == baseline:
            break
    label = c.edit.get("label")
    same = subject == baseline and label
    return (f"{short[0]}, {clean(label, 80)}" if same else short[0]), short[1]


def _with_tensor(message: str, tensor: str | None) -> str:
    shown = clean(message)
    return shown if not tensor or clean(tensor) in shown else f"{shown} ({clean(tensor)})"


def _headline(c: Certificate) -> str:
    judged = [gate.decision for gate in c.gates if gate.decision != "off"]
    failed, warned = judged.count("fail"), judged.count("warn")
    rests = f", on {strength(c)}" if strength(c) else ""
    if c.verdict.status == "PASS":
        extra = f", {warned} of them with a warning" if warned else ""
        return f"The subject may ship: all {len(judged)} gates passed{extra}{rests}."
    if c.verdict.status == "FAIL":
        refused = " It was refused before evaluation." if c.primary_metric.decision == "not_evaluated" else ""
        return f"The subject must not ship: {failed} of {len(judged)} gates failed{rests}.{refused}"
    undecided = judged.count("inconclusive") + judged.count("not_evaluated")
    return f"Not decided: {undecided} of {len(judged)} gates could not be settled, none failed{rests}."


def _gate_row(gate: Gate, c: Certificate) -> GateRow:
    words = gate_words(gate, c.primary_metric)
    form = FORMS[words.form]
    measured, limit = (clean(x) if isinstance(x, str) else form(x) for x in (gate.measured, gate.limit))
    return GateRow(
        gate=clean(gate.name),
        title=words.title,
        badge=Badge(gate.decision, DECISIONS[gate.decision]),
        measured=measured if gate.measured is not None else "not measured",
        limit=f"{words.bound} {limit}".strip() if limit != MISSING else MISSING,
        basis=clean(gate.basis),
        meaning=words.meaning,
        why=told(gate, c),
        next_step=_next_step(gate, c),
    )


def _next_step(gate: Gate, c: Certificate) -> str:
    words, primary = gate_words(gate, c.primary_metric), gate.name == "primary_metric"
    if gate.decision == "fail" or (gate.decision == "warn" and gate.measured is not None):
        return words.failed
    if gate.decision == "not_evaluated" and primary and not c.data_rows():
        return "Repair the files first: what is wrong with them is named below. Then certify again."
    if gate.decision == "inconclusive" and primary:
        return _more_windows(c, words.undecided)
    return words.undecided if gate.decision in ("inconclusive", "not_evaluated", "warn") else ""


def _more_windows(c: Certificate, advice: str) -> str:
    """Say how small an effect this sample could see, and how many windows would decide."""
    pm, have = c.primary_metric, c.dataset.windows.preview + c.dataset.windows.final
    parts = []
    if pm.minimum_detectable_effect is not None:
        parts.append(f"These {count(have)} windows settle a value {effect(pm)} or more from the limit (80 % power).")
    needed, of = (
        (pm.documents_needed, "documents of this kind") if pm.documents_needed else (pm.windows_needed, "windows")
    )
    if needed is not None:
        parts.append(f"About {count(needed)} {of} would decide at the value seen.")
    elif pm.minimum_detectable_effect is not None:
        parts.append("The value seen is so close to the limit that no number of documents can be promised to decide.")
    return " ".join([*parts, f"{advice}."])


def values(c: Certificate) -> dict[str, object]:
    """Return what `words.toml` may name."""
    pm, tail, d = c.primary_metric, c.primary_metric_tail, c.divergence
    r, settled = reading(pm), c.verdict.status != "INCONCLUSIVE" or c.confidence.label != "High"
    sure = "nothing was measured" if pm.decision == "not_evaluated" else None if settled else "the verdict is open"
    return {
        "c": c,
        "confidence": c.confidence.label if sure is None else "none",
        "confidence_note": sure or c.confidence.basis,
        "meta": c.meta,
        "pm": pm,
        "answers": pm if _whole_answers(c) else None,
        "metric": WORDS["kinds"].get(pm.kind, pm.kind),
        "told": {gate.name: told(gate, c) for gate in c.gates},
        "tail_moved": any(g.name == "primary_metric_tail" and g.decision in ("warn", "fail") for g in c.gates),
        "measured": pm.decision != "not_evaluated",
        "primary": FORMS[r.form](getattr(pm, r.value)),
        "around": fill(f"{{pm.display_ci:[{r.form}]}}", {"pm": pm}),
        "effect": effect(pm),
        "level": f"{100 * pm.ci_level:.4g}%",
        "looks": c.looks,
        "coverage": c.coverage,
        "seen": c.data.vocabulary_seen,
        "look": c.looks.made[-1] if c.looks else None,
        "look_name": _look_name(c.looks) if c.looks else None,
        "noise": c.noise_distance,
        "d": d,
        "foreign": d is not None and not d.reference_matches,
        "tail": tail,
        "gated": f"q{100 * tail.quantile:g}" if tail else MISSING,
        "band": find(c.resolved_policy, "metrics.drift"),
        "windows": c.dataset.windows,
        "stats": c.dataset.windows.stats,
        "covered": _covered(c),
        "source": c.policy_provenance,
        "finetune": c.meta.intent == "finetune",
        "label": c.edit.get("label") or c.edit.get("name"),
        "open": ", ".join(gate.name for gate in c.gates if gate.decision not in ("pass", "warn", "off")),
    }


def _look_name(looks: Looks) -> str:
    """Return what the deciding look is called: a glance comes before the first."""
    return "a glance before the looks" if looks.ended_at_glance else f"look {len(looks.made)}"


def _whole_answers(c: Certificate) -> bool:
    """Say whether every example is right or wrong; shares of a window's tokens turn from one to the other at a half, which
    says nothing."""
    sides = (side for rows in c.evaluation_windows.values() for side in (rows.baseline_correct, rows.subject_correct))
    return all(score in (0.0, 1.0) for side in sides for score in side or ())


def _covered(c: Certificate) -> float | None:
    """Return which share of the windows that were asked for was measured."""
    stats, windows = c.dataset.windows.stats, c.dataset.windows
    asked = sum(number(stats.get(f"requested_{split}")) or 0 for split in ("preview", "final"))
    return (windows.preview + windows.final) / asked if asked else None


def _figures(c: Certificate) -> Iterator[Figure]:
    known, r, gates = values(c), reading(c.primary_metric), {gate.name: gate for gate in c.gates}
    note = f"{{level}} interval {{around}}, {r.bound} {{pm.limit:{r.form}}}"
    primary = {"gate": "primary_metric", "always": True, "label": r.label, "short": r.short, "value": "{primary}"}
    for words in ({**primary, "note": note}, *WORDS["figures"]):
        known["gate"] = gate = gates.get(words["gate"])
        if (gate is not None or words.get("always")) and find(known, words.get("needs", "pm")):
            value, beside = fill(words["value"], known), fill(words["note"], known)
            if value == MISSING:
                value, beside = "not measured", beside.rpartition(", ")[2]
            yield Figure(words["label"], words["short"], value, beside, gate.decision if gate else None)
        if words.get("always") and gate is not None and gate.name == "primary_metric":
            yield from _slice_figures(c)


def _slice_figures(c: Certificate) -> Iterator[Figure]:
    for name, part in (c.slices or {}).items():
        r = reading(part.primary_metric)
        note = fill(f"{{p.primary_metric.display_ci:[{r.form}]}}, {WORDS['slices']['note']}", {"p": part})
        value = FORMS[r.form](getattr(part.primary_metric, r.value))
        yield Figure(f"{r.label} on {clean(name)}", f"  on {clean(name, 9)}", value, note, part.decision)


def table(caption: str, columns: Mapping[str, str], records: Sequence[Mapping[str, object]]) -> list[Table]:
    """Return the table of some records, none where there are none."""
    heads = tuple(
        Column(label, ":" in template and not template.endswith(":name}")) for label, template in columns.items()
    )
    rows = [[_cell(template, record) for template in columns.values()] for record in records]
    return [Table(caption, heads, rows)] if rows else []


def _cell(template: str, record: Mapping[str, object]) -> str | Badge:
    badge = record.get(template)
    return badge if isinstance(badge, Badge) else fill(template, record)


def _section(
    c: Certificate, key: str, notes: Sequence[str] = (), tables: Iterable[Table] = (), *, wide: bool = False
) -> Iterator[Section]:
    """Fill the words of a section; `notes` follow those that stand there."""
    words, known = WORDS["sections"][key], values(c)
    if words.get("unit", c.primary_metric.unit) != c.primary_metric.unit:
        return
    if "needs" in words and not find(known, words["needs"]):
        yield Section(key, words["title"], [fill(words["missing"], known)], plots=words.get("plots", ()))
        return
    said = [fill(note, known) for note, when in words.get("notes", {}).items() if when == "always" or find(known, when)]
    filled = [(label, fill(template, known)) for label, template in words.get("facts", {}).items()]
    yield Section(
        key,
        words["title"],
        [*said, *notes],
        [
            Fact(fill(label.removeprefix("?"), known), value)
            for label, value in filled
            if not (label.startswith("?") and value.startswith(MISSING))
        ],
        list(tables),
        words.get("plots", ()),
        words.get("commands", ()),
        wide or words.get("wide", False),
        words.get("folded", False),
    )


def _sections(c: Certificate) -> Iterator[Section]:
    guards = {name: _guard(c, name) for name in BUILT_IN_GUARDS}
    yield from _section(c, "metric", tables=_sides(c))
    if c.slices:
        yield from _section(c, "slices", tables=_slices(c), wide=True)
    yield from _section(c, "windows")
    yield from _section(c, "divergence")
    yield from (section for section in guards.values() if section.plots)
    yield from _weights(c)
    yield from _findings(c)
    yield from (section for section in guards.values() if not section.plots)
    yield from _plugins(c)
    yield from _section(c, "not_shown", not_shown(c), wide=True)
    for key in ("sample", "policy", "recheck"):
        yield from _section(c, key)
    yield from _section(c, "provenance", tables=_provenance(c))


def _sides(c: Certificate) -> list[Table]:
    pm, r = c.primary_metric, reading(c.primary_metric)
    columns = {"Part of the text": "{part}", "Baseline": f"{{old:{r.side_form}}}", "Subject": f"{{new:{r.side_form}}}"}
    preview = {"part": "preview", "old": pm.baseline_preview, "new": pm.preview}
    return table(r.side, columns, [preview, {"part": "final", "old": pm.baseline_final, "new": pm.final}])


def _slices(c: Certificate) -> list[Table]:
    records = []
    for name, part in (c.slices or {}).items():
        pm, r = part.primary_metric, reading(part.primary_metric)
        shown = FORMS[r.form](getattr(pm, r.value)) + " " + fill(f"{{pm.display_ci:[{r.form}]}}", {"pm": pm})
        badge = Badge(part.decision, DECISIONS[part.decision])
        records.append({"name": name, "p": part, "primary": shown, "badge": badge})
    return table("Every gate on text holds on each of them", WORDS["tables"]["slices"], records)


def _records(value: object) -> list[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list | tuple) else []


def _weights(c: Certificate) -> Iterator[Section]:
    w = c.weights
    rows = sorted(_records(w.changes), key=lambda row: -_size(row))
    changed = [row for row in rows if _size(row) > 0]
    names = ", ".join(clean(name, 120) for name in w.culprits[:_TOP])
    if w.identical:
        note = "The tensors of both sides are identical, digest for digest."
    elif not rows:
        note = "Not measured: no weights were compared."
    else:
        uniform = "; the change is uniform, none stands out." if w.uniform else "."
        note = f"{len(changed)} of {len(rows)} tensors changed"
        note += f". Standing out from their family: {names}." if names else uniform
    listed = [{**row, "remark": _remark(row, w.culprits)} for row in changed[:_TOP]]
    tables = table(
        f"Most changed tensors ({len(listed)} of {len(changed)}), sketched", WORDS["tables"]["changes"], listed
    )
    yield from _section(c, "weights", [note], tables, wide=bool(tables) or bool(c.weights.changes))


def _size(row: Mapping[str, Any]) -> float:
    value = number(row.get("rel_change"))
    return float("inf") if value is None else value


def _remark(row: Mapping[str, Any], culprits: Sequence[str]) -> str:
    strange = "was zero" if row.get("was_zero") else "not finite or of another shape"
    remarks = {
        "stands out": row.get("name") in culprits,
        f"holds what {clean(row.get('matches'), 120)} held": row.get("matches"),
        "transposed": row.get("transposed"),
        strange: number(row.get("rel_change")) is None,
    }
    return "; ".join(remark for remark, holds in remarks.items() if holds)


def growth_rows(section: GuardSection | None) -> list[tuple[str, str, float]]:
    """Return (module, family, relative growth of the largest singular value), in the model's order."""
    rows = []
    for module in _records(find(section, "facts.modules")):
        sigma = module.get("sigma")
        before, after = map(number, sigma) if isinstance(sigma, list | tuple) and len(sigma) == 2 else (None, None)
        if before and after is not None:
            rows.append((clean(module.get("name"), 120), clean(module.get("family"), 40), after / before - 1))
    return rows


class LayerRow(NamedTuple):
    """A module, how deep it lies (-1: before the layers), and what changed in it, as shares of what was there."""

    name: str
    depth: int
    family: str
    change: float | None
    edge: float | None


def layer_rows(c: Certificate) -> list[LayerRow]:
    """Return every module whose weights or activations were compared, in the model's order."""
    edges = {}
    for module in _records(find(c.rmt, "facts.modules")):
        pair = module.get("ratio")
        before, after = map(number, pair) if isinstance(pair, list | tuple) and len(pair) == 2 else (None, None)
        edges[module.get("name")] = after / before - 1 if before and after is not None else None
    rows, deepest = [], -1
    for record in _records(c.weights.changes):
        name, family = clean(record.get("name"), 120).removesuffix(".weight"), clean(record.get("family"), 40)
        digits = [int(part) for part in name.split(".") if part.isdecimal() and len(part) < 6]
        depth = digits[0] if digits else -1 if deepest < 0 else deepest + 1
        deepest = max(deepest, digits[0]) if digits else deepest
        if family not in ("vector", "bias"):
            rows.append(LayerRow(name, depth, family, number(record.get("rel_change")), edges.get(name)))
    return rows


def _growth(section: GuardSection) -> list[Table]:
    grown = sorted((row for row in growth_rows(section) if row[2]), key=lambda row: -abs(row[2]))[:_FEW]
    records = [dict(zip(("name", "family", "growth"), row, strict=True)) for row in grown]
    return table("Largest singular values: most changed", WORDS["tables"]["growth"], records)


def _edges(section: GuardSection) -> list[Table]:
    families = section.metrics.get("families")
    records = [
        {**row, "family": name, "badge": Badge("pass", "yes") if row.get("accepted") is True else Badge("fail", "no")}
        for name, row in (families.items() if isinstance(families, Mapping) else ())
        if isinstance(row, Mapping)
    ]
    return table("Activation edge ratios by family", WORDS["tables"]["edges"], records)


#: the table and the figures that a guard has of its own
_EXTRAS: Mapping[str, tuple[Callable[[GuardSection], list[Table]], tuple[str, ...]]] = {
    "spectral": (_growth, ("growth",)),
    "rmt": (_edges, ()),
}


def _guard(c: Certificate, name: str) -> Section:
    title, section = GATES[name].title, c.guards.get(name)
    tables, plots = _EXTRAS.get(name, (lambda _: [], ()))
    if section is None or all(gate.name != name for gate in c.gates):
        return Section(name, title, ["Not measured: this guard did not run."], plots=plots)
    return Section(name, title, [_outcome(section, f"{name}: ")], _metrics(section), tables(section), plots)


def _findings(c: Certificate) -> Iterator[Section]:
    """All that the built-in guards found, in one table."""
    records = [{"guard": name, **record} for name, section in c.guards.items() for record in _found(section)]
    tables = table("Errors and warnings of the built-in guards", WORDS["tables"]["findings"], records)
    notes = [] if records else ["The built-in guards found nothing."]
    yield from _section(c, "findings", notes, tables, wide=bool(records))


def _plugins(c: Certificate) -> Iterator[Section]:
    columns = {label: template for label, template in WORDS["tables"]["findings"].items() if label != "Guard"}
    for index, (name, section) in enumerate(c.plugin_guards.items()):
        tables = table("Errors and warnings", columns, _found(section))
        title, facts = f"Plugin guard {clean(name, 80)}", _metrics(section)
        yield Section(f"plugin-{index}", title, [_outcome(section)], facts, tables, wide=bool(tables))


def _outcome(section: GuardSection | PluginGuardSection, lead: str = "") -> str:
    word = "Not evaluated" if not section.evaluated else "Passed" if section.passed else "Failed"
    return f"{word}: {clean(section.message).removeprefix(lead)}"


def _metrics(section: GuardSection | PluginGuardSection) -> list[Fact]:
    """What a guard counted, but for the nested figures of a built-in one, which has a table for them."""
    built_in = isinstance(section, GuardSection)
    words = WORDS["metrics"] if built_in else {}
    shown = {
        key: value
        for key, value in section.metrics.items()
        if not (built_in and (value is None or isinstance(value, Mapping | list)))
    }
    return [
        Fact(
            words.get(key) or clean(key, 80).replace("_", " "),
            FORMS["change"](value) if key == "max_growth" else plain(value),
        )
        for key, value in shown.items()
    ]


def _found(section: GuardSection | PluginGuardSection) -> list[dict[str, object]]:
    """Return one record a finding, errors first; at most _FINDINGS and one that counts the rest."""
    findings = [(Badge("fail", "error"), item) for item in section.errors]
    findings += [(Badge("warn", "warning"), item) for item in section.warnings]
    records = [_finding(*finding) for finding in findings[:_FINDINGS]]
    rest = len(findings) - len(records)
    return [*records, {"badge": Badge("off", "more"), "message": f"and {rest} more"}] if rest else records


def _finding(badge: Badge, item: object) -> dict[str, object]:
    found = item if isinstance(item, Mapping) else {}
    where, message = found.get("module") or found.get("tensor"), found.get("message")
    return {"badge": badge, "code": found.get("code"), "where": where, "message": item if message is None else message}


def _provenance(c: Certificate) -> Iterator[Table]:
    columns, origin = WORDS["tables"], c.provenance
    models = (("baseline", c.meta.baseline_model), ("subject", c.meta.subject_model))
    yield from table("Models", columns["models"], [{"side": side, "m": m} for side, m in models])
    yield from table("Measured on", columns["runtime"], [{"side": side, "r": r} for side, r in origin.runtime.items()])
    for caption, pairs in (("Versions", origin.versions), ("Environment variables", origin.env_flags)):
        yield from table(caption, columns["named"], [{"name": name, "value": value} for name, value in pairs.items()])
