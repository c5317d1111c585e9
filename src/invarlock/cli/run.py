"""`invarlock run`: one configuration in, one run's folder out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from invarlock.certificate.third import GATE_NAMES
from invarlock.cli.console import progress, show
from invarlock.cli.errors import OTHER
from invarlock.cli.options import DeviceOption, JsonOption, ProfileOption, TierOption, TimingOption
from invarlock.flow.run import RunOutcome, RunRequest
from invarlock.flow.run import run as run_pipeline
from invarlock.policy.config import MetricKind, load_config
from invarlock.reporting.wording import MISSING, clean, interval, ratio

__all__ = ["run"]

#: exit code of a status: an edit that was taken back is a FAIL, a run that did not end an error
_CODES = {"success": 0, "rollback": 1, "failed": OTHER}


def run(
    config: Annotated[Path, Option("--config", "-c", help="The configuration (YAML).")],
    device: DeviceOption = None,
    profile: ProfileOption = None,
    tier: TierOption = None,
    out: Annotated[Path | None, Option(help="Folder under which the run gets its own; default: runs.")] = None,
    edit: Annotated[str | None, Option(help="Name of the edit, in place of the configuration's.")] = None,
    metric_kind: Annotated[MetricKind | None, Option(help="Primary metric; auto follows the model.")] = None,
    probes: Annotated[int | None, Option(min=0, max=10, help="Windows measured right after the edit.")] = None,
    baseline: Annotated[Path | None, Option(help="Compare with this stored run, on its windows.")] = None,
    until_pass: Annotated[bool, Option("--until-pass", help="Weaken the edit until it passes.")] = False,
    max_attempts: Annotated[int, Option(min=1, help="Attempts of --until-pass.")] = 3,
    timeout: Annotated[float | None, Option(help="Seconds after which the run stops.")] = None,
    no_cleanup: Annotated[bool, Option("--no-cleanup", help="Keep the unfinished folder of a stopped run.")] = False,
    timing: TimingOption = False,
    telemetry: Annotated[bool, Option("--telemetry", help="Print time, memory and tokens a second.")] = False,
    json: JsonOption = False,
) -> int:
    """Measure a model, edit it, measure it again, and keep the edit or roll it back.

    The profile defaults to dev (32 + 32 windows). Without an edit the model is measured as it is; such a run serves as
    --baseline here and as --baseline-report of `invarlock certify`.

    Exit codes: 0 kept, 1 rolled back, 2 wrong usage or configuration, 3 the sides cannot be paired (ci and release),
    5 failed: something could not be read or run.
    """
    flags = {
        "model.device": device,
        "auto.tier": tier,
        "auto.probes": probes,
        "edit.name": edit,
        "eval.metric.kind": metric_kind,
        "output.dir": out and str(out),
    }
    chosen = load_config(config, cli_overrides=flags, profile=profile, gates=GATE_NAMES)
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
    with progress("run", passes=1 if baseline or not chosen.edit.name else 2) as tick:
        outcome = run_pipeline(request, tick)
    return show(
        "run-v1",
        _fields(outcome),
        [f"{label:<13}{text}" for label, text in _lines(outcome.report)],
        {"Report": outcome.report_path, "Model": outcome.model_folder},
        runs=request.out,
        notes=outcome.report["meta"]["warnings"],
        timings=outcome.timings,
        measured=(("guard_prepare", "eval"), _tokens(outcome.report)),
        code=_CODES[outcome.status],
        json=json,
        timing=timing,
        telemetry=telemetry,
    )


def _fields(outcome: RunOutcome) -> dict[str, object]:
    report, metrics, meta = outcome.report, outcome.report["metrics"], outcome.report["meta"]
    return {
        "status": outcome.status,
        "reason": meta.get("rollback_reason"),
        "error": report["error"],
        "verdict": metrics.get("verdict"),
        "primary_metric": metrics.get("primary_metric"),
        "guards": {name: result["passed"] for name, result in report["guards"].items()},
        "attempts": meta.get("attempts"),
        "report": outcome.report_path and str(outcome.report_path),
        "model": outcome.model_folder and str(outcome.model_folder),
    }


def _tokens(report: Mapping[str, Any]) -> int:
    """Return how many tokens were scored, in all."""
    evidence = report["evidence"]
    if not evidence:
        return 0
    passes = 1 if evidence["data"]["reused"] else 2
    return passes * sum(sum(evidence[split]["tokens"]) for split in ("preview", "final"))


def _lines(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    metrics, meta = report["metrics"], report["meta"]
    why = report["error"] or meta.get("rollback_reason")
    said = {"success": "the edit is kept", "rollback": f"the edit is rolled back: {why}", "failed": str(why)}
    yield report["status"].upper(), said[report["status"]]
    model = (meta.get("model") or {}).get("model_class") or "unknown class"
    yield "model", f"{report['context']['model_id']} ({model})"
    changed = (report["edit"].get("deltas") or {}).get("params_changed", 0)
    yield "edit", f"{report['edit'].get('name', 'none')}, {changed:,} parameters changed"
    metric, verdict = metrics.get("primary_metric"), metrics.get("verdict")
    if metric and metric["ratio_vs_baseline"] is not None:
        level = meta["policy"]["values"]["metrics"]["pm_ratio"]["ci_level"]
        bounds = interval(metric["display_ci"] or (None, None), ratio)
        around = f"  ({level:.0%} interval {bounds})" if bounds != MISSING else ""
        yield "ratio", ratio(metric["ratio_vs_baseline"]) + around
    if verdict:
        reasons = [clean(reason["message"], 200) for reason in verdict["reasons"]]
        rest = f" (and {len(reasons) - 1} more)" if reasons[1:] else ""
        yield "verdict", ": ".join([verdict["status"], *reasons[:1]]) + rest
    guards = [f"{name} {'pass' if result['passed'] else 'fail'}" for name, result in report["guards"].items()]
    yield "guards", ", ".join(guards) or "none ran"
    for number, row in enumerate(meta.get("attempts") or (), 1):
        figure = "not measured" if row["ratio"] is None else f"ratio {ratio(row['ratio'])}"
        plan = ", ".join(f"{key}={value}" for key, value in row["plan"].items())
        yield f"attempt {number}", f"{row['status']}, {figure}, {row['seconds']:.1f} s: {plan}"
