"""`invarlock verify`: re-check certificates offline, without the models."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from invarlock.cli.console import emit_json, say
from invarlock.cli.errors import report_error
from invarlock.cli.options import JsonOption, ProfileOption
from invarlock.core.exceptions import InvarlockError

__all__ = ["verify"]


def verify(
    certificates: Annotated[list[Path], typer.Argument(metavar="CERT...", help="Certificate files, or their folders.")],
    baseline: Annotated[Path | None, typer.Option(help="Also hold it against the baseline's report.json.")] = None,
    baseline_model: Annotated[
        Path | None, typer.Option(help="Also hold the weights digest against this folder.")
    ] = None,
    subject_model: Annotated[
        Path | None, typer.Option(help="Also hold the weights digest against this folder.")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Relative tolerance of numbers that are derived again.")] = 1e-9,
    profile: ProfileOption = None,
    json: JsonOption = False,
) -> int:
    """Derive every number, gate and verdict of a certificate again from the evidence that it holds.

    Exit codes: 0 intact and PASS, 1 altered or FAIL, 2 not a certificate, 4 intact and INCONCLUSIVE. With --profile a
    certificate made under another profile is refused.
    """
    weights = _digests(baseline_model, subject_model)
    results = [_check(path, baseline, weights, tolerance, profile) for path in certificates]
    code: int = max((result["exit_code"] for result in results), key=_SEVERITY.index)
    if json:
        passed = sum(result["exit_code"] == 0 for result in results)
        emit_json(
            {
                "format_version": "verify-v1",
                "summary": {"ok": code == 0, "passed": passed, "failed": len(results) - passed},
                "certificate": {"count": len(results)},
                "results": results,
                "resolution": {"exit_code": code},
                "component": "verify",
                "ts": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
        )
        return code
    for result in results:
        for line in _lines(result):
            say(line)
    return code


_SEVERITY = [0, 4, 1, 2]


def _digests(baseline_model: Path | None, subject_model: Path | None) -> dict[str, str]:
    """Digest the tensors of the folders that were given; this alone needs torch."""
    given = {"baseline": baseline_model, "subject": subject_model}
    return {side: _digest(path) for side, path in given.items() if path is not None}


def _digest(path: Path) -> str:
    from invarlock.core.exceptions import DependencyError

    try:
        from invarlock.adapters.auto import HF_Auto_Adapter
        from invarlock.checkpoints.files import layout_of, load_config, read_structure, resolve_folder
    except ImportError:
        raise DependencyError("verify with model folders", "adapters") from None
    folder = resolve_folder(str(path))
    layout = layout_of(load_config(folder), HF_Auto_Adapter().select(str(path)).auto_class)
    return read_structure(folder, layout).weights_digest()


def _check(
    path: Path, baseline: Path | None, weights: dict[str, str], tolerance: float, profile: str | None
) -> dict[str, Any]:
    from invarlock.certificate.verify import verify_certificate
    from invarlock.core.files import read_json
    from invarlock.flow.run_folder import find_report
    from invarlock.reporting.bundle import CERTIFICATE

    target = path / CERTIFICATE if path.is_dir() else path
    try:
        certificate = read_json(target, f"a certificate such as {CERTIFICATE}")
        report = read_json(find_report(baseline), "a run's report.json") if baseline is not None else None
        outcome = verify_certificate(certificate, baseline=report, weights=weights, tolerance=tolerance)
    except InvarlockError as error:
        code = report_error(error)
        return {"path": str(target), "intact": False, "verdict": None, "failed_step": "schema",
                "problems": [str(error)], "exit_code": code}  # fmt: skip
    problems = list(outcome.problems)
    failed_step = outcome.failed_step
    made_under = certificate["meta"]["profile"]
    if outcome.intact and profile is not None and made_under != profile:
        failed_step, problems = "profile", [f"made under profile {made_under}; expected {profile}"]
    intact = outcome.intact and not problems
    code = {"PASS": 0, "INCONCLUSIVE": 4}.get(outcome.verdict, 1) if intact else 1
    return {
        "path": str(target),
        "intact": intact,
        "verdict": outcome.verdict,
        "failed_step": failed_step,
        "problems": problems,
        "steps": outcome.steps,
        "not_checked": list(outcome.not_checked),
        "reasons": [reason["message"] for reason in certificate["verdict"]["reasons"]],
        "exit_code": code,
    }


def _lines(result: dict[str, Any]) -> list[str]:
    if result["verdict"] is None:
        return [f"INVALID  {result['path']}: {result['problems'][0]}"]
    if not result["intact"]:
        head = f"ALTERED  {result['path']}: step '{result['failed_step']}' failed"
        return [head, *(f"  {problem}" for problem in result["problems"])]
    lines = [f"INTACT   {result['path']}: {len(result['steps'])} steps hold; verdict {result['verdict']}"]
    lines += [f"  {reason}" for reason in result["reasons"]]
    return lines
