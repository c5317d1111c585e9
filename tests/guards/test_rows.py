"""Rows of embeddings, one by one: rounding moves all of them a little, damage moves some of them altogether."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from invarlock.guards.rows import compare_rows, row_codes, row_findings
from invarlock.stats.linalg import norms

Change = Callable[[torch.Tensor], torch.Tensor]
TABLES = {
    "llama": "model.embed_tokens.weight",
    "bert": "bert.embeddings.word_embeddings.weight",
    "neox": "embed_out.weight",
    "t5": "shared.weight",
}


@pytest.fixture(scope="module", params=TABLES)
def table(request: pytest.FixtureRequest, model_folder: Callable[[str], Path]) -> torch.Tensor:
    return load_file(model_folder(request.param) / "model.safetensors")[TABLES[request.param]].float()


def _compared(before: torch.Tensor, after: torch.Tensor) -> dict[str, Any]:
    sides = [(norms(matrix)[0], row_codes(matrix)) for matrix in (before, after)]
    found = compare_rows(sides[0], sides[1], before.shape[1])
    assert found is not None
    return found


def _rounded(bits: int, group: int | None) -> Change:
    """Round by row, by group within a row, or (group 0) by the whole tensor."""

    def change(matrix: torch.Tensor) -> torch.Tensor:
        cut = matrix.reshape(1, -1) if group == 0 else matrix.reshape(-1, group or matrix.shape[1])
        scale = cut.abs().amax(1, keepdim=True).clamp_min(1e-9) / (2 ** (bits - 1) - 1)
        return ((cut / scale).round() * scale).reshape(matrix.shape)

    return change


def _rotated(matrix: torch.Tensor) -> torch.Tensor:
    width = matrix.shape[1]
    return matrix @ torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(1)))[0]


def _scaled_by_column(matrix: torch.Tensor) -> torch.Tensor:
    return matrix * torch.exp(0.7 * torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(1)))


#: three bits by tensor are left out: they round whole rows to zero, which is said
HARMLESS = [(f"{b} bits, group {g}", _rounded(b, g)) for b in (8, 4, 3) for g in (None, 32, 0) if (b, g) != (3, 0)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [change for _, change in HARMLESS] + [_rotated, _scaled_by_column, torch.Tensor.half],
    ids=[name for name, _ in HARMLESS] + ["rotated", "scaled by column", "float16"],
)  # fmt: skip
def test_what_changes_every_row_alike_makes_none_stand_out(table: torch.Tensor, change: Change) -> None:
    assert _compared(table, change(table))["rows"] == []


def _rolled(matrix: torch.Tensor, rows: torch.Tensor) -> None:
    matrix[rows] = matrix[rows.roll(1)].clone()


@pytest.mark.parametrize("rounded", [None, 8, 4])
def test_rows_that_were_swapped_zeroed_overwritten_or_scaled_are_told_apart(
    table: torch.Tensor, rounded: int | None
) -> None:
    new = table.clone() if rounded is None else _rounded(rounded, 32)(table)
    new[[5, 900]] = new[[900, 5]]
    new[1000], new[1001] = 0.0, new[1001] * 3
    new[1002] = torch.randn(new.shape[1], generator=torch.Generator().manual_seed(2)) * table[1002].std()
    found = _compared(table, new)
    told = {row["row"]: (row["kind"], row.get("from")) for row in found["rows"]}
    moved = {5: ("moved", 900), 900: ("moved", 5)}
    assert told == moved | {1000: ("zeroed", None), 1001: ("scaled", None), 1002: ("overwritten", None)}


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.05, 0.6, 1.0])
def test_many_permuted_rows_hide_in_no_median(table: torch.Tensor, share: float) -> None:
    """Of a large vocabulary a text touches a small part; the rest may be permuted as a whole."""
    picked = table.norm(dim=1).argsort()[: int(share * len(table))]
    new = table.clone()
    _rolled(new, picked)
    assert _compared(table, new)["counts"]["moved"] >= 0.99 * len(picked)


@pytest.mark.parametrize("rounded", [None, 4])
@pytest.mark.parametrize("share", [0.6, 0.9])
def test_rows_that_were_overwritten_stand_out_also_where_they_are_most(
    table: torch.Tensor, rounded: int | None, share: float
) -> None:
    """What a text holds of a large vocabulary is the smaller part, and behaviour shows that alone."""
    new = table.clone() if rounded is None else _rounded(rounded, 32)(table)
    count = int(share * len(table))
    new[-count:] = table.std() * torch.randn(count, table.shape[1], generator=torch.Generator().manual_seed(2))
    found = [row["row"] for row in _compared(table, new)["rows"]]
    assert found and len(found) <= 8 * 4 and min(found) >= len(table) - count


def test_one_row_of_a_table_of_two_stands_out() -> None:
    """Such as the types of segments, of which a text of one segment uses the first."""
    matrix = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    found = _compared(matrix, torch.stack([matrix[0], matrix[1].flip(0)]))
    assert [row["row"] for row in found["rows"]] == [1]
    assert _compared(matrix, _rounded(3, None)(matrix))["rows"] == []


def test_rows_are_named_with_their_tokens_those_asked_for_first() -> None:
    matrix = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    new = matrix.clone()
    _rolled(new, torch.arange(10, 40))
    sides = [(norms(m)[0], row_codes(m)) for m in (matrix, new)]
    found = compare_rows(sides[0], sides[1], 16, [30, 29])
    (finding,) = row_findings("emb.weight", found, [(30, "<s>"), (29, "</s>")])
    assert finding["code"] == "rows_moved"
    assert finding["message"].startswith(
        "emb.weight: rows that hold what other rows held (30 of 64): 30 '<s>' (that of 29 '</s>'), 29 '</s>' (that of 28), 10"
    )
    assert finding["message"].endswith("and 27 more")


def test_a_longer_table_is_compared_as_far_as_both_go() -> None:
    matrix = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    found = _compared(matrix, torch.cat([matrix, torch.zeros(8, 16)]))
    assert found["compared"] == 40 and found["rows"] == []


def test_a_norm_that_is_no_number_compares_with_nothing() -> None:
    codes = row_codes(torch.ones(2, 16))
    assert compare_rows((np.array([1.0, np.nan]), codes), (np.ones(2), codes), 16) is None


# -- tables of every width: biases of positions hold as many columns as there are heads


def _noisy_tables(width: int, relative: float) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tables of 96 rows of unlike lengths, each with a copy to which noise was added, relative to its own spread."""
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        matrix = torch.randn(96, width, generator=rng) * torch.exp(0.3 * torch.randn(96, 1, generator=rng))
        yield matrix, matrix + torch.randn(matrix.shape, generator=rng) * matrix.std() * relative


@pytest.mark.parametrize("width", [4, 5, 8, 12, 64, 768])
@pytest.mark.parametrize("relative", [0.003, 0.03, 0.1])
def test_noise_that_is_alike_in_all_entries_moves_no_row_however_narrow_the_table(width: int, relative: float) -> None:
    for matrix, noisy in _noisy_tables(width, relative):
        assert _compared(matrix, noisy)["rows"] == []


@pytest.mark.parametrize("width", [4, 5, 8, 12, 64, 768])
@pytest.mark.parametrize("relative", [0.0, 0.01, 0.03])
def test_one_row_that_is_lost_stands_out_of_the_noise_in_tables_of_every_width(width: int, relative: float) -> None:
    for matrix, noisy in _noisy_tables(width, relative):
        row = int(matrix.norm(dim=1).argsort()[len(matrix) // 2])
        for kinds, value in ((("zeroed",), torch.zeros(width)), (("overwritten", "moved"), -noisy[row])):
            damaged = noisy.clone()
            damaged[row] = value
            (found,) = _compared(matrix, damaged)["rows"]
            assert found["row"] == row and found["kind"] in kinds  # few columns: another row points the same way
