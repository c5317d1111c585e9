"""`invarlock report`: show certificates and runs, in whatever form the reader needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from invarlock.cli.console import say
from invarlock.cli.errors import EXIT_CODES
from invarlock.cli.options import plain_typer, remember_profile
from invarlock.cli.verify import verify
from invarlock.core.files import write_together

__all__ = ["app"]

JUNIT = "evaluation.junit.xml"
COMPARISON = "comparison.md"

app = plain_typer()
Format = Literal["json", "md", "html", "cert", "junit", "all"]
_Certificate = Annotated[Path, typer.Argument(metavar="CERT", help="A certificate file, or its folder.")]


def _read(path: Path) -> dict[str, Any]:
    from invarlock.certificate.verify import validate_certificate
    from invarlock.core.files import read_json
    from invarlock.reporting.bundle import CERTIFICATE

    target = path / CERTIFICATE if path.is_dir() else path
    certificate: dict[str, Any] = read_json(target, f"a certificate such as {CERTIFICATE}")
    validate_certificate(certificate)
    return certificate


@app.callback(invoke_without_command=True)
def report(
    context: typer.Context,
    run: Annotated[Path | None, typer.Option(help="A run (folder or report.json) to make a certificate of.")] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="The run of its baseline; default: the one that the run measured itself.")
    ] = None,
    compare: Annotated[
        list[Path] | None, typer.Option(metavar="CERT", help="Put certificates side by side; give it once for each.")
    ] = None,
    format_: Annotated[
        Format, typer.Option("--format", help="What to make; cert and all write files, the others to stdout.")
    ] = "md",
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder to write into.")] = None,
) -> int:
    """Show certificates and runs.

    With --run: make the certificate of a stored run and end with the exit code of its verdict. With --compare: one
    table of several certificates.
    """
    if context.invoked_subcommand is not None:
        if run or baseline or compare or output:
            raise typer.BadParameter(f"--run, --baseline, --compare and -o do not go with {context.invoked_subcommand}")
        return 0
    if compare:
        if run is not None:
            raise typer.BadParameter("--run and --compare do not go together")
        return _compare(compare, format_, output)
    if run is None:
        raise typer.BadParameter("expected --run, --compare or a subcommand: explain, html, validate, verify")
    return _of_run(context, run, baseline, format_, output)


def _compare(paths: list[Path], format_: Format, output: Path | None) -> int:
    from invarlock.core.files import write_whole
    from invarlock.reporting.markdown import compare

    if format_ != "md":
        raise typer.BadParameter(f"--compare makes md alone, not {format_}")
    table = compare([_read(path) for path in paths])
    if output is None:
        say(table.rstrip("\n"))
    else:
        write_whole(output / COMPARISON, table)
        say(str(output / COMPARISON))
    return 0


def _of_run(context: typer.Context, run: Path, baseline: Path | None, format_: Format, output: Path | None) -> int:
    """Make the certificate of a stored run, show it, and return the exit code of its verdict."""
    from invarlock.certificate.reports import make_certificate
    from invarlock.flow.run_folder import read_report

    subject, found = read_report(run)
    remember_profile(context, ((subject.get("meta") or {}).get("policy") or {}).get("profile"))
    own = found.parent / "baseline"
    if baseline is None and not own.is_dir():
        raise typer.BadParameter(f"{run} did not measure its baseline itself; name the baseline's run with --baseline")
    certificate = make_certificate(subject, read_report(baseline or own)[0])
    if format_ in ("cert", "all"):
        for path in _write(certificate, format_, output or Path("reports/cert")):
            say(str(path))
    else:
        name, text = _rendered(certificate, format_)
        if output is None:
            say(text.rstrip("\n"))
        else:
            write_together(output, {name: text})
            say(str(output / name))
    return EXIT_CODES[certificate["verdict"]["status"]]


def _rendered(certificate: dict[str, Any], format_: Format) -> tuple[str, str]:
    """Return the file's name and its text."""
    from invarlock.reporting import render_html, render_junit, render_markdown
    from invarlock.reporting.bundle import CERTIFICATE, HTML, MARKDOWN, certificate_text

    table: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
        "json": (CERTIFICATE, certificate_text),
        "md": (MARKDOWN, render_markdown),
        "html": (HTML, render_html),
        "junit": (JUNIT, render_junit),
    }
    name, render = table[format_]
    return name, render(certificate)


def _write(certificate: dict[str, Any], format_: Format, folder: Path) -> list[Path]:
    """Write certificate, Markdown, HTML and manifest; JUnit too under `all`."""
    from invarlock.reporting.bundle import write_bundle

    extra = dict([_rendered(certificate, "junit")]) if format_ == "all" else {}
    files = list(write_bundle(certificate, folder).values())
    write_together(folder, extra)
    return [*files, *(folder / name for name in extra)]


@app.command()
def explain(certificate: _Certificate) -> None:
    """Say in plain words what each gate measured, against what, and what to do next."""
    from invarlock.reporting.explain import explain as explanation

    say(explanation(_read(certificate)))


@app.command()
def html(
    certificate: _Certificate,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to write; default: beside it.")] = None,
) -> None:
    """Write the certificate as one HTML page that stands alone."""
    from invarlock.core.files import write_whole
    from invarlock.reporting.bundle import HTML
    from invarlock.reporting.html import render_html

    folder = certificate if certificate.is_dir() else certificate.parent
    target = output or folder / HTML
    write_whole(target, render_html(_read(certificate)))
    say(str(target))


@app.command()
def validate(certificate: _Certificate) -> None:
    """Check the schema alone; `invarlock verify` re-derives the numbers too."""
    _read(certificate)
    say(f"{certificate} follows schema v1")


app.command("verify")(verify)
