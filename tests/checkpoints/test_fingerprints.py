"""What was done to a tensor is named from its values: every operation is made here and must be told apart from the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from invarlock.checkpoints.fingerprints import Change, compare
from invarlock.edits.rtn import round_to_nearest

TYPES = [torch.float32, torch.bfloat16]
Edit = Callable[[torch.Tensor], torch.Tensor]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return a matrix with a few larger columns, as trained ones have."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(shape[-1], generator=generator) + 0.5
    return torch.randn(*shape, generator=generator) * 0.03 * spread


def rtn(bits: int, group: int | None = None, channel: bool = True) -> Edit:
    return lambda w: round_to_nearest(w, bits, per_channel=channel, group_size=group, clamp_ratio=0.0)


def asymmetric(bits: int, group: int) -> Edit:
    def edit(w: torch.Tensor) -> torch.Tensor:
        x = w.float().reshape(-1, group)
        low, high = x.amin(1, keepdim=True).clamp_max(0), x.amax(1, keepdim=True).clamp_min(0)
        step = (high - low) / (2**bits - 1)
        zero = (-low / step).round()
        return ((((x / step).round() + zero).clamp(0, 2**bits - 1) - zero) * step).reshape(w.shape).to(w.dtype)

    return edit


def pruned(share: float) -> Edit:
    return lambda w: torch.where(w.abs() > w.abs().float().quantile(share).to(w.dtype), w, 0.0).to(w.dtype)


def two_of_four(w: torch.Tensor) -> torch.Tensor:
    x = w.reshape(-1, 4)
    kept = x.abs().topk(2, dim=1).indices
    return torch.zeros_like(x).scatter(1, kept, x.gather(1, kept)).reshape(w.shape)


def update(rank: int, size: float = 0.3) -> Edit:
    def edit(w: torch.Tensor) -> torch.Tensor:
        left, right = drawn(w.shape[0], rank, seed=1), drawn(rank, w.shape[1], seed=2)
        change = left @ right
        return (w.float() + change / change.norm() * w.float().norm() * size).to(w.dtype)

    return edit


def rows(part: slice, edit: Edit) -> Edit:
    def only(w: torch.Tensor) -> torch.Tensor:
        w = w.clone()
        w[part] = edit(w[part])
        return w

    return only


def turned(axis: int) -> Edit:
    def edit(w: torch.Tensor) -> torch.Tensor:
        turn = torch.linalg.qr(drawn(w.shape[axis], w.shape[axis], seed=3))[0]
        return (turn @ w.float() if axis == 0 else w.float() @ turn).to(w.dtype)

    return edit


def order(size: int) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(4))


EDITS: dict[str, tuple[Edit, list[tuple[str, dict[str, Any]]]]] = {
    "4 bits in groups": (rtn(4, 32), [("rounded", {"bits": 4, "group": 32, "symmetric": True, "axis": "row"})]),
    "3 bits a row": (rtn(3), [("rounded", {"bits": 3, "group": None, "symmetric": True, "axis": "row"})]),
    "2 bits in groups": (rtn(2, 64), [("rounded", {"bits": 2, "group": 64, "symmetric": True})]),
    "8 bits a row": (rtn(8), [("rounded", {"bits": 8, "group": None, "axis": "row"})]),
    "4 bits a tensor": (rtn(4, None, False), [("rounded", {"bits": 4, "axis": "tensor"})]),
    "4 bits asymmetric": (asymmetric(4, 64), [("rounded", {"bits": 4, "group": 64, "symmetric": False})]),
    "4 bits down the columns": (lambda w: rtn(4)(w.T).T.contiguous(), [("rounded", {"bits": 4, "axis": "column"})]),
    "pruned": (pruned(0.3), [("pruned", {"pattern": ""})]),
    "pruned 2:4": (two_of_four, [("pruned", {"pattern": "2:4", "share": 0.5})]),
    "rank 8": (update(8), [("low_rank", {"rank": 8})]),
    "cut to rank 20": (
        lambda w: (lambda u, s, v: (u[:, :20] * s[:20] @ v[:20]).to(w.dtype))(*torch.linalg.svd(w.float(), False)),
        [("rank_cut", {"rank": 20})],
    ),
    "scaled": (lambda w: w * 1.25, [("scaled", {"by": pytest.approx(1.25, rel=1e-3)})]),
    "sign": (lambda w: -w, [("sign", {})]),
    "rows scaled": (
        lambda w: (w.float() * (0.5 + torch.rand(len(w), 1))).to(w.dtype),
        [("lines_scaled", {"axis": "rows"})],
    ),
    "columns scaled": (
        lambda w: (w.float() * (0.5 + torch.rand(w.shape[1]))).to(w.dtype),
        [("lines_scaled", {"axis": "columns"})],
    ),
    "rows in another order": (lambda w: w[order(len(w))], [("permuted", {"axis": "rows"})]),
    "columns in another order": (lambda w: w[:, order(w.shape[1])], [("permuted", {"axis": "columns"})]),
    "columns turned": (turned(1), [("rotated", {"axis": "columns"})]),
    "rows turned": (turned(0), [("rotated", {"axis": "rows"})]),
    "zeroed": (torch.zeros_like, [("zeroed", {})]),
    "constant": (lambda w: torch.full_like(w, 0.5), [("constant", {"value": 0.5})]),
    "re-initialised": (lambda w: drawn(*w.shape, seed=9).to(w.dtype), [("unrelated", {})]),
    "a few rows": (
        rows(slice(10, 14), lambda w: drawn(*w.shape, seed=9).to(w.dtype)),
        [("rows", {"first": 10, "last": 13, "count": 4}), ("unrelated", {})],
    ),
    "a row negated": (rows(slice(3, 4), lambda w: -w), [("rows", {"first": 3, "count": 1}), ("sign", {})]),
    "two rows swapped": (
        rows(slice(5, 7), lambda w: w.flip(0)),
        [("rows", {"count": 2}), ("permuted", {"axis": "rows"})],
    ),
    "a head zeroed": (rows(slice(16, 32), torch.zeros_like), [("rows", {"heads": [1]}), ("zeroed", {})]),
    "one bit": (rows(slice(7, 8), lambda w: torch.cat([w[:, :5], w[:, 5:6] * 64, w[:, 6:]], 1)), [("few_values", {})]),
    "not finite": (rows(slice(7, 8), lambda w: w * torch.nan), [("not_finite", {})]),
    # two at once
    "pruned and rounded": (
        lambda w: rtn(4, 32)(two_of_four(w)),
        [("pruned", {"pattern": "2:4"}), ("rounded", {"bits": 4})],
    ),
    "pruned and scaled": (
        lambda w: pruned(0.5)(w) * 2,
        [("pruned", {}), ("scaled", {"by": pytest.approx(2, rel=1e-3)})],
    ),
    "scaled and rounded": (
        lambda w: rtn(4, 32)(w * 1.5),
        [("scaled", {"by": pytest.approx(1.5, rel=0.02)}), ("rounded", {"bits": 4, "group": 32})],
    ),
    "an update, then rounded": (
        lambda w: rtn(4, 32)(update(4)(w)),
        [("low_rank", {"rank": 4}), ("rounded", {"bits": 4, "group": 32})],
    ),
    "columns scaled and rounded": (
        lambda w: rtn(4, 32)((w.float() * (0.3 + 2 * torch.rand(w.shape[1]))).to(w.dtype)),
        [("lines_scaled", {"axis": "columns"}), ("rounded", {"bits": 4})],
    ),
    "another order, and scaled": (
        lambda w: w[order(len(w))] * 3,
        [("permuted", {"axis": "rows"}), ("scaled", {"by": pytest.approx(3, rel=1e-3)})],
    ),
    "another order, and rounded": (
        lambda w: rtn(4, 32)(w[order(len(w))]),
        [("permuted", {"axis": "rows"}), ("rounded", {"bits": 4})],
    ),
}


def told(change: Change) -> list[str]:
    return [operation.name for operation in change.operations]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_named_with_its_figures(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    edit, expected = EDITS[name]
    before = drawn(128, 192).to(dtype)
    change = compare("w", before, edit(before), head_size=16)
    assert told(change) == [operation for operation, _ in expected], change.words
    for operation, (_, facts) in zip(change.operations, expected, strict=True):
        assert {key: operation.facts[key] for key in facts} == facts
    assert change.words
    assert not change.identical


def test_a_square_matrix_that_was_transposed_is_told() -> None:
    before = drawn(96, 96)
    assert told(compare("w", before, before.T.contiguous())) == ["transposed"]
    assert told(compare("w", before, before.T.contiguous() * 2)) == ["transposed", "scaled"]
    assert told(compare("w", drawn(8, 5), drawn(8, 5).T)) == ["transposed"]


@pytest.mark.parametrize(
    ("edit", "operation"),
    [(torch.zeros_like, "zeroed"), (lambda v: v + 1, "shifted"), (lambda v: v * 0.9, "scaled"), (lambda v: -v, "sign")],
)
def test_a_vector_is_named_too(edit: Edit, operation: str) -> None:
    assert told(compare("bias", drawn(96), edit(drawn(96)))) == [operation]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_is_told_from_an_edit(dtype: torch.dtype) -> None:
    before = drawn(96, 64)
    for after in (before.to(dtype), before.to(dtype).float()):
        change = compare("w", before, after)
        assert told(change) == ["cast"]
        assert not change.identical
    assert compare("w", before.to(dtype), before.to(dtype).float()).identical
    scaled = compare("w", before, (before * 1.5).to(dtype))
    assert told(scaled) == ["cast", "scaled"]


def test_the_figures_are_those_of_the_whole_tensor() -> None:
    before = drawn(300, 200)
    after = before.clone()
    after[7, 11] += 0.5
    after[8, 12] -= 0.25
    change = compare("w", before, after)
    difference = (after - before).double()
    assert change.rel_change == pytest.approx(float(difference.norm() / before.double().norm()), rel=1e-4)
    assert change.largest == pytest.approx(0.5, rel=1e-5)
    assert (change.rows, change.columns) == ((2, 300), (2, 200))
    cosine = float((before.double() * after.double()).sum() / (before.double().norm() * after.double().norm()))
    assert change.cosine == pytest.approx(cosine, rel=1e-5)


def test_rows_that_were_added_leave_the_others_as_they_were() -> None:
    before = drawn(50, 32)
    change = compare("embed", before, torch.cat([before, drawn(6, 32, seed=3)]))
    assert told(change) == ["reshaped"]
    assert "[50, 32] became [56, 32]" in change.words


def test_a_dense_change_has_no_name_but_its_size() -> None:
    before = drawn(128, 192)
    change = compare("w", before, before + 0.01 * drawn(128, 192, seed=8))
    assert told(change) == ["changed"]
    assert not change.known
