"""Tell GitHub what a certification said: annotations, job summary, step outputs. Standard library only.

    python tools/annotate.py FOLDER EXIT_CODE

FOLDER holds `certificate/` (where one was made) and `stderr.txt`, as the action's certify step leaves them. Always exits
0: the verdict is another step's business.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["main", "workflow_commands"]

_LEVELS = {"fail": "error", "inconclusive": "warning", "not_evaluated": "warning", "warn": "warning"}
_MOST_BYTES = 1_000_000  # GitHub drops a larger summary


def _line(level: str, title: str, message: str) -> str:
    """Return a workflow command; line breaks and the characters that delimit its parts are escaped."""
    for sign, code in (("%", "%25"), ("\r", "%0D"), ("\n", "%0A")):
        title, message = title.replace(sign, code), message.replace(sign, code)
    title = title.replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={title}::{message}"


def workflow_commands(certificate: dict[str, Any]) -> Iterator[str]:
    """Yield a workflow command for the verdict's reasons and for every other gate that did not simply pass."""
    verdict = certificate["verdict"]
    level = "error" if verdict["status"] == "FAIL" else "warning"
    for reason in verdict["reasons"]:
        place = f" ({reason['tensor']})" if reason.get("tensor") and reason["tensor"] not in reason["message"] else ""
        yield _line(level, f"InvarLock {verdict['status']}: {reason['code']}", reason["message"] + place)
    told = {reason["gate"] for reason in verdict["reasons"]}
    for gate in certificate["gates"]:
        if gate["decision"] in _LEVELS and gate["name"] not in told:
            yield _line("warning", f"InvarLock: {gate['name']}", gate["reason"])
    if verdict["status"] == "PASS":
        ratio = certificate["primary_metric"]["ratio_vs_baseline"]
        yield _line("notice", "InvarLock PASS", f"ratio to the baseline {ratio}")


def _append(variable: str, text: str) -> None:
    path = os.environ.get(variable)
    if path:
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(text)


def main(folder: Path, exit_code: str) -> int:
    """Write annotations to standard output, the summary and the outputs to the files that GitHub names."""
    file = folder / "certificate" / "evaluation.cert.json"
    if not file.is_file():
        log = folder / "stderr.txt"
        lines = [
            line for line in (log.read_text(encoding="utf-8") if log.is_file() else "").splitlines() if line.strip()
        ]
        message = lines[-1] if lines else f"certify ended with exit code {exit_code} and said nothing"
        print(_line("error", "InvarLock made no certificate", message))
        _append("GITHUB_OUTPUT", "verdict=ERROR\ncertificate=\n")
        _append("GITHUB_STEP_SUMMARY", f"## InvarLock made no certificate\n\nExit code {exit_code}.\n\n    {message}\n")
        return 0
    certificate = json.loads(file.read_text(encoding="utf-8"))
    for line in workflow_commands(certificate):
        print(line)
    _append("GITHUB_OUTPUT", f"verdict={certificate['verdict']['status']}\ncertificate={file}\n")
    summary = (file.parent / "evaluation_certificate.md").read_text(encoding="utf-8")
    if len(summary.encode()) > _MOST_BYTES:
        summary = f"# InvarLock certificate: {certificate['verdict']['status']}\n\nThe artifact holds the whole.\n"
    _append("GITHUB_STEP_SUMMARY", summary + "\n")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("expected two arguments: FOLDER EXIT_CODE")
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2]))
