"""One table of figures per window makes every form of the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from invarlock.core.exceptions import DataError, PairingError
from invarlock.evidence.rows import COLUMNS, PairedRows, Rows, WindowRows, pair_rows, row_problems

IDS, DOCUMENTS = ["a", "b"], ["one", "one"]


def _side(**columns: Any) -> WindowRows:
    return WindowRows.of(IDS, DOCUMENTS, {"tokens": [3, 4], "loss": [1.0, 2.0], **columns})


def test_the_names_in_a_certificate_are_those_of_the_first_release() -> None:
    assert list(PairedRows.model_fields) == [
        "window_ids", "document_ids", "tokens", "baseline_loss", "subject_loss", "kl_sum", "kl_max", "kl_exact_sum",
        "flips", "baseline_correct", "subject_correct", "slices",
    ]  # fmt: skip
    assert set(WindowRows.model_fields) == {column.name for column in COLUMNS}


def test_what_was_measured_is_stored_as_plain_data() -> None:
    rows = _side(loss=[np.float64("nan"), 2.0], flips=np.array([1.0, 0.0]), kl_exact_sum=[None, 0.5])
    assert (rows.loss, rows.flips, rows.kl_exact_sum, rows.correct) == ([None, 2.0], [1, 0], [None, 0.5], None)
    assert rows.model_dump(mode="json")["kl_sum"] is None
    with pytest.raises(DataError, match="'kl_summ'; expected only: window_ids"):
        _side(kl_summ=[1.0, 2.0])


def test_a_pair_takes_each_figure_from_the_side_that_it_belongs_to() -> None:
    paired = pair_rows(_side(correct=[1.0, 0.0]), _side(loss=[5.0, 6.0], correct=[0.0, 0.0], flips=[2, 0]), "final")
    assert (paired.baseline_loss, paired.subject_loss) == ([1.0, 2.0], [5.0, 6.0])
    assert (paired.baseline_correct, paired.subject_correct, paired.flips) == ([1.0, 0.0], [0.0, 0.0], [2, 0])
    rows = Rows.of(paired, paired)
    assert rows.tokens.tolist() == [3, 4, 3, 4] and rows.is_final.tolist() == [False, False, True, True]
    assert rows["kl_sum"] is None and rows.need("flips").dtype == np.float64
    with pytest.raises(KeyError):
        rows["no_such_figure"]
    with pytest.raises(DataError, match="have no kl_sum"):
        rows.need("kl_sum")


@pytest.mark.parametrize(
    ("other", "code"), [({"ids": ["b", "a"]}, "E006"), ({"ids": ["a", "c"]}, "E006"), ({"tokens": [3, 5]}, "E003")]
)
def test_other_windows_do_not_pair(other: dict[str, Any], code: str) -> None:
    columns = {"tokens": other.get("tokens", [3, 4]), "loss": [1.0, 2.0]}
    with pytest.raises(PairingError) as caught:
        pair_rows(_side(), WindowRows.of(other.get("ids", IDS), DOCUMENTS, columns), "final")
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"subject_loss": [1.0]}, "subject_loss has 1 rows; expected 2"),
        ({"window_ids": ["a", "a"]}, "window_ids repeat"),
        ({"tokens": [3, 0]}, "without scored tokens"),
        ({"kl_sum": [1.0, 1.0], "kl_max": [2.0, 0.5]}, "3 tokens of at most 2 nats cannot sum to 1"),
        ({"kl_sum": [1.0, 9.0], "kl_max": [0.5, 0.5]}, "4 tokens of at most 0.5 nats cannot sum to 9"),
        ({"subject_correct": [0.5, 1.5]}, "subject_correct has a value outside"),
    ],
)
def test_impossible_rows_are_named(changed: dict[str, Any], said: str) -> None:
    good = pair_rows(_side(), _side(kl_sum=[1.0, 2.0], kl_max=[0.5, 2.0], correct=[0.0, 1.0]), "final")
    assert list(row_problems("final", good)) == []
    assert said in " ".join(row_problems("final", good.model_copy(update=changed)))
