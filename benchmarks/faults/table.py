"""From single runs to totals, and both as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from invarlock.core.device import library_versions

HELD_OUT = ("neox", "qwen")
NEAR = 0.1  # of (limit - no effect): where INCONCLUSIVE is acceptable
GATES = ("primary_metric", "preview_final_drift", "divergence_kl", "token_flips", "invariants", "spectral", "rmt", "variance")

Row = dict[str, Any]


def outcome(row: Row) -> str:
    """Return `right`, `missed`, `false alarm`, `undecided` or `undecided near a limit`."""
    if row["verdict"] == "INCONCLUSIVE":
        near = row["oracle"] is not None and row["oracle"]["nearest"] <= NEAR
        return "undecided near a limit" if near else "undecided"
    if row["harmful"]:
        return "right" if row["verdict"] == "FAIL" else "missed"
    return "right" if row["verdict"] == "PASS" else "false alarm"


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
        "models": {name: totals([r for r in rows if r["model"] == name]) for name in dict.fromkeys(r["model"] for r in rows)},
        "guards": guards(rows),
        "costs": costs or {},
        "wrong": wrong,
        "misnamed": misnamed,
        "runs": rows,
    }


def _lines(title: str, header: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [header, *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    shown = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in cells]
    return [title, *shown, ""]


def render(found: dict[str, Any]) -> str:
    """Print the edits, the totals, the guards and whatever went wrong."""
    rows = found["runs"]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["kind"], row["edit"]), []).append(row)
    lines: list[str] = []
    order: Callable[[tuple[str, str]], int] = lambda key: (  # noqa: E731
        "harmless", "structure", "degenerate", "unseen", "behaviour").index(key[0])
    body = []
    for key in sorted(groups, key=order):
        group = groups[key]
        total = totals(group)
        verdicts = [sum(r["verdict"] == v for r in group) for v in ("PASS", "FAIL", "INCONCLUSIVE")]
        wrong = sum(outcome(r) not in ("right", "undecided near a limit") for r in group)
        named = f"{total['named']['rightly']}/{total['named']['of']}" if total["named"]["of"] else "-"
        seconds = f"{sum(r['seconds'] for r in group) / len(group):.1f}"
        body.append([key[1], key[0], len(group), total["harmful"]["runs"], *verdicts, wrong, named, seconds])
    head = ["edit", "kind", "runs", "harmful", "PASS", "FAIL", "INCONCL", "wrong", "named", "s/run"]
    lines += _lines("Edits", head, body)
    body = []
    for name, total in {**found["models"], "held out": found["held_out"], "all": found["totals"]}.items():
        spared = total["damage_the_oracle_calls_harmless"]
        body.append([
            name, total["runs"], f"{total['harmless']['false_alarms'] + total['harmless']['undecided']}/{total['harmless']['runs']}",
            f"{total['harmful']['detected']}/{total['harmful']['runs']}", total["harmful"]["missed"],
            total["harmful"]["undecided"], total["harmful"]["undecided_near_a_limit"],
            f"{spared['false_alarms']}/{spared['runs']}", spared["undecided"] + spared["undecided_near_a_limit"],
            f"{total['named']['rightly']}/{total['named']['of']}",
        ])  # fmt: skip
    head = ["model", "runs", "false alarms", "detected", "missed", "undecided", "undec. near", "alarms on spared", "undec.", "named"]
    lines += _lines("Totals", head, body)
    head = ["gate", "caught", "beyond primary", "only it", "alarms on harmless", "cost"]
    body = [[g, *values.values(), found["costs"].get(g, "-")] for g, values in found["guards"].items()]
    lines += _lines("Gates", head, body)
    for title, key in (("Wrong", "wrong"), ("Misnamed", "misnamed")):
        lines.append(f"{title}: {len(found[key])}")
        lines += [_describe(row) for row in found[key]]
    return "\n".join(lines)


def _describe(row: Row) -> str:
    oracle = row["oracle"]
    truth = ""
    if oracle:
        shown = (f"{n} {t['log_ratio']:+.3f}/{t['kl']:.3f}/{t['flips']:.3f}" for n, t in oracle["texts"].items())
        truth = f"; oracle {'harmful' if oracle['harmful'] else 'harmless'} ({', '.join(shown)}; nearest {oracle['nearest']:.2f})"
    figures = ", ".join(f"{n} {v:.3f}" for n, v in row["figures"].items() if isinstance(v, float))
    return (
        f"  {row['model']} {row['edit']} {row['severity']} @{row['place']:g}#{row['seed']}: {outcome(row)}, {row['verdict']} by "
        f"{'+'.join(row['failed']) or '-'}, named {row['named']}, expected {row['expected'][:2]}{truth}; {figures}"
        + (f"; {row['reasons'][0][:160]}" if row["reasons"] else "")
    )
