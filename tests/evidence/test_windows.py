"""Windows made from calibration data: any form of batch, ids by content, halves, and clear refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from invarlock.core.exceptions import DataError, PairingError
from invarlock.evidence.windows import (
    IGNORED,
    Window,
    Windows,
    content_digest,
    mask_tokens,
    windows_from_calibration,
    windows_from_provider,
)

IDS = [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16], [17, 18, 19, 20]]


def _batches(make: Any) -> list[dict[str, Any]]:
    return [{"input_ids": make(row), "attention_mask": make([1] * 4), "labels": make(row)} for row in IDS]


@pytest.mark.parametrize(
    "data",
    [
        _batches(list),
        _batches(tuple),
        _batches(lambda row: [row]),
        _batches(np.array),
        _batches(lambda row: np.array([row])),
        _batches(torch.tensor),
        _batches(lambda row: torch.tensor([row])),
        [{"input_ids": torch.tensor(IDS), "attention_mask": torch.ones(4, 4), "labels": np.array(IDS)}],
        [{"input_ids": IDS[:3], "labels": IDS[:3]}, {"input_ids": IDS[3], "labels": IDS[3], "attention_mask": None}],
    ],
)
def test_every_form_of_batch_gives_the_same_windows(data: Any) -> None:
    windows = windows_from_calibration(data, None, None)
    assert windows == windows_from_calibration(_batches(list), None, None)
    assert [w.input_ids for w in windows.all] == [tuple(row) for row in IDS]
    assert all(w.mask is None and w.labels == w.input_ids for w in windows.all)


def test_each_row_is_its_own_cluster_named_by_its_content() -> None:
    windows = windows_from_calibration([{"input_ids": row} for row in IDS], None, None)
    assert [w.id for w in windows.all] == [content_digest(row) for row in IDS]
    assert all(w.document == w.id for w in windows.all)
    other = windows_from_calibration([{"input_ids": row, "attention_mask": [0, 1, 1, 1]} for row in IDS], None, None)
    assert {w.id for w in other.all}.isdisjoint(w.id for w in windows.all)


def test_repeated_content_keeps_ids_unique() -> None:
    windows = windows_from_calibration([{"input_ids": [1, 2]}] * 4, None, None)
    base = content_digest([1, 2])
    assert [w.id for w in windows.all] == [base, f"{base}#2", f"{base}#3", f"{base}#4"]


@pytest.mark.parametrize(
    ("preview_n", "final_n", "expected"),
    [(None, None, (2, 2)), (1, None, (1, 4)), (None, 1, (4, 1)), (1, 2, (1, 2))],
)
def test_counts_split_the_sequence(preview_n: int | None, final_n: int | None, expected: tuple[int, int]) -> None:
    windows = windows_from_calibration([{"input_ids": [i, i]} for i in range(5)], preview_n, final_n)
    assert (len(windows.preview), len(windows.final)) == windows.requested == expected
    assert [w.input_ids[0] for w in windows.all] == list(range(sum(expected)))


@pytest.mark.parametrize("counts", [(0, 2), (2, 0), (4, 2), (-1, 3), (5, None)])
def test_counts_that_do_not_fit_are_refused(counts: tuple[int | None, int | None]) -> None:
    with pytest.raises(DataError, match="5 windows"):
        windows_from_calibration([{"input_ids": [i, i]} for i in range(5)], *counts)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ([[1, 2, 3]], "batch 0 is list"),
        ([{"ids": [1]}], r"batch 0 is \['ids'\]"),
        ([{"input_ids": "abc"}], "'input_ids' is str"),
        ([{"input_ids": [1.5, 2.0]}], "expected token ids"),
        ([{"input_ids": np.zeros((2, 2, 2), int)}], "expected token ids"),
        ([{"input_ids": 7}], "expected token ids"),
        ([{"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2]]}], "'labels' has 1 rows, 'input_ids' 2"),
        ([{"input_ids": []}, {"input_ids": [1]}], "0 windows|no tokens|has 1 windows"),
        ({"input_ids": [1, 2]}, "expected a list of batches"),
        (torch.zeros(4, 4, dtype=torch.long), "batch 0 is Tensor"),
    ],
)
def test_malformed_data_is_named(data: Any, named: str) -> None:
    with pytest.raises(DataError, match=named):
        windows_from_calibration(data, None, None)


def test_a_mask_of_another_length_is_a_pairing_error() -> None:
    with pytest.raises(PairingError, match="3 tokens but 2 mask entries") as caught:
        windows_from_calibration([{"input_ids": [1, 2, 3], "attention_mask": [1, 1]}] * 2, None, None)
    assert caught.value.code == "E003"


def test_iterators_are_refused_and_materialized_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = torch.utils.data.DataLoader([{"input_ids": torch.tensor(row)} for row in IDS], batch_size=2)
    for data in (({"input_ids": row} for row in IDS), loader):
        with pytest.raises(DataError, match="INVARLOCK_ALLOW_CALIBRATION_MATERIALIZE=1"):
            windows_from_calibration(data, None, None)
    monkeypatch.setenv("INVARLOCK_ALLOW_CALIBRATION_MATERIALIZE", "1")
    for data in (({"input_ids": row} for row in IDS), loader):
        assert [w.input_ids for w in windows_from_calibration(data, None, None).all] == [tuple(row) for row in IDS]


def test_indexable_without_being_a_sequence_is_enough() -> None:
    class Lazy:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"input_ids": IDS[index]}

    assert len(windows_from_calibration(Lazy(), None, None).all) == 4


def test_a_set_survives_its_json_form() -> None:
    data = [
        {"input_ids": [1, 2, 3], "attention_mask": [0, 1, 1], "labels": [1, 2, 3]},
        {"input_ids": [4, 5, 6]},
    ]
    windows = windows_from_calibration(data, None, None)
    again = Windows.from_dict(windows.to_dict())
    assert again == windows and again.digest() == windows.digest()
    with pytest.raises(PairingError, match="INVARLOCK_STORE_EVAL_WINDOWS=1"):
        Windows.from_dict({})


@pytest.mark.parametrize("field", ["id", "document", "input_ids", "mask", "labels"])
def test_the_digest_covers_everything(field: str) -> None:
    from dataclasses import replace

    row = Window("a", "d", (1, 2), (1, 1), (1, 2))
    other = replace(row, **{field: {"id": "b", "document": "e"}.get(field, (0, 1))})
    digests = {Windows((row,), (one,), 2, (1, 1)).digest() for one in (row, other)}
    assert len(digests) == 2


@pytest.mark.slow
def test_provider_windows_keep_ids_and_documents(demo_tokenizer: Any) -> None:
    from invarlock.eval.data import get_provider

    parts = get_provider("synthetic").windows(demo_tokenizer, preview_n=2, final_n=3, seq_len=16, stride=16)
    windows = windows_from_provider(*parts, 16, (2, 3))
    assert [w.id for w in windows.all] == parts[0].window_ids + parts[1].window_ids
    assert [w.document for w in windows.all] == parts[0].document_ids + parts[1].document_ids
    assert all(w.mask is None for w in windows.all)


def test_masking_hides_the_same_tokens_every_time_and_labels_just_those() -> None:
    windows = windows_from_calibration(
        [{"input_ids": list(range(100 * i, 100 * i + 40))} for i in range(4)], None, None
    )
    hidden = mask_tokens(windows, 999, [0, 100], seed=1)
    assert hidden == mask_tokens(windows, 999, [0, 100], seed=1) != mask_tokens(windows, 999, [0, 100], seed=2)
    for before, after in zip(windows.all, hidden.all, strict=True):
        places = [i for i, token in enumerate(after.input_ids) if token == 999]
        assert len(places) == 6 and after.labels is not None
        assert [i for i, label in enumerate(after.labels) if label != IGNORED] == places
        assert all(after.labels[i] == before.input_ids[i] for i in places)
        assert not {0, 100} & {before.input_ids[i] for i in places}
