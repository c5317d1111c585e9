"""From single runs to totals, and both as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from invarlock.core.device import library_versions

HELD_OUT = ("neox", "qwen")
KINDS = ("harmless", "structure", "degenerate", "unseen", "behaviour")
NEAR = 0.1  # of (limit - no effect): where INCONCLUSIVE is acceptable
GATES = (
    "primary_metric",
    "preview_final_drift",
    "divergence_kl",
    "token_flips",
    "invariants",
    "spectral",
    "rmt",
    "variance",
)

Row = dict[str, Any]


def outcome(row: Row) -> str:
    """Return `right`, `missed`, `false alarm`, `undecided` or `undecided near a limit`."""
    if row["verdict"] == "INCONCLUSIVE":
        near = row["oracle"] is not None and row["oracle"]["nearest"] <= NEAR
        return "undecided near a limit" if near else "undecided"
    if row["harmful"]:
        return "right" if row["verdict"] == "FAIL" else "missed"
    return "right" if row["verdict"] == "PASS" else "false alarm"


def with_one_text(row: Row) -> Row:
    """Return the row as if only the certificate on documentation had been made."""
    return {**row, "verdict": row["verdicts"].get("docs", row["verdict"])}


def totals(rows: Iterable[Row]) -> dict[str, Any]:
    rows = list(rows)
    harmless = [r for r in rows if r["kind"] == "harmless"]
    harmful = [r for r in rows if r["harmful"]]
    spared = [r for r in rows if r["kind"] != "harmless" and not r["harmful"]]
    caught = [r for r in harmful if r["verdict"] == "FAIL"]

    def count(group: list[Row], what: str) -> int:
        return sum(outcome(r) == what for r in group)

    return {
        "runs": len(rows),
        "harmless": {"runs": len(harmless), "false_alarms": count(harmless, "false alarm"),
                     "undecided": count(harmless, "undecided")},
        "harmful": {"runs": len(harmful), "detected": len(caught), "missed": count(harmful, "missed"),
                    "missed_with_docs_alone": count([with_one_text(r) for r in harmful], "missed"),
                    "undecided": count(harmful, "undecided"),
                    "undecided_near_a_limit": count(harmful, "undecided near a limit")},
        "damage_the_oracle_calls_harmless": {
            "runs": len(spared), "passed": sum(r["verdict"] == "PASS" for r in spared),
            "false_alarms": count(spared, "false alarm"), "undecided": count(spared, "undecided"),
            "undecided_near_a_limit": count(spared, "undecided near a limit")},
        "named": {"of": len(caught), "rightly": sum(bool(r["named_rightly"]) for r in caught)},
        "seconds": round(sum(r["seconds"] for r in rows), 1),
    }  # fmt: skip


def guards(rows: list[Row]) -> dict[str, dict[str, int]]:
    """Per gate: harmful runs that it caught, those of them that the primary metric let pass, those only it caught."""
    table = {}
    for gate in GATES:
        caught = [r for r in rows if r["harmful"] and gate in r["failed"]]
        table[gate] = {
            "caught": len(caught),
            "beyond_primary": sum("primary_metric" not in r["failed"] for r in caught),
            "only": sum(r["failed"] == [gate] for r in caught),
            "alarms_on_harmless": sum(not r["harmful"] and gate in r["failed"] for r in rows),
        }
    return table


def result(rows: list[Row], costs: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what faults.json holds."""
    wrong = [r for r in rows if outcome(r) not in ("right", "undecided near a limit")]
    misnamed = [r for r in rows if r["harmful"] and r["verdict"] == "FAIL" and not r["named_rightly"]]
    held = [r for r in rows if r["model"] in HELD_OUT]
    return {
        "settings": {"versions": library_versions(), "held_out": list(HELD_OUT), "near": NEAR},
        "totals": totals(rows),
        "held_out": totals(held),
        "models": {
            name: totals([r for r in rows if r["model"] == name]) for name in dict.fromkeys(r["model"] for r in rows)
        },
        "guards": guards(rows),
        "costs": costs or {},
        "wrong": wrong,
        "misnamed": misnamed,
        "runs": rows,
    }


