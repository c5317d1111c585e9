"""Tests for NaNCheckGuard."""

import pytest
import torch
from torch import nn

from my_plugin.my_guard import NaNCheckGuard


def _model(damaged: bool) -> nn.Module:
    model = nn.Linear(4, 4)
    if damaged:
        with torch.no_grad():
            model.weight[1, 2] = float("nan")
    return model


def test_finite_weights_pass():
    result = NaNCheckGuard().validate(_model(damaged=False), None, {})

    assert result["passed"] is True
    assert result["metrics"]["checked_params"] == 2  # weight + bias


@pytest.mark.parametrize(("strict", "action"), [(True, "abort"), (False, "warn")])
def test_nan_fails_and_names_the_parameter(strict, action):
    result = NaNCheckGuard(strict=strict).validate(_model(damaged=True), None, {})

    assert result["passed"] is False
    assert result["action"] == action
    assert result["metrics"]["nan_params"] == ["weight"]
