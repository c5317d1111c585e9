"""`invarlock report`: show certificates and runs, in whatever form the reader needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from invarlock.cli.console import say
from invarlock.cli.options import plain_typer

__all__ = ["app"]

app = plain_typer(no_args_is_help=True)
_Certificate = Annotated[Path, typer.Argument(metavar="CERT", help="A certificate file, or its folder.")]


def _read(path: Path) -> dict[str, Any]:
    from invarlock.certificate.verify import validate_certificate
    from invarlock.core.files import read_json
    from invarlock.reporting.bundle import CERTIFICATE

    target = path / CERTIFICATE if path.is_dir() else path
    certificate: dict[str, Any] = read_json(target, f"a certificate such as {CERTIFICATE}")
    validate_certificate(certificate)
    return certificate


@app.callback()
def _report() -> None:
    """Show certificates and runs."""


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
