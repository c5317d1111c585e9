"""The files of a certification: certificate, Markdown, HTML, JUnit where asked for, and a manifest with their digests."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from invarlock.core.files import read_json, write_together
from invarlock.reporting.html import render_html
from invarlock.reporting.junit import render_junit
from invarlock.reporting.markdown import render_markdown

__all__ = [
    "BUNDLE",
    "CERTIFICATE",
    "FORMATS",
    "HTML",
    "MANIFEST",
    "MARKDOWN",
    "certificate_text",
    "find_certificate",
    "read_certificate",
    "write_bundle",
]

CERTIFICATE = "evaluation.cert.json"
MARKDOWN = "evaluation_certificate.md"
HTML = "evaluation.html"
MANIFEST = "manifest.json"


def certificate_text(certificate: Mapping[str, Any]) -> str:
    """Return the certificate as it is stored: strict JSON, keys in the schema's order."""
    return json.dumps(certificate, allow_nan=False, ensure_ascii=False, indent=1) + "\n"


#: what a certificate can be shown as: the file's name, and how its text is made
FORMATS: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "json": (CERTIFICATE, certificate_text),
    "md": (MARKDOWN, render_markdown),
    "html": (HTML, render_html),
    "junit": ("evaluation.junit.xml", render_junit),
}
BUNDLE = ("json", "md", "html")


def write_bundle(certificate: Mapping[str, Any], folder: Path, formats: Sequence[str] = BUNDLE) -> dict[str, Path]:
    """Write the files and their manifest into `folder`, none under its name before all are complete. Returns name -> path."""
    files = {name: render(certificate) for name, render in map(FORMATS.__getitem__, formats)}
    manifest = {
        "format_version": "manifest-v1",
        "run_id": certificate["run_id"],
        "verdict": certificate["verdict"]["status"],
        "files": {
            name: {"sha256": hashlib.sha256(text.encode()).hexdigest(), "bytes": len(text.encode())}
            for name, text in files.items()
        },
    }
    files[MANIFEST] = json.dumps(manifest, indent=1) + "\n"
    write_together(folder, files)
    return {name: folder / name for name in files}


def find_certificate(path: Path) -> Path:
    """Return the certificate that `path` names: the file, or the one in the folder."""
    return path / CERTIFICATE if os.path.isdir(path) else path


def read_certificate(path: Path) -> dict[str, Any]:
    """Read the JSON of a certificate, a file or its folder; ConfigError where there is none. The schema is not checked."""
    certificate: dict[str, Any] = read_json(find_certificate(path), f"a certificate such as {CERTIFICATE}")
    return certificate
