"""Which limits apply: explicit over edit adjustments over profile over tier."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import rfc8785

from invarlock.core.exceptions import ConfigError
from invarlock.evidence.plain import canonical_digest
from invarlock.policy import resolve
from invarlock.policy.resolve import (
    PROFILES,
    TIERS,
    guard_defaults,
    profile_values,
    resolve_policy,
    resolve_recorded,
)

#: version of the tiers -> digest of all tiers and profiles. A number that changes needs a new version, and the files of
#: the one before under `data/tiers/<version>/`, so that certificates made under it still verify.
ISSUED = {3: "2c03995ec072b8c9", 4: "28a61dff5d47ea92"}


def _limit(**layers: Any) -> float:
    return float(resolve_policy("balanced", "ci", **layers).values["metrics"]["pm_ratio"]["limit"])


def test_the_last_word_wins() -> None:
    def layer(limit: float) -> dict[str, Any]:
        return {"metrics": {"pm_ratio": {"limit": limit}}}

    assert _limit() == 1.10
    assert _limit(edit_adjustments=layer(1.3)) == 1.3
    assert _limit(edit_adjustments=layer(1.3), overrides=layer(1.4)) == 1.4


@pytest.mark.parametrize(
    ("tier", "limit", "q95", "kl", "flips", "floor", "deadband", "caps"),
    [
        ("conservative", 1.05, 0.12, 0.05, 0.10, -0.5, 0.05, 3),
        ("balanced", 1.10, 0.20, 0.10, 0.15, -1.0, 0.10, 5),
        ("aggressive", 1.20, 0.30, 0.20, 0.25, -2.0, 0.15, 8),
    ],
)
def test_tiers_hold_the_figures_of_the_contract(
    tier: str, limit: float, q95: float, kl: float, flips: float, floor: float, deadband: float, caps: int
) -> None:
    values = resolve_policy(tier, "ci").values
    metrics, spectral = values["metrics"], values["guards"]["spectral"]
    assert (metrics["pm_ratio"]["limit"], metrics["pm_tail"]["quantile_max"]) == (limit, q95)
    assert (metrics["divergence"]["kl_max"], metrics["divergence"]["flip_max"]) == (kl, flips)
    assert metrics["accuracy"]["floor_pp"] == floor
    assert (spectral["deadband"], spectral["max_caps"]) == (deadband, caps)
    assert metrics["pm_ratio"]["hysteresis"] == 0.002


@pytest.mark.parametrize(
    ("profile", "windows", "replicates", "shortfall"),
    [
        ("dev", 32, None, "warn"),
        ("ci", 200, 1200, "stop"),
        ("ci_cpu", 120, None, "stop"),
        ("release", 400, 3200, "stop"),
    ],
)
def test_profiles_stand_in_place_of_the_tiers_samples(
    profile: str, windows: int, replicates: int | None, shortfall: str
) -> None:
    values = resolve_policy("conservative", profile).values
    assert (values["sample"]["preview"], values["sample"]["final"]) == (windows, windows)
    assert values["sample"]["shortfall"] == shortfall
    assert replicates is None or values["bootstrap"]["replicates"] == replicates
    assert values["metrics"]["guard_overhead"]["required"] == (profile == "release")
    assert profile != "ci_cpu" or (profile_values(profile)["device"], values["sample"]["min_tokens"]) == ("cpu", 25000)
    assert "device" not in values


def test_the_digest_is_over_the_policy_and_the_overrides() -> None:
    policy = resolve_policy("balanced", "ci", overrides={"bootstrap": {"seed": 7}})
    content = {"resolved_policy": policy.values, "overrides": {"bootstrap": {"seed": 7}}}
    assert policy.digest == hashlib.sha256(rfc8785.dumps(content)).hexdigest()[:16]
    digests = {resolve_policy(tier, profile).digest for tier in TIERS for profile in PROFILES}
    assert len(digests) == len(TIERS) * len(PROFILES)
    assert resolve_policy().digest == resolve_policy().digest


def test_provenance_is_enough_to_arrive_here_again() -> None:
    policy = resolve_policy(
        "aggressive",
        "dev",
        overrides={"sample": {"preview": 3}},
        edit_adjustments={"sample": {"final": 4}},
        relaxed=True,
    )
    assert resolve_recorded(policy.provenance()) == policy


def test_what_was_recorded_resolves_again_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = {tier: resolve_policy(tier, "ci") for tier in TIERS}
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "tiers.yaml").write_text("version: 1\ntiers: {}\n")
    monkeypatch.setenv("INVARLOCK_CONFIG_ROOT", str(tmp_path))
    monkeypatch.setenv("INVARLOCK_CI_PREVIEW", "7")
    monkeypatch.setenv("INVARLOCK_TINY_RELAX", "1")
    for policy in recorded.values():
        assert resolve_recorded(policy.provenance()) == policy
    with pytest.raises(ConfigError, match="no tiers conservative, balanced, aggressive"):
        resolve_policy()


@pytest.mark.parametrize("version", ISSUED)
def test_the_tiers_and_profiles_of_a_release_stay_as_they_were(version: int) -> None:
    asked: dict[str, Any] = {"tiers_version": version, "overrides": {}, "edit_adjustments": {}, "tiny_relax": False}
    recorded = [resolve_recorded({**asked, "tier": t, "profile": p}).values for t in TIERS for p in PROFILES]
    assert ISSUED[version] == canonical_digest(recorded)[:16]
    assert resolve_policy().tiers_version > version


@pytest.mark.parametrize("name", ["invariants", "spectral", "rmt", "variance"])
def test_the_defaults_of_a_guard_are_those_of_the_balanced_tier(name: str) -> None:
    assert guard_defaults(name) == resolve_policy("balanced").values["guards"][name]
    guard_defaults(name).clear()
    assert guard_defaults(name)


def test_limits_are_typed_and_a_wrong_one_is_named() -> None:
    limits = resolve_policy("conservative", "release").limits
    assert (limits.ratio.limit, limits.sample.preview, limits.overhead.required) == (1.05, 400, True)
    assert limits.order[0] == "invariants"
    with pytest.raises(ConfigError, match="metrics.divergence.kl_max: 'a lot'; expected another value"):
        resolve_policy(overrides={"metrics": {"divergence": {"kl_max": "a lot"}}})
    off = resolve_policy(overrides={"metrics": {"divergence": {"mode": False}}})  # how YAML reads `mode: off`
    assert off.limits.divergence.mode == "off"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"metrics": {"pm_ratio": {"limt": 1.2}}}, "metrics.pm_ratio 'limt' (did you mean 'limit'"),
        ({"metrics": {"pm_rato": {"limit": 1.2}}}, "key in metrics 'pm_rato' (did you mean 'pm_ratio'"),
        ({"sample": {"previw": 4}}, "key in sample 'previw' (did you mean 'preview'"),
        ({"guards": {"spectral": {"deadbnd": 0.1}}}, "guards.spectral 'deadbnd' (did you mean 'deadband'"),
    ],
)
def test_overrides_from_python_are_held_to_the_keys_that_there_are(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        resolve_policy(overrides=overrides)


def test_tiny_relax_counts_in_the_dev_profile_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVARLOCK_TINY_RELAX", "1")
    sample = resolve_policy("balanced", "dev").values["sample"]
    assert (sample["min_tokens"], sample["min_documents"]) == (0, 1)
    assert (sample["preview"], sample["final"]) == (32, 32)  # floors are lowered, never the windows asked for
    assert resolve_policy("balanced", "dev").relaxed
    for profile in ("ci", "ci_cpu", "release"):
        policy = resolve_policy("balanced", profile)
        assert not policy.relaxed and policy.values["sample"]["preview"] > 1


def test_the_environment_sets_the_windows_of_the_ci_profiles_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVARLOCK_CI_PREVIEW", "11")
    monkeypatch.setenv("INVARLOCK_CI_FINAL", "12")
    shown = {
        p: tuple(resolve_policy("balanced", p).values["sample"][k] for k in ("preview", "final")) for p in PROFILES
    }
    assert shown == {"dev": (32, 32), "ci": (11, 12), "ci_cpu": (11, 12), "release": (400, 400)}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"tier": "balansed"}, "balanced"),
        ({"profile": "relase"}, "release"),
        ({"overrides": {"metric": {}}}, "metrics"),
        ({"edit_adjustments": {"guard": {}}}, "guards"),
    ],
)
def test_unknown_names_suggest_the_nearest(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        resolve_policy(**arguments)


def test_a_folder_of_ones_own_replaces_the_packaged_tiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = resolve._PACKAGE.joinpath("tiers.yaml").read_text()
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "tiers.yaml").write_text(packaged.replace("limit: 1.10", "limit: 1.17"))
    before = resolve_policy()
    monkeypatch.setenv("INVARLOCK_CONFIG_ROOT", str(tmp_path))
    after = resolve_policy()
    assert after.values["metrics"]["pm_ratio"]["limit"] == 1.17
    assert after.tiers_digest != before.tiers_digest and after.digest != before.digest
    assert (before.custom, set(after.custom)) == ({}, {"tiers", "profile"})
    assert set(after.custom["tiers"]) == {"balanced"}
    assert resolve_policy("conservative").custom == {}  # what was changed is not in it
    monkeypatch.delenv("INVARLOCK_CONFIG_ROOT")
    assert resolve_recorded(after.provenance()) == after


def test_resolving_leaves_its_arguments_and_the_packaged_values_alone() -> None:
    given = {"guards": {"rmt": {"epsilon": {"ffn": 0.5}}}}
    policy = resolve_policy(overrides=given)
    policy.values["guards"]["rmt"]["epsilon"]["ffn"] = 9
    assert given == {"guards": {"rmt": {"epsilon": {"ffn": 0.5}}}}
    assert resolve_policy().values["guards"]["rmt"]["epsilon"]["ffn"] != 9
