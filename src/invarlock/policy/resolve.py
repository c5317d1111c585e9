"""Which limits apply: tier, then profile, then edit adjustments, then explicit overrides; the last word wins."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import rfc8785
import yaml

from invarlock.core import settings
from invarlock.core.exceptions import ConfigError
from invarlock.core.registry import nearest

__all__ = ["PROFILES", "TIERS", "ResolvedPolicy", "merge", "profile_values", "resolve_policy"]

TIERS = ("conservative", "balanced", "aggressive")
PROFILES = ("dev", "ci", "ci_cpu", "release")
_PROFILE_ONLY = {"device"}
#: the sample floors that INVARLOCK_TINY_RELAX sets, in the dev profile only
_TINY: dict[str, Any] = {
    "sample": {"preview": 1, "final": 1, "min_tokens": 0, "shortfall": "warn"},
    "metrics": {"pm_tail": {"min_windows": 1}, "accuracy": {"min_examples": 1}},
}
#: variable -> the value of the policy that it sets; counts of windows in the ci profiles only
_ENVIRONMENT = {
    "INVARLOCK_CI_PREVIEW": ("sample", "preview"),
    "INVARLOCK_CI_FINAL": ("sample", "final"),
    "INVARLOCK_BOOTSTRAP_BCA": ("bootstrap", "bca"),
    "INVARLOCK_PM_ACCEPTANCE_MIN": ("metrics", "pm_ratio", "min"),
    "INVARLOCK_PM_ACCEPTANCE_MAX": ("metrics", "pm_ratio", "limit"),
}


@dataclass(frozen=True)
class ResolvedPolicy:
    """The policy in force and where it came from. `values` is what certificates call `resolved_policy`."""

    tier: str
    profile: str
    values: dict[str, Any]
    overrides: dict[str, Any]
    edit_adjustments: dict[str, Any]
    tiers_version: int
    tiers_digest: str
    relaxed: bool

    @property
    def digest(self) -> str:
        """The first 16 hex digits of SHA-256 over the canonical JSON of {resolved_policy, overrides}."""
        content = {"resolved_policy": self.values, "overrides": self.overrides}
        return hashlib.sha256(rfc8785.dumps(content)).hexdigest()[:16]

    def provenance(self) -> dict[str, Any]:
        """Return all that `resolve_policy` needs to arrive here again."""
        return {
            "tier": self.tier,
            "profile": self.profile,
            "overrides": self.overrides,
            "edit_adjustments": self.edit_adjustments,
            "tiers_version": self.tiers_version,
            "tiers_digest": self.tiers_digest,
            "tiny_relax": self.relaxed,
        }


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` laid on it: mappings merge key by key, everything else is replaced."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        out[key] = (
            merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else copy.deepcopy(value)
        )
    return out


def _read(relative: str) -> str:
    root = settings.get("INVARLOCK_CONFIG_ROOT")
    if root:
        custom = Path(str(root)) / "runtime" / relative
        if custom.is_file():
            return custom.read_text(encoding="utf-8")
    return _packaged(relative)


@functools.cache
def _packaged(relative: str) -> str:
    return resources.files("invarlock.data").joinpath(relative).read_text(encoding="utf-8")


@functools.lru_cache(maxsize=16)
def _parse(text: str, what: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{what} holds {type(data).__name__}; expected a mapping")
    return data


def _known(name: str, known: tuple[str, ...], what: str) -> str:
    if name not in known:
        raise ConfigError(f"unknown {what} {name!r}{nearest(name, known)}; expected one of: {', '.join(known)}")
    return name


def profile_values(profile: str) -> dict[str, Any]:
    """Return what a profile sets, its `device` included."""
    return copy.deepcopy(_parse(_read(f"profiles/{_known(profile, PROFILES, 'profile')}.yaml"), f"profile {profile}"))


def _environment_overrides(profile: str) -> dict[str, Any]:
    """Return what environment variables ask of the policy, in the shape of explicit overrides."""
    found: dict[str, Any] = {}
    for name, path in _ENVIRONMENT.items():
        value = settings.get(name)
        said = value is not None and value is not True  # BCa is on where nothing is said
        if said and (path[0] != "sample" or profile.startswith("ci")):
            layer: Any = value
            for key in reversed(path):
                layer = {key: layer}
            found = merge(found, layer)
    return found


def resolve_policy(
    tier: str = "balanced",
    profile: str = "ci",
    *,
    overrides: Mapping[str, Any] | None = None,
    edit_adjustments: Mapping[str, Any] | None = None,
    relaxed: bool | None = None,
) -> ResolvedPolicy:
    """Resolve the policy. `overrides` follows the shape of a tier; unknown sections raise ConfigError.

    `relaxed` defaults to INVARLOCK_TINY_RELAX and counts in the dev profile only. Left at its default, the other
    variables that touch the policy are read too and recorded as overrides, under explicit ones; given, the environment
    is left alone, so that a recorded policy resolves alike anywhere.
    """
    text = _read("tiers.yaml")
    document = _parse(text, "tiers.yaml")
    values: dict[str, Any] = copy.deepcopy(document["tiers"][_known(tier, TIERS, "tier")])
    sections = set(values)
    chosen = {key: value for key, value in profile_values(profile).items() if key not in _PROFILE_ONLY}
    explicit = merge(_environment_overrides(profile) if relaxed is None else {}, overrides or {})
    adjusted = merge({}, edit_adjustments or {})
    for key in (*explicit, *adjusted):
        _known(key, tuple(sorted(sections)), "policy section")
    if relaxed is None:
        relaxed = settings.flag("INVARLOCK_TINY_RELAX")
    relaxed = bool(relaxed) and profile == "dev"
    for layer in (chosen, _TINY if relaxed else {}, adjusted, explicit):
        values = merge(values, layer)
    return ResolvedPolicy(
        tier=tier,
        profile=profile,
        values=values,
        overrides=explicit,
        edit_adjustments=adjusted,
        tiers_version=int(document["version"]),
        tiers_digest=hashlib.sha256(text.encode()).hexdigest()[:16],
        relaxed=relaxed,
    )
