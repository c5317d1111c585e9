"""The files of a finished certification: certificate, Markdown, HTML and a manifest with their digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from invarlock.core.files import write_together
from invarlock.reporting.html import render_html
from invarlock.reporting.markdown import render_markdown

__all__ = ["CERTIFICATE", "HTML", "MANIFEST", "MARKDOWN", "certificate_text", "write_bundle"]

CERTIFICATE = "evaluation.cert.json"
MARKDOWN = "evaluation_certificate.md"
HTML = "evaluation.html"
MANIFEST = "manifest.json"


def certificate_text(certificate: Mapping[str, Any]) -> str:
    """Return the certificate as it is stored: strict JSON, keys in the schema's order."""
    return json.dumps(certificate, allow_nan=False, ensure_ascii=False, indent=1) + "\n"


def write_bundle(certificate: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Write all four files into `folder`, none under its name before all are complete. Returns name -> path."""
    files = {
        CERTIFICATE: certificate_text(certificate),
        MARKDOWN: render_markdown(certificate),
        HTML: render_html(certificate),
    }
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
