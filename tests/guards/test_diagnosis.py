"""What is said of a change: by role and layer, with how many tensors changed, and uniform where all of a family did."""

from __future__ import annotations

from typing import Any

from invarlock.guards.diagnosis import diagnose_by_role


def _rows(changes: dict[str, float]) -> list[dict[str, Any]]:
    """Four layers of attention and feed-forward matrices, with the relative changes of those that are named."""
    rows = []
    for layer in range(4):
        for role, family in (("attn.q_proj", "attn"), ("attn.o_proj", "attn"), ("mlp.up", "ffn"), ("mlp.down", "ffn")):
            name = f"model.layers.{layer}.{role}.weight"
            size = next((value for part, value in changes.items() if part in name), 0.0)
            figures = {"rel_change": size, "cosine": 1 - size**2 / 2, "norm_ratio": 1.0}
            rows.append({"name": name, "family": family, **figures})
    return rows


def test_a_change_of_every_tensor_of_a_family_is_uniform() -> None:
    found = diagnose_by_role(_rows({"attn": 0.1}))
    assert found.uniform and found.text == "uniform: 8 of 16 tensors (attn), relative change 0.1"


def test_a_change_of_some_is_told_by_role_and_not_as_uniform() -> None:
    found = diagnose_by_role(_rows({"attn": 0.1, "1.mlp": 0.1, "2.mlp": 0.1, "3.mlp": 0.12}))
    assert not found.uniform and found.named == []
    assert found.text == (
        "changed: attn.q_proj.weight (4 of 4), attn.o_proj.weight (4 of 4), mlp.up.weight (3 of 4), "
        "mlp.down.weight (3 of 4), relative change 0.1 to 0.1; 14 of 16 tensors changed, 2 are as they were"
    )


def test_what_stands_out_is_counted() -> None:
    found = diagnose_by_role(_rows({"2.mlp.up": 0.3}))
    assert [row["name"] for row in found.named] == ["model.layers.2.mlp.up.weight"]
    assert found.text.endswith("; 1 of 16 tensors changed, 15 are as they were")


def test_nothing_changed_stays_said() -> None:
    assert diagnose_by_role(_rows({})).text == "no tensor changed"


def test_what_the_values_told_is_said_instead_of_what_sketches_show() -> None:
    rounding, update = "4-bit rounding in groups of 32, symmetric", "rank-8 update"
    every = [{**row, "operation": rounding} if row["rel_change"] else row for row in _rows({"attn": 0.1})]
    found = diagnose_by_role(every)
    assert found.uniform and found.text == f"uniform: 8 of 16 tensors (attn), relative change 0.1: {rounding}"
    some = [
        {**row, "operation": update} if row["rel_change"] else row for row in _rows({"q_proj": 0.1, "2.mlp.up": 0.1})
    ]
    found = diagnose_by_role(some)
    assert found.text.startswith(
        f"changed alike in every layer: all attn.q_proj.weight (4 tensors): {update}; also model.layers.2.mlp.up.weight"
    )
    assert {row["name"] for row in found.named} == {row["name"] for row in some if row["rel_change"]}
