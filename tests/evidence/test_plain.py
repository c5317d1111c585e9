"""Numbers have one spelling, and what was not recorded leaves no trace."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

import pytest
import rfc8785

from invarlock.evidence.plain import ABSENT, Plain, canonical, canonical_digest, is_canonical


@pytest.mark.parametrize(
    ("value", "spelled"),
    [
        (1.0, "1"),
        (-0.0, "0"),
        (2.5, "2.5"),
        (math.nan, "null"),
        (-math.inf, "null"),
        (True, "true"),
        ({"a": [1.0, {"b": 3.0}]}, '{"a": [1, {"b": 3}]}'),
        (2.0**60, "1.152921504606847e+18"),
    ],
)
def test_a_number_has_one_spelling(value: Any, spelled: str) -> None:
    assert json.dumps(canonical(value)) == spelled
    assert canonical(canonical(value)) == canonical(value)


def test_the_spelling_is_that_of_the_canonical_json_that_is_hashed() -> None:
    values = [1.0, -0.0, 0.1, 123456.0, 1e-7]
    assert [json.dumps(canonical(value)) for value in values[:4]] == [rfc8785.dumps(v).decode() for v in values[:4]]
    assert canonical_digest(values) == canonical_digest(canonical(values))
    assert [is_canonical(value) for value in (1, 1.0, 1.5, "1.0", None, True)] == [True, False, True, True, True, True]


class _Form(Plain):
    old: float | None = None
    new: Annotated[float | None, ABSENT] = None


def test_a_field_added_later_is_absent_where_it_has_no_value() -> None:
    assert _Form().model_dump(mode="json") == {"old": None}
    assert _Form(new=1.0).model_dump(mode="json") == {"old": None, "new": 1.0}
