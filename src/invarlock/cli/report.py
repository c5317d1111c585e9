"""`invarlock report`: show certificates and runs, in whatever form the reader needs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from invarlock.certificate.reports import make_certificate
from invarlock.certificate.verify import validate_certificate
from invarlock.cli.console import say
from invarlock.cli.errors import VERDICT_CODES
from invarlock.cli.options import plain_typer, remember_profile
from invarlock.cli.verify import verify
from invarlock.core.files import read_json, write_whole
from invarlock.flow.run_folder import read_report
from invarlock.reporting.bundle import BUNDLE, FORMATS, HTML, claimed, folder_for, read_certificate, write_bundle
from invarlock.reporting.explain import explain as explanation
from invarlock.reporting.html import render_html
from invarlock.reporting.markdown import compare as comparison
from invarlock.reporting.wording import clean

__all__ = ["app"]

COMPARISON = "comparison.md"

app = plain_typer()
Format = Literal["json", "md", "html", "cert", "junit", "all"]
_Certificate = Annotated[Path, Argument(metavar="CERT", help="A certificate file, or its folder.")]


def _read(path: Path) -> dict[str, Any]:
    certificate = read_certificate(path)
    validate_certificate(certificate)
    return certificate


def _put(text: str, target: Path | None) -> None:
    """Write a text to stdout, or into a file whose name is said instead."""
    if target is not None:
        write_whole(target, text)
    say(text.rstrip("\n") if target is None else str(target))


@app.callback(invoke_without_command=True)
def report(
    context: typer.Context,
    run: Annotated[Path | None, Option(help="A run (folder or report.json) to make a certificate of.")] = None,
    baseline: Annotated[Path | None, Option(help="The run of its baseline; default: its own.")] = None,
    compare: Annotated[
        list[Path] | None, Option(metavar="CERT", help="Put certificates side by side, once each.")
    ] = None,
    format_: Annotated[Format, Option("--format", help="What to make; cert and all write files.")] = "md",
    output: Annotated[Path | None, Option("--output", "-o", metavar="DIR", help="Folder to write into.")] = None,
) -> int:
    """Show certificates and runs.

    With --run: make the certificate of a stored run and end with the exit code of its verdict. With --compare: one
    table of several certificates.
    """
    if context.invoked_subcommand is not None:
        if run or baseline or compare or output:
            raise typer.BadParameter(f"--run, --baseline, --compare and -o do not go with {context.invoked_subcommand}")
        return 0
    if compare and run:
        raise typer.BadParameter("--run and --compare do not go together")
    if compare and format_ != "md":
        raise typer.BadParameter(f"--compare makes md alone, not {format_}")
    if compare:
        _put(comparison([_read(path) for path in compare]), output and output / COMPARISON)
        return 0
    if run is None:
        raise typer.BadParameter("expected --run, --compare or a subcommand: explain, html, validate, verify")
    return _of_run(context, run, baseline, format_, output)


def _of_run(context: typer.Context, run: Path, baseline: Path | None, format_: Format, output: Path | None) -> int:
    """Make the certificate of a stored run, show it, and return the exit code of its verdict."""
    subject, found = read_report(run)
    remember_profile(context, ((subject.get("meta") or {}).get("policy") or {}).get("profile"))
    own = found.parent / "baseline"
    if baseline is None and not own.is_dir():
        raise typer.BadParameter(f"{run} did not measure its baseline itself; name the baseline's run with --baseline")
    certificate = make_certificate(subject, read_report(baseline or own)[0])
    if format_ in ("cert", "all"):
        formats = (*BUNDLE, "junit") if format_ == "all" else BUNDLE
        folder = output or folder_for(certificate["meta"]["subject_model"]["id"], certificate["edit"].get("label"))
        with claimed(folder):
            for path in write_bundle(certificate, folder, formats).values():
                say(str(path))
    else:
        name, render = FORMATS[format_]
        _put(render(certificate), output and output / name)
    return VERDICT_CODES[certificate["verdict"]["status"]]


@app.command()
def explain(certificate: _Certificate) -> None:
    """Say in plain words what each gate measured, against what, and what to do next."""
    say(explanation(_read(certificate)))
    for line in _findings(certificate if os.path.isdir(certificate) else certificate.parent):
        say(f"{'bisect':<14}{line}")


def _findings(folder: Path) -> list[str]:
    """Return what `invarlock bisect` found, where its findings stand beside the certificate."""
    path = folder / "bisect.json"
    found = read_json(path, "what invarlock bisect wrote") if path.is_file() else {}
    lines = found.get("summary") if isinstance(found, dict) else None
    return [clean(str(line), 200) for line in lines] if isinstance(lines, list) else []


@app.command()
def html(
    certificate: _Certificate,
    output: Annotated[Path | None, Option("--output", "-o", help="Where to write; default: beside it.")] = None,
) -> None:
    """Write the certificate as one HTML page that stands alone."""
    folder = certificate if os.path.isdir(certificate) else certificate.parent
    _put(render_html(_read(certificate)), output or folder / HTML)


@app.command()
def validate(certificate: _Certificate) -> None:
    """Check the schema alone; `invarlock verify` re-derives the numbers too."""
    _read(certificate)
    say(f"{certificate} follows schema v1")


app.command("verify")(verify)
