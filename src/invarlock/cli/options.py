"""Options that several commands share, so that they read and behave the same everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer
from typer import Option
from typer.core import TyperGroup

__all__ = [
    "BaselineEngineOption",
    "DeviceOption",
    "EngineOption",
    "IntentOption",
    "JsonOption",
    "NoCacheOption",
    "Profile",
    "ProfileOption",
    "Tier",
    "TierOption",
    "TimingOption",
    "plain_typer",
    "remember_profile",
    "remembered_profile",
]

Profile = Literal["dev", "ci", "ci_cpu", "release"]
Tier = Literal["conservative", "balanced", "aggressive"]


def plain_typer(
    *, cls: type[TyperGroup] = TyperGroup, no_args_is_help: bool = False, completion: bool = False
) -> typer.Typer:
    """Return a Typer whose help is plain text and whose errors are left to `cli.app`; for groups of commands."""
    names = {"help_option_names": ["-h", "--help"]}
    made = typer.Typer(
        cls=cls,
        no_args_is_help=no_args_is_help,
        rich_markup_mode=None,
        add_completion=completion,
        context_settings=names,
    )
    made.pretty_exceptions_enable = False
    return made


_PROFILE = "invarlock.profile"
#: the profile of a command that was given none, where it is not ci
_DEFAULT_PROFILES = {"run": "dev", "null-sweep": "dev", "ve-sweep": "dev"}


def _remember(context: typer.Context, value: str | None) -> str | None:
    context.meta[_PROFILE] = value or _DEFAULT_PROFILES.get(str(context.info_name))
    return value


def remember_profile(context: typer.Context, profile: str | None) -> None:
    """Say which profile is in effect, where it comes from elsewhere than --profile."""
    context.meta[_PROFILE] = profile


def remembered_profile(meta: Mapping[str, Any]) -> str | None:
    """Return the profile in effect, None for the usual ci: the exit code of a pairing error depends on it."""
    profile: str | None = meta.get(_PROFILE)
    return profile


ProfileOption = Annotated[
    Profile | None, Option(callback=_remember, help="How much is measured, and what is a hard stop.")
]
TierOption = Annotated[Tier | None, Option(help="How strict the limits are.")]
DeviceOption = Annotated[str | None, Option(help="auto, cpu, cuda, cuda:N or mps.")]
TimingOption = Annotated[bool, Option("--timing", help="Print how long each step took.")]
JsonOption = Annotated[bool, Option("--json", help="Print one JSON object on one line.")]
IntentOption = Annotated[
    str,
    Option(
        help="preserve; finetune: meant to differ; restructure: built differently, meant to do the same; "
        "engine: the same weights served in another way, judged by behaviour alone."
    ),
]
EngineOption = Annotated[
    str | None, Option(help="A served engine that scores the subject: vllm=http://127.0.0.1:8000, or openai=...")
]
BaselineEngineOption = Annotated[str | None, Option(help="The same for the baseline.")]
NoCacheOption = Annotated[bool, Option("--no-cache", help="Measure the baseline even if it was measured before.")]
