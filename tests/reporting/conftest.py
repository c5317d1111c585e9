"""One certificate of each kind."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from typing import Any

import pytest

from certificates import KINDS, make_cert


@functools.cache
def _made(kind: str) -> str:
    return json.dumps(make_cert(kind), allow_nan=False)


@pytest.fixture
def cert() -> Callable[[str], dict[str, Any]]:
    """Return a function from a kind to its certificate, read back from JSON text."""
    return lambda kind: copy.deepcopy(json.loads(_made(kind)))


@pytest.fixture(params=KINDS)
def each(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A certificate of every kind in turn."""
    return json.loads(_made(request.param))
