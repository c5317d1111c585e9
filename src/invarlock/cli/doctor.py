"""`invarlock doctor`."""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from invarlock.assurance.certification import request_of
from invarlock.cli.certify import arguments, certify
from invarlock.cli.console import emit_json, say
from invarlock.cli.options import JsonOption, ProfileOption, TierOption
from invarlock.flow.certify import CertifyRequest
from invarlock.flow.doctor import Request, examine

__all__ = ["doctor"]

#: options of `certify` that name what is certified: with any of them the certification is rehearsed
_CERTIFIED = ("subject", "baseline", "preset", "engine", "baseline_engine")


def doctor(
    config: Annotated[Path | None, Option("--config", "-c", help="Check this configuration of a run too.")] = None,
    profile: ProfileOption = None,
    tier: TierOption = None,
    baseline_report: Annotated[Path | None, Option(help="A run folder or report.json to compare against.")] = None,
    subject_report: Annotated[Path | None, Option(help="The report that would be compared with it.")] = None,
    strict: Annotated[bool, Option("--strict", help="Warnings fail too.")] = False,
    json: JsonOption = False,
    **certified: Any,
) -> int:
    """Check the environment, a configuration, stored reports, or what `certify` is to be asked for.

    With the options of `certify` it looks, before anything is measured, at both checkpoints, their tokenizers, the text,
    memory and disk, the output folders, and an engine that is named. No tensor is read.

    Ends with 1 where there is an ERROR, or, under --strict, a WARNING.
    """
    same = {"profile": profile, "tier": tier, "baseline_report": baseline_report, "json": json, **certified}
    same["subject"] = "" if certified["subject"] is None else certified["subject"] or " "  # an empty one is refused
    asked, output = arguments(**same)
    rehearsed = any(certified[name] is not None for name in _CERTIFIED)

    def certification() -> CertifyRequest:
        return request_of({"dataset": None, **asked})

    request = Request(config, profile, tier, baseline_report, subject_report)
    if rehearsed:
        request = request._replace(certification=certification, output=output)
    found = examine(request)
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


def _with_those_of_certify() -> inspect.Signature:
    """Return the options of `certify`, none of which is required here, and those of `doctor` after them."""
    theirs = inspect.signature(certify, eval_str=True).parameters
    ours = inspect.signature(doctor, eval_str=True).parameters
    optional = theirs["subject"].replace(default=None, annotation=_optional(theirs["subject"].annotation))
    named = {**theirs, "subject": optional, **{name: item for name, item in ours.items() if name != "certified"}}
    return inspect.Signature([item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in named.values()])


def _optional(annotation: Any) -> Any:
    return Annotated[str | None, *annotation.__metadata__]


doctor.__signature__ = _with_those_of_certify()  # type: ignore[attr-defined]  # what typer reads
