"""Damage inside packed matrices has a direction or makes another matrix; rounding does neither."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from invarlock.guards.packing import inside, packing_findings
from invarlock.guards.sketch import sketch_tensor

SHAPES = {"a": (160, 432), "b": (432, 160), "c": (160, 160), "d": (512, 128)}
GROUP = 16
Change = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(*shape, generator=generator) * 0.02 for name, shape in SHAPES.items()}


def _rounded(weight: torch.Tensor, bits: int, change: Change | None = None) -> torch.Tensor:
    """Round in groups between the least and the largest weight; `change` damages codes, scales or zero points."""
    groups = weight.reshape(len(weight), -1, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    codes = (groups / scale + zero).round().clamp(0, 2**bits - 1)
    dense = (codes - zero) * scale if change is None else change(codes, zero, scale)
    return dense.reshape(weight.shape)


def _sketches(weights: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: sketch_tensor(weight, name) for name, weight in weights.items()}


def _judged(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> list[tuple[str, str]]:
    rows = inside(_sketches(old), _sketches(new), SHAPES)
    return [(finding["code"], str(finding["module"])) for finding in packing_findings(rows)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_to_any_number_of_bits_has_no_finding(bits: int) -> None:
    old = _weights()
    assert _judged(old, {name: _rounded(weight, bits) for name, weight in old.items()}) == []


def test_an_unchanged_and_a_smoothed_model_have_no_finding() -> None:
    old = _weights()
    assert inside(_sketches(old), _sketches(old), SHAPES) == []
    scales = torch.rand(1000, generator=torch.Generator().manual_seed(1)) + 0.5  # as AWQ folds them into the columns
    assert _judged(old, {name: _rounded(weight * scales[: weight.shape[1]], 4) for name, weight in old.items()}) == []


DAMAGE: dict[str, tuple[str, Change]] = {
    "zero points one too high": ("shift", lambda codes, zero, scale: (codes - zero - 1) * scale),
    "zero points one too low": ("shift", lambda codes, zero, scale: (codes - zero + 1) * scale),
    "every other zero point one off": (
        "shift",
        lambda codes, zero, scale: (codes - zero - torch.arange(zero.shape[1])[:, None] % 2) * scale,
    ),
    "sign of the scales": ("matrix", lambda codes, zero, scale: (zero - codes) * scale),
    "shuffled codes": ("matrix", lambda codes, zero, scale: (codes.flip(0) - zero.flip(0)) * scale),
}


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_inside_one_matrix_is_named(damage: str, bits: int) -> None:
    kind, change = DAMAGE[damage]
    old = _weights()
    new = {name: _rounded(weight, bits, change if name == "b" else None) for name, weight in old.items()}
    assert _judged(old, new) == [(f"spectral_packed_{kind}", "b")]


def test_a_layer_that_is_stored_the_other_way_round_is_looked_at_too() -> None:
    old = _weights()
    new = {name: _rounded(weight, 4, DAMAGE["zero points one too low"][1]) for name, weight in old.items()}
    turned = {name: (columns, rows) for name, (rows, columns) in SHAPES.items()}
    rows = inside(_sketches(old), _sketches(new), turned)
    assert {finding["module"] for finding in packing_findings(rows)} == set(SHAPES)


def test_what_is_not_finite_or_was_zero_is_left_to_other_checks() -> None:
    old = _weights()
    new = {name: _rounded(weight, 4) for name, weight in old.items()}
    new["a"][0, 0], old["c"] = float("nan"), torch.zeros(*SHAPES["c"])
    assert {row["name"] for row in inside(_sketches(old), _sketches(new), SHAPES)} == {"b", "d"}


LAYERS = {f"layers.{place}": (160, 160) for place in range(6)}


def _left(change: Change | None, bits: int = 4, alike: bool = True) -> list[tuple[str, str]]:
    """Round six matrices in groups, the last one with a change; judge what was left of each."""
    generator = torch.Generator().manual_seed(1)
    old = {name: torch.randn(*shape, generator=generator) * 0.02 for name, shape in LAYERS.items()}
    old = {name: weight * torch.rand(160, 10, 1, generator=generator).repeat(1, 1, GROUP).view(160, 160).add(0.5)
           for name, weight in old.items()}  # fmt: skip
    new = {name: _rounded(weight, bits, change if name == "layers.5" else None) for name, weight in old.items()}
    rows = inside(_sketches(old), _sketches(new), LAYERS, alike)
    return [(finding["code"], str(finding["module"])) for finding in packing_findings(rows)]


@pytest.mark.parametrize(
    "change",
    [
        lambda codes, zero, scale: (codes - zero) * scale.roll(1, 1),
        lambda codes, zero, scale: (codes - zero) * scale.flip(1),
        lambda codes, zero, scale: (
            ((codes - zero) * scale).roll(GROUP // 2, 2) * 0.1 + 0.9 * (codes - zero) * scale.roll(2, 1)
        ),
    ],
    ids=["the next group's scales", "scales in reverse", "an order that was not followed"],
)
def test_more_left_of_one_matrix_than_of_the_others_is_named_where_groups_are_alike(change: Change) -> None:
    assert _left(change) == [("spectral_packed_matrix", "layers.5")]
    assert _left(change, alike=False) == []


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_rounding_in_groups_leaves_has_no_finding(bits: int) -> None:
    assert _left(None, bits) == []
