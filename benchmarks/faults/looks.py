"""What deciding look by look would have said on the stored runs of the fault matrix: no model is measured.

    python -m benchmarks.faults.looks [--work FOLDER] [--every N]

Windows are put in the order in which a certification takes documents; every run is judged once on all of its text, and
look by look. Printed: the share of the tokens used, and every run whose verdict is another one.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.faults.__main__ import ROOT
from benchmarks.faults.run import OVERRIDES, PROFILE, TIER

from invarlock.certificate.derive import CURRENT, derive
from invarlock.certificate.schema import Certificate, LooksRecord, PairedRows, Recorded
from invarlock.evidence.plan import document_order
from invarlock.policy.resolve import resolve_policy
from invarlock.stats.sequential import looks


def recorded(certificate: dict[str, Any]) -> Recorded:
    """Return what was recorded, under today's rules, its windows in the order of the looks."""
    policy = resolve_policy(TIER, PROFILE, overrides=OVERRIDES).values
    r = Recorded.model_validate({**certificate, "resolved_policy": policy, "derivation": CURRENT, "looks": None})
    splits = r.evaluation_windows
    order = document_order([rows.document_ids for rows in splits.values()], r.data.seed)

    def sort(rows: PairedRows) -> PairedRows:
        places = sorted(range(len(rows.document_ids)), key=lambda i: order[rows.document_ids[i]])
        return PairedRows(**{name: None if v is None else [v[i] for i in places] for name, v in rows})

    return r.model_copy(update={"evaluation_windows": {split: sort(rows) for split, rows in splits.items()}})


def by_looks(r: Recorded, minimum: int) -> Certificate:
    """Judge look after look until one decides."""
    splits = r.evaluation_windows
    order = document_order([rows.document_ids for rows in splits.values()], r.data.seed)
    tokens = sum(sum(rows.tokens) for rows in splits.values())
    whole = tuple(len(rows.window_ids) for rows in splits.values())
    reached: list[tuple[int, int]] = []
    for look in looks(len(order), minimum):
        first, second = (sum(order[name] < look.documents for name in rows.document_ids) for rows in splits.values())
        reached.append((first, second))
        part = {split: rows.head(n) for (split, rows), n in zip(splits.items(), reached[-1], strict=True)}
        plan = LooksRecord(
            planned_documents=len(order), planned_windows=whole, planned_tokens=tokens, reached=[*reached]
        )
        found = derive(r.model_copy(update={"evaluation_windows": part, "looks": plan}))
        if found.looks is not None and found.looks.made[-1].decision != "inconclusive":
            break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "faults")
    parser.add_argument("--every", type=int, default=1, help="judge every N-th run alone")
    given = parser.parse_args()
    minimum = resolve_policy(TIER, PROFILE).limits.sample.early_documents
    shares, verdicts = [], Counter[tuple[str, str]]()
    for path in sorted(given.work.glob("*/*.json.gz"))[:: given.every]:
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            record = json.load(stream)
        for text, certificate in ((record or {}).get("certificates") or {}).items():
            if not certificate["evaluation_windows"]["preview"]["window_ids"]:
                continue  # refused before anything was evaluated
            r = recorded(certificate)
            whole, early = derive(r), by_looks(r, minimum)
            assert early.looks is not None
            pair = (whole.verdict.status, early.verdict.status)
            verdicts[pair] += 1
            shares.append(early.looks.share_used)
            if pair[0] != pair[1]:
                gates = [
                    (g.name, g.measured, g.limit)
                    for g in (*whole.gates, *early.gates)
                    if g.decision not in ("pass", "warn", "off")
                ]
                print(path.parent.name.partition("-")[0], path.stem, text, *pair, gates[:4], flush=True)
    print(f"{len(shares)} certifications; share of the tokens used: median {statistics.median(shares):.0%},", end=" ")
    print(
        f"mean {statistics.mean(shares):.0%}; decided at the first look: {sum(s < 0.5 for s in shares) / len(shares):.0%}"
    )
    for (whole_verdict, early_verdict), count in sorted(verdicts.items()):
        print(f"{whole_verdict:>12} on all of the text, {early_verdict:<12} look by look: {count}")


if __name__ == "__main__":
    main()
