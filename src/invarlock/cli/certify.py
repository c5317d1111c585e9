"""`invarlock certify`: two checkpoints in, one verdict and one certificate out."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from invarlock.assurance.certification import Certification, request_from
from invarlock.assurance.certification import certify as certify_models
from invarlock.cli.console import progress, say, show, width
from invarlock.cli.errors import VERDICT_CODES
from invarlock.cli.options import (
    BaselineEngineOption,
    DeviceOption,
    EngineOption,
    IntentOption,
    JsonOption,
    NoCacheOption,
    ProfileOption,
    TierOption,
    TimingOption,
)
from invarlock.core.ranks import follows
from invarlock.policy.presets import PRESETS
from invarlock.reporting.bundle import CERTIFICATE, HTML, folder_for
from invarlock.reporting.terminal import summary_lines

__all__ = ["arguments", "certify", "request_from"]


def _list_presets(value: str | None) -> str | None:
    if value == "list":
        for name, meaning in PRESETS.items():
            say(f"{name:<10}{meaning}")
        raise typer.Exit
    return value


_Preset = Annotated[
    str | None,
    Option(
        callback=_list_presets,
        is_eager=True,
        help="YAML with data, metric and guards, or a packaged preset; `list` shows those.",
    ),
]

_Baseline = Annotated[str | None, Option("--baseline", "--source", help="The checkpoint it came from, or a pack.")]
_Report = Annotated[Path | None, Option(help="Reuse a measured baseline: a run folder or report.json.")]
_Noise = Annotated[
    bool, Option("--noise-floor", help="Measure the baseline against itself too, computed in other ways.")
]
_Whole = Annotated[bool, Option("--no-early-stop", help="Measure all of the text, in one look.")]


def certify(
    subject: Annotated[str, Option("--subject", "--edited", help="The edited checkpoint: folder or hub id.")],
    baseline: _Baseline = None,
    baseline_report: _Report = None,
    adapter: Annotated[str | None, Option(help="How to load the models; auto recognises them.")] = None,
    device: DeviceOption = None,
    profile: ProfileOption = None,
    tier: TierOption = None,
    intent: IntentOption = "preserve",
    engine: EngineOption = None,
    baseline_engine: BaselineEngineOption = None,
    preset: _Preset = None,
    out: Annotated[Path | None, Option(help="Folder of the two runs; default: runs.")] = None,
    cert_out: Annotated[
        Path | None, Option(help="Folder of the certificate; default: reports/ and the subject's name.")
    ] = None,
    edit_config: Annotated[Path | None, Option(help="YAML with an edit to apply to the subject once loaded.")] = None,
    edit_label: Annotated[str | None, Option(help="Name of the edit in the certificate.")] = None,
    no_early_stop: _Whole = False,
    no_cache: NoCacheOption = False,
    noise_floor: _Noise = False,
    timing: TimingOption = False,
    json: JsonOption = False,
) -> int:
    """Measure a baseline and an edited subject on the same text, compare them, and write a certificate.

    Without a preset the text is wikitext2 where it is cached or the network is allowed, else documentation and source
    code of this Python. The profile defaults to ci (200 + 200 windows), the tier to balanced. An earlier certificate in
    the folder is moved to a subfolder before anything is measured.

    Exit codes: 0 PASS, 1 FAIL, 2 wrong usage or configuration, 3 the sides cannot be paired, 4 INCONCLUSIVE, 5 something
    could not be read or run.
    """
    asked, output = arguments(**locals())
    with progress("certify", passes=1 if baseline_report else 2) as tick:
        outcome = certify_models(**asked, output=output, tick=tick)
    if follows():
        return 0
    return show(
        "certify-v1",
        _fields(outcome),
        _lines(outcome, None if edit_config or engine else baseline, subject, preset),
        {"Certificate": outcome.files[CERTIFICATE], "Page": outcome.files[HTML]},
        runs=outcome.runs,
        notes=outcome.notes,
        timings=outcome.timings,
        measured=(("baseline", "subject"), 2 * _tokens(outcome.certificate)),
        code=VERDICT_CODES[outcome.status],
        json=json,
        timing=timing,
    )


def _tokens(certificate: Mapping[str, Any]) -> int:
    """Return how many tokens of the text were scored."""
    return sum(sum(rows["tokens"]) for rows in certificate["evaluation_windows"].values())


def arguments(
    *,
    subject: str,
    out: Path | None,
    cert_out: Path | None,
    edit_config: Path | None,
    no_early_stop: bool,
    no_cache: bool,
    **same: Any,
) -> tuple[dict[str, Any], Path]:
    """Return the arguments of `invarlock.certify` that those of the command line stand for, and the output folder."""
    kept = {name: value for name, value in same.items() if name not in ("json", "timing")}
    other = {
        "subject": subject,
        "runs": out,
        "edit": edit_config,
        "early_stop": not no_early_stop,
        "cache": not no_cache,
    }
    return {**kept, **other}, cert_out or folder_for(subject, kept["edit_label"])


def _fields(outcome: Certification) -> dict[str, object]:
    return {
        "verdict": outcome.certificate["verdict"],
        "primary_metric": outcome.certificate["primary_metric"],
        "files": {name: str(path) for name, path in outcome.files.items()},
        "source_report": outcome.source_report and str(outcome.source_report),
        "edited_report": outcome.edited_report and str(outcome.edited_report),
    }


def _lines(outcome: Certification, baseline: str | None, subject: str, preset: str | None) -> list[str]:
    """Return the summary, after a FAIL that was measured with the command that finds the tensors at fault."""
    certificate: Mapping[str, Any] = outcome.certificate
    place = outcome.files[CERTIFICATE].parent
    lines = summary_lines(certificate, place, width())
    measured = certificate["primary_metric"].get("decision") != "not_evaluated"
    if baseline is None or certificate["verdict"]["status"] != "FAIL" or not measured:
        return lines
    text = () if preset is None else ("--preset", preset)
    sides = ("--baseline", baseline, "--subject", subject, *text, "--out", str(place))
    return [*lines, f"{'which tensor':<14}{shlex.join(('invarlock', 'bisect', *sides))}"]
