"""Which limits apply: tier, then profile, then edit adjustments, then explicit overrides; the last word wins.

Tiers and profiles are packaged by version: those in force beside this package's data, earlier ones under
`tiers/<version>/` as they were. What a certificate recorded resolves again from its own version, in any later release
and environment.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from invarlock.core import settings
from invarlock.core.exceptions import ConfigError
from invarlock.core.reading import read_regular
from invarlock.core.registry import nearest
from invarlock.evidence.plain import canonical_digest
from invarlock.policy.limits import Limits

__all__ = [
    "PROFILES",
    "TIERS",
    "Policy",
    "ResolvedPolicy",
    "guard_defaults",
    "merge",
    "profile_values",
    "resolve_policy",
    "resolve_recorded",
]

_Values = dict[str, Any]

TIERS = ("conservative", "balanced", "aggressive")
PROFILES = ("dev", "ci", "ci_cpu", "release")
_PROFILE_ONLY = {"device"}
_PACKAGE = resources.files("invarlock.data")
#: the sample floors that INVARLOCK_TINY_RELAX sets, in the dev profile only; with tiers of version 4 and earlier also the
#: windows that are measured, since a floor was all that those counts were
_TINY: _Values = {
    "sample": {"min_tokens": 0, "shortfall": "warn"},
    "metrics": {"pm_tail": {"min_windows": 1}, "accuracy": {"min_examples": 1}},
}
_FLOORS_ALONE = 5  # the version of the tiers from which on it sets floors alone
#: variable -> the value of the policy that it sets; counts of windows in the ci profiles only
_ENVIRONMENT = {
    "INVARLOCK_CI_PREVIEW": ("sample", "preview"),
    "INVARLOCK_CI_FINAL": ("sample", "final"),
    "INVARLOCK_BOOTSTRAP_BCA": ("bootstrap", "bca"),
    "INVARLOCK_PM_ACCEPTANCE_MIN": ("metrics", "pm_ratio", "min"),
    "INVARLOCK_PM_ACCEPTANCE_MAX": ("metrics", "pm_ratio", "limit"),
}


@dataclass(frozen=True)
class Policy:
    """The policy in force and where it came from. `values` is what certificates call `resolved_policy`.

    `custom` holds the tier and the profile that stood in the place of the packaged ones (INVARLOCK_CONFIG_ROOT), so that
    the policy resolves again where these files are not. `tiers_digest` is over the values of the tier.
    """

    tier: str
    profile: str
    values: _Values
    overrides: _Values
    edit_adjustments: _Values
    tiers_version: int
    tiers_digest: str
    relaxed: bool
    custom: _Values = field(default_factory=dict)

    @functools.cached_property
    def limits(self) -> Limits:
        """The values, typed. Raises ConfigError where one is missing or of another type."""
        return _typed(self.values)

    @property
    def digest(self) -> str:
        """The first 16 hex digits of SHA-256 over the canonical JSON of {resolved_policy, overrides}."""
        return canonical_digest({"resolved_policy": self.values, "overrides": self.overrides})[:16]

    def provenance(self) -> _Values:
        """Return all that `resolve_recorded` needs to arrive here again."""
        facts = {
            "tier": self.tier,
            "profile": self.profile,
            "overrides": self.overrides,
            "edit_adjustments": self.edit_adjustments,
            "tiers_version": self.tiers_version,
            "tiers_digest": self.tiers_digest,
            "tiny_relax": self.relaxed,
        }
        return {**facts, "custom": self.custom} if self.custom else facts


ResolvedPolicy = Policy


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> _Values:
    """Return `base` with `over` laid on it: mappings merge key by key, everything else is replaced."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        out[key] = (
            merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else copy.deepcopy(value)
        )
    return out


def resolve_policy(
    tier: str = "balanced",
    profile: str = "ci",
    *,
    overrides: Mapping[str, Any] | None = None,
    edit_adjustments: Mapping[str, Any] | None = None,
    relaxed: bool | None = None,
) -> Policy:
    """Resolve the policy for a new measurement. `overrides` follows the shape of a tier; unknown sections and values of
    another type raise ConfigError.

    Tiers and profiles of one's own (INVARLOCK_CONFIG_ROOT) count. `relaxed` defaults to INVARLOCK_TINY_RELAX; left at its
    default, the other variables that touch the policy are read too and recorded as overrides, under explicit ones.
    """
    _known(tier, TIERS, "tier")
    own, given = _own("tiers.yaml"), profile_values(profile)
    version, tiers = _tiers(_packaged("tiers.yaml") if own is None else own)
    custom = {"tiers": {tier: tiers[tier]}, "profile": given}
    if _versioned(version, tier, profile) == (tiers[tier], given):
        custom = {}
    _check_keys(overrides or {}, tiers[tier])
    explicit = merge(_environment_overrides(profile) if relaxed is None else {}, overrides or {})
    chosen = settings.flag("INVARLOCK_TINY_RELAX") if relaxed is None else relaxed
    return _resolve(tier, profile, version, custom, explicit, edit_adjustments or {}, chosen)


