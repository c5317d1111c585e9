"""Layers and experts of a pruned model are found again by what they hold."""

from __future__ import annotations

import torch

from invarlock.guards.pairing import renamed, renumbered
from invarlock.guards.sketch import sketch_stack

NAMES = ("attn.q_proj.weight", "mlp.up_proj.weight", "norm.weight")


def _sketches(layers: list[int], experts: list[int] = [0, 1, 2], noise: float = 0.0) -> dict[str, str]:  # noqa: B006
    """A model whose layers and experts hold what those of the given numbers hold."""

    def drawn(seed: int, *shape: int) -> torch.Tensor:
        extra = torch.randn(shape, generator=torch.Generator().manual_seed(9000 + seed))
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + noise * extra

    found: dict[str, str] = {}
    for place, layer in enumerate(layers):
        for part, name in enumerate(NAMES):
            tensor = drawn(100 * layer + part, 24) if "norm" in name else drawn(100 * layer + part, 24, 32)
            found |= dict(sketch_stack(tensor, f"model.layers.{place}.{name}"))
        stack = torch.stack([drawn(100 * layer + 50 + expert, 24, 32) for expert in experts])
        found |= dict(sketch_stack(stack, f"model.layers.{place}.mlp.experts.down_proj"))
    return found


def test_layers_behind_a_dropped_one_are_found_under_their_old_numbers() -> None:
    names = renumbered(_sketches([0, 1, 2, 3]), _sketches([0, 2, 3], noise=0.1))
    assert names == {"model.layers.1.": "model.layers.2.", "model.layers.2.": "model.layers.3."}
    assert renamed("model.layers.2.attn.q_proj", names) == "model.layers.3.attn.q_proj"
    assert renamed({"model.layers.1": [{"name": "model.layers.12.x"}]}, names) == {
        "model.layers.2": [{"name": "model.layers.12.x"}]
    }


def test_experts_behind_a_dropped_one_are_found_too() -> None:
    names = renumbered(_sketches([0, 1, 2]), _sketches([0, 2], experts=[0, 2]))
    stack = "model.layers.1.mlp.experts.down_proj"
    assert renamed(f"{stack}[1]", names) == "model.layers.2.mlp.experts.down_proj[2]"
    assert renamed("model.layers.0.mlp.experts.down_proj[1]", names) == "model.layers.0.mlp.experts.down_proj[2]"


def test_the_same_depth_or_layers_out_of_order_rename_nothing() -> None:
    whole = _sketches([0, 1, 2, 3])
    assert renumbered(whole, _sketches([1, 0, 2, 3])) == {}
    assert renumbered(whole, _sketches([2, 1, 3])) == {}
    assert renumbered(whole, _sketches([0, 7, 3])) == {}
