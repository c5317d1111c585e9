"""`invarlock verify`: re-check certificates offline, without the models."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from invarlock.certificate.verify import verify_certificate
from invarlock.checkpoints.side import Loading, read_side
from invarlock.cli.console import emit_json, say
from invarlock.cli.errors import VERDICT_CODES, report_error
from invarlock.cli.options import JsonOption, Profile
from invarlock.core import registry
from invarlock.core.exceptions import InvarlockError
from invarlock.flow.run_folder import read_report
from invarlock.reporting.bundle import find_certificate, read_certificate
from invarlock.reporting.story import points
from invarlock.reporting.view import parse

__all__ = ["verify"]

#: exit codes, the worst last
_SEVERITY = (0, 4, 1, 5, 2)
#: what an intact certificate shows, and what it does not
_PROVEN = (
    "derived: every figure, gate and the verdict follow from what was recorded, by the rules of its release",
    "unsigned: not shown who recorded it, and that it is of these models; to check the weights: --baseline-model, "
    "--subject-model",
)


def verify(
    certificates: Annotated[list[Path], Argument(metavar="CERT...", help="Certificate files, or their folders.")],
    baseline: Annotated[
        Path | None, Option(help="Also hold it against the baseline's run, report.json or pack.")
    ] = None,
    baseline_model: Annotated[Path | None, Option(help="Also hold the weights digest against this folder.")] = None,
    subject_model: Annotated[Path | None, Option(help="Also hold the weights digest against this folder.")] = None,
    tolerance: Annotated[float, Option(help="Relative tolerance of numbers that are derived again.")] = 1e-9,
    profile: Annotated[Profile | None, Option(help="The profile that it must have been made under.")] = None,
    json: JsonOption = False,
) -> int:
    """Derive every number, gate and verdict of a certificate again from the evidence that it holds.

    INTACT: everything follows from what was recorded. ALTERED: it does not. MISMATCH: it holds, but was made under
    another profile, or of other files, than those given. It is not signed: who recorded it is not shown.

    Exit codes: 0 INTACT and PASS; 1 FAIL, ALTERED or MISMATCH; 2 not a certificate; 4 INTACT and INCONCLUSIVE.
    """
    models = {"baseline": baseline_model, "subject": subject_model}
    weights = {side: _digest(path) for side, path in models.items() if path is not None}
    results = [_check(path, baseline, weights, tolerance, profile) for path in certificates]
    code: int = max((result["exit_code"] for result in results), key=_SEVERITY.index)
    if json:
        passed = sum(result["exit_code"] == 0 for result in results)
        emit_json(
            format_version="verify-v1",
            kind="verdict" if any(result["verdict"] for result in results) else "error",
            summary={"ok": code == 0, "passed": passed, "failed": len(results) - passed},
            certificate={"count": len(results)},
            results=results,
            resolution={"exit_code": code},
            component="verify",
            ts=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        return code
    for result in results:
        for line in _lines(result):
            say(line, colour=True)
    return code


def _digest(path: Path) -> str:
    """Digest the tensors of a folder; this alone needs torch."""
    return read_side(registry.adapters.create("auto"), str(path), Loading()).structure.weights_digest()


def _check(
    path: Path, baseline: Path | None, weights: Mapping[str, str], tolerance: float, profile: str | None
) -> dict[str, Any]:
    target = find_certificate(path)
    try:
        certificate = read_certificate(path)
        report = read_report(baseline)[0] if baseline is not None else None
        outcome = verify_certificate(certificate, baseline=report, weights=weights, tolerance=tolerance)
    except InvarlockError as error:
        return {"path": str(target), "status": "INVALID", "intact": False, "verdict": None, "failed_step": "schema",
                "problems": [str(error)], "code": error.code, "exit_code": report_error(error)}  # fmt: skip
    failed_step, problems, made_under = outcome.failed_step, list(outcome.problems), certificate["meta"]["profile"]
    other = outcome.mismatch
    if outcome.intact and profile not in (None, made_under):
        failed_step, problems, other = "profile", [f"made under profile {made_under}; expected {profile}"], True
    intact = outcome.intact and not problems
    return {
        "path": str(target),
        "status": "INTACT" if intact else "MISMATCH" if other else "ALTERED",
        "intact": intact,
        "verdict": outcome.verdict,
        "failed_step": failed_step,
        "problems": problems,
        "steps": outcome.steps,
        "not_checked": list(outcome.not_checked),
        "notes": outcome.notes,
        "points": [text for _, text in points(parse(certificate))] if intact else [],
        "reasons": [reason["message"] for reason in certificate["verdict"]["reasons"]],
        "exit_code": VERDICT_CODES.get(outcome.verdict, 1) if intact else 1,
    }


def _lines(result: Mapping[str, Any]) -> list[str]:
    start, step = f"{result['status']:<8} {result['path']}", result["failed_step"]
    if result["status"] == "INVALID":
        return [f"{start}: {result['problems'][0]}"]
    if result["status"] == "ALTERED":
        head, rest = f"{start}: step '{step}' failed", result["problems"]
    elif result["status"] == "MISMATCH":
        head = f"{start}: it holds, but is not of what was given: step '{step}' failed"
        rest = result["problems"]
    else:
        head = f"{start}: {len(result['steps'])} steps hold; verdict {result['verdict']}"
        rest = [*result["points"], *(f"note: {text}" for text in result["notes"]), *_PROVEN]
    return [head, *(f"  {line}" for line in rest)]
