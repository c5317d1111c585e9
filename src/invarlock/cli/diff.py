"""`invarlock diff`: what was done to a checkpoint, in words and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from invarlock.checkpoints.fingerprints import Change
from invarlock.cli.console import emit_json, note, progress, say
from invarlock.cli.options import JsonOption
from invarlock.core.exceptions import ConfigError, InvarlockError
from invarlock.core.files import write_whole
from invarlock.flow.diff import Diff, Expectation, place_of
from invarlock.flow.diff import diff as run_diff
from invarlock.flow.run_folder import require_writable
from invarlock.reporting.findings import Findings, render_findings

__all__ = ["diff"]

SAME, DIFFERENT = 0, 1
_SHOWN = 12


def diff(
    baseline: Annotated[str, Argument(metavar="A", help="A checkpoint: folder or hub id, of any format.")],
    subject: Annotated[str, Argument(metavar="B", help="The one that was made from it.")],
    expect: Annotated[
        str | None, Option(help="What was meant, NAME or NAME:VALUE, such as rounded:4; anything else ends with 1.")
    ] = None,
    scope: Annotated[str | None, Option(help="Pattern of the names that may change, such as 'mlp|attn'.")] = None,
    html: Annotated[Path | None, Option(help="Write a page to this file, too.")] = None,
    verbose: Annotated[bool, Option("--verbose", "-v", help="Show every tensor that changed.")] = False,
    json: JsonOption = False,
) -> int:
    """Say what lies between two checkpoints, tensor by tensor: no model is built, and no text is needed.

    Every change is named where it has a name (rounded to 4 bits in groups of 32, pruned 2:4, a rank-16 update, scaled,
    swapped, re-initialised and so on), and differences of configuration, generation, template and tokenizer are told.

    Exit codes: 0 the same, or as --expect and --scope say; 1 different, or otherwise than they say; 2 trouble.
    """
    try:
        if html is not None:
            require_writable(html.parent, "the page", "--html")
        gate = Expectation.parse(expect, scope) if expect or scope else None
        with progress("diff") as tick:
            found = run_diff(baseline, subject, tick)
    except InvarlockError as error:
        raise ConfigError(str(error)) from error  # whatever it is, it ends as `diff` ends for trouble: with 2
    violations = gate.violations(found) if gate else []
    code = (DIFFERENT if violations else SAME) if gate else SAME if found.same else DIFFERENT
    if html is not None:
        write_whole(html, render_findings(_page(found, violations)))
    for text in found.notes:
        note(f"NOTE: {text}")
    if json:
        emit_json(format_version="diff-v1", **found.to_dict(), violations=violations, exit_code=code)
        return code
    for line in [*found.summary, *(f"NOT MEANT: {line}" for line in violations[:_SHOWN])]:
        say(line)
    for change in _largest_first(found) if verbose else ():
        say(f"  {change.name}  {_number(change.rel_change)}  cosine {_number(change.cosine)}  {change.words}")
    return code


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.4g}"


def _largest_first(found: Diff) -> list[Change]:
    return sorted(found.changed, key=lambda change: -(change.rel_change or 0.0))


def _page(found: Diff, violations: list[str]) -> Findings:
    picture = {place_of(c.name): float("inf") if c.rel_change is None else c.rel_change for c in found.changes}
    rows = [
        (c.name, c.words, _number(c.rel_change), _number(c.cosine), _number(c.largest), f"{c.rows[0]} of {c.rows[1]}",
         f"{c.columns[0]} of {c.columns[1]}")
        for c in _largest_first(found)
    ]  # fmt: skip
    return Findings(
        title=f"{found.baseline} → {found.subject}",
        headline="the same" if found.same else f"{len(found.changed)} of {len(found.changes)} tensors differ",
        lines=[*found.summary, *(f"not meant: {line}" for line in violations)],
        columns=("tensor", "what was done", "relative change", "cosine", "largest", "rows", "columns"),
        rows=rows,
        picture=picture,
        measure="relative change of each tensor",
        notes=found.notes,
    )
