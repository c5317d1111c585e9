"""The edits that change nothing, and those that take another checkpoint's weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from invarlock.adapters import HF_Causal_Adapter
from invarlock.core.api import EditLike
from invarlock.core.exceptions import EditError
from invarlock.edits import CheckpointEdit, NoopEdit, RTNQuantEdit

Copy = Callable[..., Path]


def test_every_edit_is_an_edit() -> None:
    assert all(isinstance(edit, EditLike) for edit in (NoopEdit(), RTNQuantEdit(), CheckpointEdit("x")))
    assert [edit.name for edit in (NoopEdit(), RTNQuantEdit(), CheckpointEdit("x"))] == [
        "noop",
        "quant_rtn",
        "checkpoint",
    ]


def test_noop_changes_nothing(demo_model: Path, load_model: Callable[[Path], Any]) -> None:
    model = load_model(demo_model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = NoopEdit().apply(model, None)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert report["deltas"] == {"params_changed": 0, "layers_modified": 0}


@pytest.mark.slow
def test_a_checkpoint_brings_its_weights_and_keeps_the_tie(
    demo_model: Path, copy_model: Copy, load_model: Callable[[Path], Any]
) -> None:
    folder = copy_model(demo_model, lambda m: m.transformer.h[1].mlp.c_fc.weight.mul_(1.5))
    model, other = load_model(demo_model), load_model(folder)
    report = CheckpointEdit(str(folder)).apply(model, HF_Causal_Adapter())
    assert report["modules"] == ["transformer.h.1.mlp.c_fc.weight"]
    assert report["deltas"]["params_changed"] == model.transformer.h[1].mlp.c_fc.weight.numel()
    theirs = other.state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.slow
def test_the_same_checkpoint_changes_nothing(demo_model: Path, load_model: Callable[[Path], Any]) -> None:
    report = CheckpointEdit(str(demo_model)).apply(load_model(demo_model), HF_Causal_Adapter())
    assert report["modules"] == []


@pytest.mark.slow
def test_a_tied_tensor_counts_once(demo_model: Path, copy_model: Copy, load_model: Callable[[Path], Any]) -> None:
    folder = copy_model(demo_model, lambda m: m.lm_head.weight.mul_(1.5))
    model = load_model(demo_model)
    report = CheckpointEdit(str(folder)).apply(model, HF_Causal_Adapter())
    assert report["deltas"] == {"params_changed": model.lm_head.weight.numel(), "layers_modified": 1}


@pytest.mark.slow
@pytest.mark.parametrize("edit", [NoopEdit(), RTNQuantEdit(), CheckpointEdit("here")], ids=lambda edit: edit.name)
def test_every_edit_reports_its_name_plan_and_deltas_as_plain_data(
    edit: Any, demo_model: Path, load_model: Callable[[Path], Any]
) -> None:
    settings = {"path": str(demo_model)} if edit.name == "checkpoint" else {}
    report = edit.apply(load_model(demo_model), HF_Causal_Adapter(), **settings)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["name"] == edit.name and settings.items() <= report["plan"].items()
    assert {"params_changed", "layers_modified"} <= report["deltas"].keys()


def test_another_architecture_is_refused(
    demo_model: Path, llama_model: Path, load_model: Callable[[Path], Any]
) -> None:
    with pytest.raises(EditError, match=r"expected the same|expected '"):
        CheckpointEdit(str(llama_model)).apply(load_model(demo_model), HF_Causal_Adapter())


@pytest.mark.slow
def test_weights_for_another_configuration_are_refused(
    llama_model: Path, copy_model: Copy, load_model: Callable[[Path], Any]
) -> None:
    """The weights agree, what is computed with them does not: the edit would report no change."""
    folder = copy_model(llama_model, lambda m: setattr(m.config, "rms_norm_eps", 0.5))
    with pytest.raises(EditError, match=r"rms_norm_eps=0\.5; expected 1e-0"):
        CheckpointEdit(str(folder)).apply(load_model(llama_model), HF_Causal_Adapter())
