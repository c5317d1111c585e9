"""No guard decides by a number that the policy does not show."""

from __future__ import annotations

import pytest

from invarlock.guards import InvariantsGuard, RMTGuard, SpectralGuard, VarianceGuard
from invarlock.policy.resolve import TIERS, resolve_policy

GUARDS = (InvariantsGuard, SpectralGuard, RMTGuard, VarianceGuard)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_every_policy_key_of_a_guard_stands_in_every_tier(guard: type, tier: str) -> None:
    shown = resolve_policy(tier).values["guards"][guard.name]
    expected = set(guard.defaults) - {"intent"}  # the request's, not the tier's
    assert set(shown) == expected


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_the_guards_own_defaults_are_the_balanced_tier(guard: type) -> None:
    shown = resolve_policy("balanced").values["guards"][guard.name]
    assert shown == {key: value for key, value in guard.defaults.items() if key != "intent"}