def _lines(title: str, header: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [header, *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    shown = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return [title, *shown, ""]


def render(found: dict[str, Any]) -> str:
    """Print the edits, the totals, the gates and whatever went wrong."""
    lines = [*_edits(found["runs"]), *_totals(found), *_gates(found)]
    for title, key in (("Wrong", "wrong"), ("Misnamed", "misnamed")):
        lines.append(f"{title}: {len(found[key])}")
        lines += [_describe(row) for row in found[key]]
    return "\n".join(lines)


def _edits(rows: list[Row]) -> list[str]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: KINDS.index(row["kind"])):
        groups.setdefault((row["kind"], row["edit"]), []).append(row)
    body = []
    for (kind, edit), group in groups.items():
        total = totals(group)
        verdicts = [sum(r["verdict"] == v for r in group) for v in ("PASS", "FAIL", "INCONCLUSIVE")]
        wrong = sum(outcome(r) not in ("right", "undecided near a limit") for r in group)
        named = _share(total["named"], "rightly", "of") if total["named"]["of"] else "-"
        seconds = f"{sum(r['seconds'] for r in group) / len(group):.1f}"
        body.append([edit, kind, len(group), total["harmful"]["runs"], *verdicts, wrong, named, seconds])
    head = ["edit", "kind", "runs", "harmful", "PASS", "FAIL", "INCONCL", "wrong", "named", "s/run"]
    return _lines("Edits", head, body)


def _share(counts: dict[str, int], part: str, whole: str = "runs") -> str:
    return f"{counts[part]}/{counts[whole]}"


def _totals(found: dict[str, Any]) -> list[str]:
    body = []
    for name, total in {**found["models"], "held out": found["held_out"], "all": found["totals"]}.items():
        harmless, harmful = total["harmless"], total["harmful"]
        spared = total["damage_the_oracle_calls_harmless"]
        body.append(
            [
                name,
                total["runs"],
                _share(harmless, "false_alarms"),
                _share(harmful, "detected"),
                harmful["missed"],
                harmful["missed_with_docs_alone"],
                harmless["undecided"] + harmful["undecided"] + spared["undecided"],
                harmful["undecided_near_a_limit"] + spared["undecided_near_a_limit"],
                _share(spared, "false_alarms"),
                _share(total["named"], "rightly", "of"),
            ]
        )
    head = [
        "model",
        "runs",
        "false alarms",
        "detected",
        "missed",
        "(with docs alone)",
        "undecided",
        "(near a limit)",
    ]
    return _lines("Totals", [*head, "alarms on spared", "named"], body)


def _gates(found: dict[str, Any]) -> list[str]:
    head = ["gate", "caught", "beyond primary", "only it", "alarms on harmless", "cost"]
    costs = found["costs"].get("share", {})
    body = [
        [gate, *values.values(), f"{100 * costs[gate]:.1f} %" if gate in costs else "-"]
        for gate, values in found["guards"].items()
    ]
    return _lines("Gates (cost: CPU time added to a side's bare measurement)", head, body)


def _describe(row: Row) -> str:
    what = f"  {row['model']} {row['edit']} {row['severity']} @{row['place']:g}#{row['seed']}: {outcome(row)}"
    verdict = (
        f"{row['verdict']} by {'+'.join(row['failed']) or '-'}, named {row['named']}, expected {row['expected'][:2]}"
    )
    parts = [what, verdict]
    for text, figures in row["figures"].items():
        shown = (f"{name} {value:.3f}" for name, value in figures.items() if isinstance(value, float))
        parts.append(f"{text} {row['verdicts'][text]}: {', '.join(shown)}")
    if oracle := row["oracle"]:
        shown = [f"{n} {t['log_ratio']:+.3f}/{t['kl']:.3f}/{t['flips']:.3f}" for n, t in oracle["texts"].items()]
        parts.append(f"oracle log ratio/KL/flips: {', '.join(shown)}; nearest {oracle['nearest']:.2f}")
    return "; ".join([*parts, *(reason[:120] for reason in row["reasons"][:1])])
