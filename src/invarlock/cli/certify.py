"""`invarlock certify`: two checkpoints in, one verdict and one certificate out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from invarlock.cli.console import emit_json, note, progress, say, show_telemetry, show_timings
from invarlock.cli.errors import EXIT_CODES
from invarlock.cli.options import DeviceOption, JsonOption, ProfileOption, TierOption
from invarlock.core import settings

__all__ = ["certify", "finish", "request_from"]

Intent = Literal["preserve", "finetune"]
#: keys of a configuration that mean nothing to certify (an empty set: the whole section), and what to use instead
_UNUSED: dict[str, tuple[frozenset[str], str]] = {
    "model": (frozenset({"id"}), " and name the models with --baseline and --subject"),
    "edit": (frozenset(), " and give the edit with --edit-config"),
    "auto": (frozenset({"enabled", "probes", "target_pm_ratio"}), ""),
    "eval": (frozenset({"max_pm_ratio", "spike_threshold"}), "; the limit of a verdict is metrics.pm_ratio.limit"),
    "context": (frozenset(), ""),
    "output": (frozenset({"save_model", "model_dir", "model_subdir", "save_report"}), ""),
}


def certify(
    subject: Annotated[str, typer.Option("--subject", "--edited", help="The edited checkpoint: folder or hub id.")],
    baseline: Annotated[
        str | None, typer.Option("--baseline", "--source", help="The checkpoint it came from: folder or hub id.")
    ] = None,
    baseline_report: Annotated[
        Path | None, typer.Option(help="Reuse a measured baseline: a run folder or its report.json.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="How to load the models; auto recognises them.")] = None,
    device: DeviceOption = None,
    profile: ProfileOption = None,
    tier: TierOption = None,
    intent: Annotated[
        Intent, typer.Option(help="finetune: the subject is meant to differ, so divergence only warns.")
    ] = "preserve",
    preset: Annotated[Path | None, typer.Option(help="YAML with data, metric and guards.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the two runs; default: runs.")] = None,
    cert_out: Annotated[Path, typer.Option(help="Folder of the certificate.")] = Path("reports/cert"),
    edit_config: Annotated[
        Path | None, typer.Option(help="YAML with an edit to apply to the subject after loading it.")
    ] = None,
    edit_label: Annotated[str | None, typer.Option(help="Name of the edit in the certificate.")] = None,
    timing: Annotated[bool, typer.Option("--timing", help="Print how long each step took.")] = False,
    json: JsonOption = False,
) -> int:
    """Measure a baseline and an edited subject on the same text, compare them, and write a certificate.

    Without a preset the text is wikitext2 where it is cached or the network is allowed, else python_docs. The profile
    defaults to ci (200 + 200 windows), the tier to balanced.

    Exit codes: 0 PASS, 1 FAIL or error, 2 wrong configuration, 3 the sides cannot be paired, 4 INCONCLUSIVE.
    """
    from invarlock.flow.certify import certify as run_certify

    chosen = {"adapter": adapter, "device": device, "profile": profile, "tier": tier}
    request = request_from(
        chosen,
        preset,
        subject=subject,
        baseline=baseline,
        baseline_report=baseline_report,
        intent=intent,
        edit=_edit(edit_config),
        edit_label=edit_label,
        out=out,
    )
    with progress() as tick:
        outcome = run_certify(request, tick)
        return finish(outcome, cert_out, timing=timing, json=json)


def _edit(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    from invarlock.policy.config import load_edit_config

    edit = load_edit_config(path)
    return {"name": edit.name, "plan": dict(edit.plan)}


def request_from(chosen: Mapping[str, Any], preset: Path | None, **facts: Any) -> Any:
    """Build the request: flags first, then the profile, then the preset, then the defaults."""
    from invarlock.checkpoints.side import Loading
    from invarlock.flow.certify import CertifyRequest
    from invarlock.flow.sampling import dataset_options
    from invarlock.policy.config import RunSettings, load_config

    profile = chosen["profile"] or "ci"
    if preset is None:
        config = RunSettings()
    else:
        config = load_config(preset, profile=chosen["profile"], require_model=False)
        _refuse_unused(config, preset.name)
        for text in config.notes:
            note(f"NOTE: {text}")
    out = facts.pop("out") or Path(config.output.dir)
    return CertifyRequest(
        **facts,
        adapter=chosen["adapter"] or config.model.adapter,
        device=chosen["device"] or config.model.device,
        loading=Loading.of(config.model),
        profile=profile,
        tier=chosen["tier"] or config.auto.tier,
        metric_kind=config.eval.metric_kind,
        dataset=dataset_options(config.dataset),
        overrides=config.policy_overrides(),
        guard_arguments={name: config.plugin_arguments(name) for name in config.guards.by_name},
        out=out,
    )


def _refuse_unused(config: Any, name: str) -> None:
    """Refuse the keys of a preset that would have no effect here, so that nobody believes they had one."""
    from invarlock.core.exceptions import ConfigError

    for section, (keys, instead) in _UNUSED.items():
        part = getattr(config, section)
        given = part.model_fields_set | set(part.model_extra or {}) if section in config.model_fields_set else set()
        wrong = sorted(given & keys if keys else given)
        if wrong:
            raise ConfigError(f"{name}: certify does not use {section}.{wrong[0]}; remove it from the preset{instead}")


def finish(outcome: Any, folder: Path, *, timing: bool, json: bool) -> int:
    """Write the certificate's files, say what came out, and return the verdict's exit code."""
    from invarlock.reporting.bundle import CERTIFICATE, HTML, write_bundle
    from invarlock.reporting.terminal import summary_lines

    files = write_bundle(outcome.certificate, folder)
    code = EXIT_CODES[outcome.status]
    for text in outcome.notes:
        note(f"NOTE: {text}")
    if settings.flag("INVARLOCK_TELEMETRY"):
        rows = outcome.certificate["evaluation_windows"]
        tokens = 2 * sum(sum(rows[split]["tokens"]) for split in ("preview", "final"))
        show_telemetry(outcome.timings, ("baseline", "subject"), tokens)
    if json:
        emit_json(
            {
                "format_version": "certify-v1",
                "verdict": outcome.certificate["verdict"],
                "primary_metric": outcome.certificate["primary_metric"],
                "files": {name: str(path) for name, path in files.items()},
                "source_report": str(outcome.source_report) if outcome.source_report else None,
                "edited_report": str(outcome.edited_report) if outcome.edited_report else None,
                "timings": outcome.timings,
                "exit_code": code,
            }
        )
        return code
    lines = summary_lines(outcome.certificate)
    for line in lines[:1] if settings.flag("INVARLOCK_MINIMAL") else lines:
        say(line)
    say(f"Certificate  {files[CERTIFICATE]}")
    say(f"Page         {files[HTML]}")
    if timing:
        show_timings(outcome.timings)
    return code
