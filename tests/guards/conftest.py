from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from guards.models import ARCHITECTURES, build


@pytest.fixture
def make_model() -> Callable[..., Any]:
    return build


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(architecture: str) -> Any:
    return build(architecture)
