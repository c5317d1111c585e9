"""`invarlock doctor`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from typer import Option

from invarlock.cli.console import emit_json, say
from invarlock.cli.options import JsonOption, ProfileOption, TierOption
from invarlock.flow.doctor import Request, examine

__all__ = ["doctor"]


def doctor(
    config: Annotated[Path | None, Option("--config", "-c", help="Check this configuration too.")] = None,
    profile: ProfileOption = None,
    tier: TierOption = None,
    baseline_report: Annotated[Path | None, Option(help="A run folder or report.json to compare against.")] = None,
    subject_report: Annotated[Path | None, Option(help="The report that would be compared with it.")] = None,
    strict: Annotated[bool, Option("--strict", help="Warnings fail too.")] = False,
    json: JsonOption = False,
) -> int:
    """Check the environment, a configuration and stored reports.

    Ends with 1 where there is an ERROR, or, under --strict, a WARNING.
    """
    found = examine(Request(config, profile, tier, baseline_report, subject_report))
    counts = {level: sum(finding.level == level for finding in found) for level in ("ERROR", "WARNING", "NOTE")}
    code = 1 if counts["ERROR"] or (strict and counts["WARNING"]) else 0
    if json:
        emit_json(
            format_version="doctor-v1",
            component="doctor",
            summary={level.lower(): count for level, count in counts.items()},
            findings=[{"code": item.code, "level": item.level, "message": item.message} for item in found],
            resolution={"exit_code": code},
            ts=time.time(),
        )
        return code
    for finding in found:
        say(finding.line())
    say(", ".join(f"{count} {level.lower()}{'' if count == 1 else 's'}" for level, count in counts.items()))
    return code