def _check_keys(overrides: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    """Raise ConfigError for a limit or a guard's key that does not exist; the policy of a plugin guard is its own."""
    for section, groups in overrides.items():
        known = base.get(section)
        if not isinstance(groups, Mapping) or not isinstance(known, Mapping):
            continue
        for name, values in groups.items():
            if section != "guards":
                _known(name, tuple(known), f"key in {section}")
            if isinstance(values, Mapping) and isinstance(known.get(name), Mapping):
                for key in values:
                    _known(key, tuple(known[name]), f"key in {section}.{name}")


def resolve_recorded(provenance: Mapping[str, Any]) -> Policy:
    """Resolve again what `Policy.provenance` recorded, from the recorded version of tiers and profiles alone: nothing is
    read from the environment. Raises ConfigError where this release has no such version, or a fact is missing."""
    try:
        return _resolve(
            provenance["tier"],
            provenance["profile"],
            provenance["tiers_version"],
            provenance.get("custom", {}),
            provenance["overrides"],
            provenance["edit_adjustments"],
            provenance["tiny_relax"],
        )
    except KeyError as error:
        raise ConfigError(f"policy_provenance lacks {error}") from None
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"policy_provenance holds a value of another type: {error}") from None


def _resolve(
    tier: str,
    profile: str,
    version: int,
    custom: Mapping[str, Any],
    overrides: Mapping[str, Any],
    edit_adjustments: Mapping[str, Any],
    relaxed: bool,
) -> Policy:
    _known(tier, TIERS, "tier")
    _known(profile, PROFILES, "profile")
    found = (custom["tiers"][tier], custom["profile"]) if custom else _versioned(version, tier, profile)
    if found is None:
        raise ConfigError(f"the policy names tiers of version {version!r}, which this release does not have")
    base, given = found
    relaxed = bool(relaxed) and profile == "dev"
    for key in (*overrides, *edit_adjustments):
        _known(key, tuple(sorted(base)), "policy section")
    values = copy.deepcopy(base)
    measured = {key: value for key, value in given.items() if key not in _PROFILE_ONLY}
    tiny = merge(_TINY, {"sample": {"min_documents": 1}}) if "min_documents" in base["sample"] else _TINY
    if version < _FLOORS_ALONE:
        tiny = merge(tiny, {"sample": {"preview": 1, "final": 1}})
    for layer in (measured, tiny if relaxed else {}, edit_adjustments, overrides):
        values = merge(values, layer)
    _typed(values)
    return Policy(
        tier=tier,
        profile=profile,
        values=values,
        overrides=merge({}, overrides),
        edit_adjustments=merge({}, edit_adjustments),
        tiers_version=version,
        tiers_digest=canonical_digest({"version": version, "tiers": {tier: base}})[:16],
        relaxed=relaxed,
        custom=copy.deepcopy({"tiers": {tier: base}, "profile": given}) if custom else {},
    )


def _typed(values: _Values) -> Limits:
    try:
        return Limits.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"the policy has {where}: {first['input']!r}; expected another value: {first['msg']}"
        ) from None


def profile_values(profile: str) -> _Values:
    """Return what a profile sets, its `device` included."""
    name = f"profiles/{_known(profile, PROFILES, 'profile')}.yaml"
    own = _own(name)
    return copy.deepcopy(_packaged(name) if own is None else own)


def guard_defaults(guard: str) -> _Values:
    """Return the policy of a built-in guard where nothing else is asked for: that of the packaged balanced tier."""
    return copy.deepcopy(dict(_packaged("tiers.yaml")["tiers"]["balanced"]["guards"][guard]))


def _own(relative: str) -> _Values | None:
    """Return a file of one's own that stands in the place of a packaged one, None where there is none."""
    root = settings.get("INVARLOCK_CONFIG_ROOT")
    custom = Path(str(root)) / "runtime" / relative if root else None
    if custom is None or not custom.is_file():
        return None
    return _parse(read_regular(custom, "settings", f"a YAML file, {relative}"), relative)


@functools.cache
def _packaged(relative: str) -> _Values:
    return _parse(_PACKAGE.joinpath(relative).read_bytes(), relative)


def _versioned(version: object, tier: str, profile: str) -> tuple[_Values, _Values] | None:
    """Return the packaged values of a tier and a profile of that version, None where this release has none."""
    current, tiers = _tiers(_packaged("tiers.yaml"))
    folder = "" if version == current else f"tiers/{version:d}/" if isinstance(version, int) else "no such folder/"
    try:
        _, tiers = _tiers(_packaged(f"{folder}tiers.yaml"))
        return tiers[tier], _packaged(f"{folder}profiles/{profile}.yaml")
    except FileNotFoundError:
        return None


def _tiers(document: _Values) -> tuple[int, _Values]:
    """Return the version and the tiers of a document. Raises ConfigError where one of them is missing."""
    version, tiers = document.get("version"), document.get("tiers")
    if type(version) is not int or not isinstance(tiers, dict) or not set(TIERS) <= tiers.keys():
        raise ConfigError(f"tiers.yaml has no whole number 'version' and no tiers {', '.join(TIERS)} below 'tiers'")
    return version, tiers


def _parse(text: bytes, what: str) -> _Values:
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{what} holds {type(data).__name__}; expected a mapping")
    return data


def _known(name: str, known: tuple[str, ...], what: str) -> str:
    if name not in known:
        raise ConfigError(f"unknown {what} {name!r}{nearest(name, known)}; expected one of: {', '.join(known)}")
    return name


def _environment_overrides(profile: str) -> _Values:
    """Return what environment variables ask of the policy, in the shape of explicit overrides."""
    found: _Values = {}
    for name, path in _ENVIRONMENT.items():
        value = settings.get(name)
        said = value is not None and value is not True  # BCa is on where nothing is said
        if said and (path[0] != "sample" or profile.startswith("ci")):
            layer: Any = value
            for key in reversed(path):
                layer = {key: layer}
            found = merge(found, layer)
    return found
