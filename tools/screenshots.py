"""Take pictures of a certificate's page: `python tools/screenshots.py CERT... -o FOLDER`.

Each page is drawn by Chromium without a network at 375 and 1280 pixels, light and dark, and printed to PDF. Needs
`chromium` (or CHROMIUM=/path/to/it) on this machine.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["DARK", "QUIET", "browser", "main", "picture"]

QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars")
DARK = ("--blink-settings=preferredColorScheme=0",)
_WIDTHS = {"phone": 375, "desk": 1280}


def browser() -> str | None:
    """Return the Chromium of this machine, None where there is none."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


def picture(page: Path, target: Path, *, width: int = 1280, height: int = 2400, dark: bool = False) -> None:
    """Draw a page into `target`, a .png or a .pdf."""
    program = browser()
    if program is None:
        raise SystemExit("no chromium on this machine; install it or set CHROMIUM")
    how = f"--print-to-pdf={target}" if target.suffix == ".pdf" else f"--screenshot={target}"
    with tempfile.TemporaryDirectory() as profile:
        command = [
            program,
            *QUIET,
            *(DARK if dark else ()),
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
            how,
        ]
        subprocess.run([*command, page.resolve().as_uri()], check=True, capture_output=True, timeout=180)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the pages of certificates."""
    from invarlock.reporting.bundle import read_certificate
    from invarlock.reporting.html import render_html

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("certificates", nargs="+", type=Path)
    parser.add_argument("--readme", type=Path, help="write only the picture of the README, of the first certificate")
    parser.add_argument("-o", "--output", type=Path, default=Path("screenshots"))
    chosen = parser.parse_args(arguments)
    if chosen.readme:
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "page.html"
            page.write_text(render_html(read_certificate(chosen.certificates[0])), encoding="utf-8")
            picture(page, chosen.readme, width=1100, height=1160)
        return 0
    chosen.output.mkdir(parents=True, exist_ok=True)
    for path in chosen.certificates:
        name = path.parent.name if path.name == "evaluation.cert.json" else path.stem
        page = chosen.output / f"{name}.html"
        page.write_text(render_html(read_certificate(path)), encoding="utf-8")
        for label, width in _WIDTHS.items():
            for scheme in ("light", "dark"):
                target = chosen.output / f"{name}-{label}-{scheme}.png"
                picture(page, target, width=width, dark=scheme == "dark")
                print(target)
        picture(page, page.with_suffix(".pdf"))
        print(page.with_suffix(".pdf"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
