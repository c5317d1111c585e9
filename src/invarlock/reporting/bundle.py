"""The files of a certification: certificate, Markdown, HTML, JUnit where asked for, and a manifest with their digests.

Their folder belongs to one run at a time (`claimed`), and an earlier certificate leaves its place before anything is
measured, so that none is ever taken for the result of a run that ended in an error.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from invarlock.core.exceptions import ConfigError
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
    "EARLIER",
    "certificate_text",
    "claimed",
    "find_certificate",
    "folder_for",
    "read_certificate",
    "write_bundle",
]

CERTIFICATE = "evaluation.cert.json"
MARKDOWN = "evaluation_certificate.md"
HTML = "evaluation.html"
MANIFEST = "manifest.json"
EARLIER = "earlier"
_LOCK = ".invarlock.lock"


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


def folder_for(subject: str, label: str | None = None) -> Path:
    """Return the folder in which a subject's certificate goes where none was named: `reports/` and its name."""
    name = Path(subject).name if Path(subject).name not in ("", "..") else Path(subject).resolve().name
    return Path("reports") / "-".join(part.replace("/", "-") for part in (name or "subject", label) if part)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[Path | None]:
    """Hold the folder of a certificate while it is made, and move an earlier certificate out of its place first.

    Yields where that went, None where there was none. Raises ConfigError where the folder cannot be written, and, with
    the code FOLDER-IN-USE, where another run holds it.
    """
    new = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        why = f"the certificate's folder {folder} cannot be written ({error.strerror}); name another"
        raise ConfigError(why) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        who = f"another run is writing its certificate into {folder}"
        raise ConfigError(f"{who}; wait for it or name another folder", code="FOLDER-IN-USE") from None
    try:
        yield _set_aside(folder)
    finally:
        (folder / _LOCK).unlink(missing_ok=True)
        os.close(handle)
        for path in new:  # what was made for nothing goes away again
            with contextlib.suppress(OSError):
                path.rmdir()


def _set_aside(folder: Path) -> Path | None:
    names = [*(name for name, _ in FORMATS.values()), MANIFEST]
    old = [path for path in (folder / name for name in names) if path.is_file()]
    if not old:
        return None
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(max(path.stat().st_mtime for path in old)))
    number, place = 1, folder / EARLIER / stamp
    while place.exists():
        number += 1
        place = folder / EARLIER / f"{stamp}-{number}"
    place.mkdir(parents=True)
    for path in old:
        os.replace(path, place / path.name)
    return place


def find_certificate(path: Path) -> Path:
    """Return the certificate that `path` names: the file, or the one in the folder."""
    return path / CERTIFICATE if os.path.isdir(path) else path


def read_certificate(path: Path) -> dict[str, Any]:
    """Read the JSON of a certificate, a file or its folder; ConfigError where there is none. The schema is not checked."""
    certificate: dict[str, Any] = read_json(find_certificate(path), f"a certificate such as {CERTIFICATE}")
    return certificate
