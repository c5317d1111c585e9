from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from guards import faults  # noqa: E402
from invarlock.guards.sketch import (  # noqa: E402 - torch is needed first
    compare_all,
    compare_sketches,
    culprits,
    sketch_model,
    sketch_stack,
    sketch_tensor,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def named_after(model, damage, *, before=None):
    """Sketch, optionally edit everything, damage, sketch again; return what was named and what should have been."""
    baseline = sketch_model(model)
    with torch.no_grad():
        if before:
            before(model)
        expected = damage(model)
    return culprits(compare_all(baseline, sketch_model(model))), expected


def test_squared_norm_estimate_is_unbiased_against_theory() -> None:
    ratios = []
    for seed in range(60):
        matrix = normal(90, 70, seed=seed)
        change = 0.01 * normal(90, 70, seed=1000 + seed)
        row = compare_sketches(sketch_tensor(matrix, "w"), sketch_tensor(matrix + change, "w"))
        ratios.append(float(row["rel_change"]) / float(change.norm() / matrix.norm()))
    assert np.mean(np.square(ratios)) == pytest.approx(1.0, abs=0.06)
    # full rank 70: about sqrt(2 / 240) a side, two sides
    assert 0.05 < np.std(np.square(ratios)) < 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unchanged_tensor_gives_exactly_no_change(dtype: torch.dtype) -> None:
    matrix = normal(50, 30).to(dtype)
    same = compare_sketches(sketch_tensor(matrix, "w"), sketch_tensor(matrix.clone(), "w"))
    assert same["rel_change"] == 0.0
    assert same["cosine"] == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [(500,), (20,), (40, 60), (8, 3, 5)])
@pytest.mark.parametrize("factor", [8.0, 0.125, -1.0, 0.0])
def test_scaling_is_read_exactly(shape: tuple[int, ...], factor: float) -> None:
    tensor = normal(*shape)
    row = compare_sketches(sketch_tensor(tensor, "w"), sketch_tensor(factor * tensor, "w"))
    assert row["rel_change"] == pytest.approx(abs(factor - 1), rel=1e-5)
    assert row["norm_ratio"] == pytest.approx(abs(factor), rel=1e-5)
    assert row["cosine"] == pytest.approx(np.sign(factor), abs=1e-6)


def test_parts_of_a_large_matrix_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = normal(500, 30)
    whole = sketch_tensor(matrix, "w")
    monkeypatch.setattr("invarlock.guards.sketch._CHUNK", 1000)
    assert compare_sketches(whole, sketch_tensor(matrix, "w"))["rel_change"] < 1e-6


def test_values_that_are_not_finite_have_no_comparison() -> None:
    matrix = normal(20, 20)
    bad = matrix.clone()
    bad[0, 0] = math.nan
    row = compare_sketches(sketch_tensor(matrix, "w"), sketch_tensor(bad, "w"))
    assert set(row.values()) == {None}
    found = culprits(compare_all({"w": sketch_tensor(matrix, "w")}, {"w": sketch_tensor(bad, "w")}))
    assert [row["name"] for row in found.named] == ["w"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", faults.FAULTS)
def test_each_fault_names_its_module(model, fault: str) -> None:
    found, expected = named_after(model, faults.FAULTS[fault])
    assert {row["name"] for row in found.named} == expected
    assert all(name in found.text for name in expected)


@pytest.mark.parametrize("fault", [name for name in faults.FAULTS if "row" not in name])
def test_a_fault_stands_out_from_rounding_everywhere(make_model, fault: str) -> None:
    found, expected = named_after(make_model("llama"), faults.FAULTS[fault], before=lambda m: faults.round_to(m, 8))
    assert found.named[0]["name"] in expected, found.text


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("zeroed", "zeroed"),
        ("scaled x8", "scaled by 8"),
        ("sign flipped", "sign flipped"),
        ("transposed", "transposed"),
        ("rows shuffled", "shuffled"),
        ("layers swapped", "held"),
    ],
)
def test_what_happened_is_said(make_model, fault: str, words: str) -> None:
    found, _ = named_after(make_model("llama"), faults.FAULTS[fault])
    assert words in found.named[0]["what"]


@pytest.mark.slow
@pytest.mark.parametrize("edit", ["8 bits", "4 bits", "pruned", "bfloat16"])
def test_an_edit_of_everything_is_called_uniform(model, edit: str) -> None:
    edits = {
        "8 bits": lambda m: faults.round_to(m, 8),
        "4 bits": lambda m: faults.round_to(m, 4),
        "pruned": faults.prune,
        "bfloat16": lambda m: m.bfloat16(),
    }
    found, _ = named_after(model, lambda m: edits[edit](m) and None)
    assert found.named == []
    assert found.uniform
    assert found.text.startswith("uniform")


@pytest.mark.slow
def test_nothing_changed_is_said(model) -> None:
    sketches = sketch_model(model)
    found = culprits(compare_all(sketches, sketch_model(copy.deepcopy(model))))
    assert (found.named, found.uniform, found.text) == ([], False, "no tensor changed")
    json.dumps(compare_all(sketches, sketches), allow_nan=False)


def test_a_reset_normalisation_is_named(make_model) -> None:
    model = make_model("llama")
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.copy_(1 + 0.3 * normal(len(parameter)))

    def reset(model) -> set[str]:
        model.model.layers[1].input_layernorm.weight.fill_(1.0)
        return {"model.layers.1.input_layernorm.weight"}

    found, expected = named_after(model, reset)
    assert {row["name"] for row in found.named} == expected


def test_one_expert_of_a_stack_is_named() -> None:
    stack = normal(4, 32, 16)
    damaged = stack.clone()
    damaged[2] = 0
    name = "layers.0.experts.down_proj"
    found = culprits(compare_all(dict(sketch_stack(stack, name)), dict(sketch_stack(damaged, name))))
    assert [row["name"] for row in found.named] == [f"{name}[2]"]
