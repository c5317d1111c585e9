"""What lies between two checkpoints is told in words, over architectures and formats, without building a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from invarlock.core.exceptions import ConfigError
from invarlock.edits.rtn import round_to_nearest
from invarlock.flow.diff import Expectation, diff

Rewrite = Callable[..., Path]
Tensors = dict[str, torch.Tensor]

ARCHITECTURES = {"gpt2": "mlp.c_fc", "llama": "mlp.up_proj", "bert": "intermediate.dense"}


@pytest.fixture(scope="module")
def folder(demo_model: Path, model_folder: Callable[[str], Path]) -> Callable[[str], Path]:
    return lambda name: demo_model if name == "gpt2" else model_folder(name)


def named(tensors: Tensors, part: str) -> list[str]:
    return [name for name in sorted(tensors) if part in name and name.endswith("weight")]


def each(part: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in named(tensors, part):
            tensors[name] = edit(tensors[name].float()).to(tensors[name].dtype).contiguous()

    return change


def swap(part: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        one, two = named(tensors, part)[:2]
        tensors[one], tensors[two] = tensors[two], tensors[one]

    return change


def rounded(w: torch.Tensor) -> torch.Tensor:
    return round_to_nearest(w, 4, per_channel=True, group_size=32, clamp_ratio=0.0)


EDITS: dict[str, tuple[Callable[[str], Callable[[Tensors], None]], str]] = {
    "rounded": (lambda part: each(part, rounded), "4-bit rounding in groups of 32, symmetric"),
    "zeroed": (lambda part: each(part, torch.zeros_like), "zeroed"),
    "scaled": (lambda part: each(part, lambda w: w * 1.5), "scaled by 1.5"),
    "swapped": (swap, "holds what "),
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_one_role_is_told_in_a_line(
    architecture: str, edit: str, folder: Callable[[str], Path], rewrite_tensors: Rewrite
) -> None:
    part = ARCHITECTURES[architecture]
    change, words = EDITS[edit]
    found = diff(str(folder(architecture)), str(rewrite_tensors(folder(architecture), change(part))))
    assert any(words in line and part.split(".")[-1] in line for line in found.summary), found.summary
    assert all(part in one.name for one in found.changed)
    assert any(line.startswith("untouched") for line in found.summary)
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_checkpoint_is_the_same_as_its_own_copy_in_shards(copy_model: Rewrite, llama_model: Path) -> None:
    found = diff(str(llama_model), str(copy_model(llama_model, max_shard_size="50KB")))
    assert not found.changed
    assert not found.missing
    assert not found.added


def test_nothing_changed_is_said(llama_model: Path) -> None:
    found = diff(str(llama_model), str(llama_model))
    assert found.same
    assert found.summary[0].startswith("nothing changed")


def test_scales_that_cancel_out_between_two_matrices_are_told(rewrite_tensors: Rewrite, llama_model: Path) -> None:
    def move(tensors: Tensors) -> None:
        for name in named(tensors, "mlp.up_proj"):
            down = name.replace("up_proj", "down_proj")
            by = torch.rand(len(tensors[name]), generator=torch.Generator().manual_seed(1)) + 0.5
            tensors[name] = (tensors[name].float() * by[:, None]).to(tensors[name].dtype)
            tensors[down] = (tensors[down].float() / by).to(tensors[down].dtype)

    found = diff(str(llama_model), str(rewrite_tensors(llama_model, move)))
    assert any("scales moved between" in line and "cancels out" in line for line in found.pairs), found.summary


def test_settings_beside_the_weights_are_told(llama_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(llama_model, other)
    config = json.loads((other / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (other / "config.json").write_text(json.dumps(config))
    (other / "chat_template.jinja").write_text("{{ messages }}")
    found = diff(str(llama_model), str(other))
    assert not found.same
    assert any("rms_norm_eps" in line for line in found.settings)
    assert "chat template: added" in found.settings


@pytest.mark.slow
def test_an_expectation_is_a_gate(rewrite_tensors: Rewrite, llama_model: Path) -> None:
    def change(tensors: Tensors) -> None:
        each("mlp.", rounded)(tensors)
        tensors["model.norm.weight"] += 1

    found = diff(str(llama_model), str(rewrite_tensors(llama_model, change)))
    assert Expectation.parse("rounded:4", "mlp|norm").violations(found) != []
    assert Expectation.parse("rounded:4", "mlp").violations(found)[0].startswith("model.norm.weight is outside")
    only = diff(str(llama_model), str(rewrite_tensors(llama_model, each("mlp.", rounded))))
    assert Expectation.parse("rounded:4", "mlp|attn").violations(only) == []
    assert Expectation.parse("rounded:3", None).violations(only)
    with pytest.raises(ConfigError, match="rounded"):
        Expectation.parse("round:4", None)


@pytest.mark.slow
def test_the_command_ends_as_diff_does(
    rewrite_tensors: Rewrite, llama_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from invarlock.cli.diff import diff as command

    other = str(rewrite_tensors(llama_model, each("mlp.", rounded)))
    page = tmp_path / "page.html"
    arguments: dict[str, Any] = {"html": page, "verbose": False, "json": True}
    assert command(str(llama_model), other, None, None, **arguments) == 1
    assert json.loads(capsys.readouterr().out)["format_version"] == "diff-v1"
    assert "4-bit rounding" in page.read_text()
    assert command(str(llama_model), other, "rounded:4", "mlp", **arguments) == 0
    assert command(str(llama_model), str(llama_model), None, None, **arguments) == 0
    with pytest.raises(ConfigError, match="absent"):  # exit code 2
        command(str(llama_model), str(tmp_path / "absent"), None, None, **arguments)
    assert load_file(llama_model / "model.safetensors")  # neither side was written to
