"""`invarlock run`: one configuration in, one run's folder out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from invarlock.cli.console import emit_json, note, progress, say, show_telemetry, show_timings
from invarlock.cli.options import DeviceOption, JsonOption, ProfileOption, TierOption
from invarlock.core import settings

__all__ = ["run"]

MetricKind = Literal["auto", "ppl_causal", "ppl_mlm", "ppl_seq2seq", "accuracy", "vqa_accuracy"]


def run(
    config: Annotated[Path, typer.Option("--config", "-c", help="The configuration (YAML).")],
    device: DeviceOption = None,
    profile: ProfileOption = None,
    tier: TierOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder under which the run gets its own; default: runs.")] = None,
    edit: Annotated[str | None, typer.Option(help="Name of the edit, in place of the configuration's.")] = None,
    metric_kind: Annotated[MetricKind | None, typer.Option(help="Primary metric; auto follows the model.")] = None,
    probes: Annotated[
        int | None, typer.Option(min=0, max=10, help="Windows measured right after the edit, for an early stop.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Compare with this stored run (folder or report.json), on its windows.")
    ] = None,
    until_pass: Annotated[bool, typer.Option("--until-pass", help="Weaken the edit until it passes.")] = False,
    max_attempts: Annotated[int, typer.Option(min=1, help="Attempts of --until-pass.")] = 3,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which the run stops.")] = None,
    no_cleanup: Annotated[
        bool, typer.Option("--no-cleanup", help="Keep the unfinished folder of a run that is stopped.")
    ] = False,
    timing: Annotated[bool, typer.Option("--timing", help="Print how long each step took.")] = False,
    telemetry: Annotated[
        bool, typer.Option("--telemetry", help="Print time, memory and tokens a second in one line.")
    ] = False,
    json: JsonOption = False,
) -> int:
    """Measure a model, edit it, measure it again, and keep the edit or roll it back.

    The profile defaults to dev (32 + 32 windows). Without an edit the model is measured as it is; such a run serves as
    --baseline here and as --baseline-report of `invarlock certify`.

    Exit codes: 0 kept, 1 rolled back or failed, 2 wrong configuration, 3 the sides cannot be paired (ci and release).
    """
    from invarlock.flow.run import RunRequest
    from invarlock.flow.run import run as run_pipeline
    from invarlock.policy.config import load_config

    overrides = {
        "model.device": device,
        "auto.tier": tier,
        "auto.probes": probes,
        "edit.name": edit,
        "eval.metric.kind": metric_kind,
        "output.dir": None if out is None else str(out),
    }
    chosen = load_config(config, cli_overrides=overrides, profile=profile)
    request = RunRequest(
        settings=chosen,
        out=Path(chosen.output.dir),
        name=config.stem,
        profile=profile or "dev",
        baseline=baseline,
        until_pass=until_pass,
        max_attempts=max_attempts,
        timeout=timeout,
        cleanup=not no_cleanup,
    )
    with progress() as tick:
        outcome = run_pipeline(request, tick)
    _show(outcome, timing=timing, telemetry=telemetry or settings.flag("INVARLOCK_TELEMETRY"), json=json)
    return 0 if outcome.status == "success" else 1


def _show(outcome: Any, *, timing: bool, telemetry: bool, json: bool) -> None:
    report = outcome.report
    for text in report["meta"]["warnings"]:
        note(f"NOTE: {text}")
    if telemetry:
        passes, tokens = _measured(report)
        show_telemetry(outcome.timings, ("guard_prepare", "eval"), passes * tokens)
    if json:
        emit_json(_as_json(outcome))
        return
    lines = list(_lines(report))
    for label, text in lines[:1] if settings.flag("INVARLOCK_MINIMAL") else lines:
        say(f"{label:<13}{text}")
    for label, path in (("Report", outcome.report_path), ("Model", outcome.model_folder)):
        if path is not None:
            say(f"{label:<13}{path}")
    if timing:
        show_timings(outcome.timings)


def _as_json(outcome: Any) -> dict[str, Any]:
    report = outcome.report
    return {
        "format_version": "run-v1",
        "status": outcome.status,
        "reason": report["meta"].get("rollback_reason"),
        "error": report["error"],
        "primary_metric": report["metrics"].get("primary_metric"),
        "guards": {name: result["passed"] for name, result in report["guards"].items()},
        "attempts": report["meta"].get("attempts"),
        "report": str(outcome.report_path) if outcome.report_path else None,
        "model": str(outcome.model_folder) if outcome.model_folder else None,
        "timings": outcome.timings,
        "exit_code": 0 if outcome.status == "success" else 1,
    }


def _measured(report: dict[str, Any]) -> tuple[int, int]:
    """Return how often the windows were measured, and how many scored tokens they hold."""
    evidence = report["evidence"]
    if not evidence:
        return 0, 0
    tokens = sum(sum(evidence[split]["tokens"]) for split in ("preview", "final"))
    return 1 if evidence["data"]["reused"] else 2, tokens


def _lines(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    why = report["error"] or report["meta"].get("rollback_reason")
    said = {"success": "the edit is kept", "rollback": f"the edit is rolled back: {why}", "failed": str(why)}
    yield report["status"].upper(), said[report["status"]]
    described = report["meta"].get("model") or {}
    yield "model", f"{report['context']['model_id']} ({described.get('model_class') or 'unknown class'})"
    changed = (report["edit"].get("deltas") or {}).get("params_changed", 0)
    yield "edit", f"{report['edit'].get('name', 'none')}, {changed:,} parameters changed"
    metric = report["metrics"].get("primary_metric")
    if metric and metric["ratio_vs_baseline"] is not None:
        low, high = metric["display_ci"] or (None, None)
        level = report["meta"]["policy"]["values"]["metrics"]["pm_ratio"]["ci_level"]
        interval = f"  ({level:.0%} interval [{low:.4f}, {high:.4f}])" if low is not None and high is not None else ""
        yield "ratio", f"{metric['ratio_vs_baseline']:.4f}{interval}"
    guards = [f"{name} {'pass' if result['passed'] else 'fail'}" for name, result in report["guards"].items()]
    yield "guards", ", ".join(guards) or "none ran"
    for number, row in enumerate(report["meta"].get("attempts") or (), 1):
        ratio = "not measured" if row["ratio"] is None else f"ratio {row['ratio']:.4f}"
        plan = ", ".join(f"{key}={value}" for key, value in row["plan"].items())
        yield f"attempt {number}", f"{row['status']}, {ratio}, {row['seconds']:.1f} s: {plan}"
