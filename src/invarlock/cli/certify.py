"""`invarlock certify`: two checkpoints in, one verdict and one certificate out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from typer import Option

from invarlock.checkpoints.side import Loading
from invarlock.cli.console import note, progress, show
from invarlock.cli.errors import VERDICT_CODES
from invarlock.cli.options import DeviceOption, JsonOption, ProfileOption, TierOption, TimingOption
from invarlock.flow.certify import CertifyRequest
from invarlock.flow.certify import certify as run_certify
from invarlock.flow.sampling import dataset_options
from invarlock.policy.config import RunSettings, load_config, load_edit_config
from invarlock.reporting.bundle import CERTIFICATE, HTML, write_bundle
from invarlock.reporting.terminal import summary_lines

__all__ = ["certify", "request_from"]

_LIMIT = "certify does not use it; the limit of a verdict is metrics.pm_ratio.limit"
#: keys of a configuration, or whole sections, that would have no effect here, so that nobody believes they had one
_REFUSED = {
    "model.id": "certify does not use it; name the models with --baseline and --subject",
    "edit": "certify does not use it; give the edit with --edit-config",
    "eval.max_pm_ratio": _LIMIT,
    "eval.spike_threshold": _LIMIT,
    "eval.gates_off": "certify does not use it; a verdict holds every gate",
    **dict.fromkeys(
        ("auto.enabled", "auto.probes", "auto.target_pm_ratio", "context", "output.save_model", "output.model_dir",
         "output.model_subdir", "output.save_report"),
        "certify does not use it; remove it from the preset",
    ),
}  # fmt: skip


def certify(
    subject: Annotated[str, Option("--subject", "--edited", help="The edited checkpoint: folder or hub id.")],
    baseline: Annotated[str | None, Option("--baseline", "--source", help="The checkpoint it came from.")] = None,
    baseline_report: Annotated[
        Path | None, Option(help="Reuse a measured baseline: a run folder or report.json.")
    ] = None,
    adapter: Annotated[str | None, Option(help="How to load the models; auto recognises them.")] = None,
    device: DeviceOption = None,
    profile: ProfileOption = None,
    tier: TierOption = None,
    intent: Annotated[
        str, Option(help="preserve; finetune: meant to differ; restructure: built differently, meant to do the same.")
    ] = "preserve",
    preset: Annotated[Path | None, Option(help="YAML with data, metric and guards.")] = None,
    out: Annotated[Path | None, Option(help="Folder of the two runs; default: runs.")] = None,
    cert_out: Annotated[Path, Option(help="Folder of the certificate.")] = Path("reports/cert"),
    edit_config: Annotated[Path | None, Option(help="YAML with an edit to apply to the subject once loaded.")] = None,
    edit_label: Annotated[str | None, Option(help="Name of the edit in the certificate.")] = None,
    no_early_stop: Annotated[bool, Option("--no-early-stop", help="Measure all of the text, in one look.")] = False,
    timing: TimingOption = False,
    json: JsonOption = False,
) -> int:
    """Measure a baseline and an edited subject on the same text, compare them, and write a certificate.

    Without a preset the text is wikitext2 where it is cached or the network is allowed, else documentation and source
    code of this Python. The profile defaults to ci (200 + 200 windows), the tier to balanced.

    Exit codes: 0 PASS, 1 FAIL or error, 2 wrong configuration, 3 the sides cannot be paired, 4 INCONCLUSIVE.
    """
    flags = {"model.adapter": adapter, "model.device": device, "auto.tier": tier, "output.dir": out and str(out)}
    early = {"eval.early_stop": None if not no_early_stop else False}
    request = request_from(
        load_config(preset, cli_overrides={**flags, **early}, profile=profile, require_model=False, refused=_REFUSED),
        profile=profile or "ci",
        subject=subject,
        baseline=baseline,
        baseline_report=baseline_report,
        intent=intent,
        edit=load_edit_config(edit_config).model_dump() if edit_config else None,
        edit_label=edit_label,
    )
    with progress() as tick:
        outcome = run_certify(request, tick)
    certificate, files = outcome.certificate, write_bundle(outcome.certificate, cert_out)
    rows = certificate["evaluation_windows"]
    return show(
        "certify-v1",
        {
            "verdict": certificate["verdict"],
            "primary_metric": certificate["primary_metric"],
            "files": {name: str(path) for name, path in files.items()},
            "source_report": outcome.source_report and str(outcome.source_report),
            "edited_report": outcome.edited_report and str(outcome.edited_report),
        },
        summary_lines(certificate),
        {"Certificate": files[CERTIFICATE], "Page": files[HTML]},
        notes=outcome.notes,
        timings=outcome.timings,
        measured=(("baseline", "subject"), 2 * sum(sum(rows[split]["tokens"]) for split in ("preview", "final"))),
        code=VERDICT_CODES[outcome.status],
        json=json,
        timing=timing,
    )


def request_from(
    config: RunSettings,
    *,
    profile: str,
    subject: str,
    baseline: str | None = None,
    baseline_report: Path | None = None,
    intent: str = "preserve",
    edit: Mapping[str, object] | None = None,
    edit_label: str | None = None,
) -> CertifyRequest:
    """Return the request that a preset and the flags make together."""
    for text in config.notes:
        note(f"NOTE: {text}")
    return CertifyRequest(
        subject=subject,
        baseline=baseline,
        baseline_report=baseline_report,
        adapter=config.model.adapter,
        device=config.model.device,
        loading=Loading.of(config.model),
        profile=profile,
        tier=config.auto.tier,
        intent=intent,
        metric_kind=config.eval.metric_kind,
        dataset=dataset_options(config.dataset),
        overrides=config.policy_overrides(),
        guard_arguments={name: config.plugin_arguments(name) for name in config.guards.by_name},
        edit=edit,
        edit_label=edit_label,
        out=Path(config.output.dir),
    )
