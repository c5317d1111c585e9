"""Checkpoints as files: what is read, what is refused, and what counts as a difference. No model gets weights here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from invarlock.adapters import HF_Causal_Adapter
from invarlock.checkpoints.base import Format
from invarlock.checkpoints.behaviour import behaviour, load_config
from invarlock.checkpoints.files import FORMATS, open_checkpoint, read_structure, resolve_folder
from invarlock.checkpoints.structure import Layout, layout_of, live_structure, structure_of
from invarlock.core.exceptions import CheckpointDamagedError, InvarlockError, ModelLoadError
from invarlock.evidence.model import Structure
from invarlock.guards import InvariantsGuard
from invarlock.guards.invariants import baseline_damage

Copy = Callable[..., Path]


def _structure(folder: Path) -> Structure:
    return read_structure(folder, layout_of(load_config(folder), HF_Causal_Adapter().auto_class))


def _findings(baseline: Path, subject: Path) -> list[tuple[str, str | None]]:
    """Compare two checkpoints from their files alone."""
    guard = InvariantsGuard()
    stats = [
        guard.stats_from(_structure(folder), behaviour(load_config(folder)), None, None)
        for folder in (baseline, subject)
    ]
    return [(f["code"], f["tensor"] or f.get("key")) for f in guard.pair(*stats)["findings"]]


def test_what_is_inert_is_inert_in_a_nested_configuration_too() -> None:
    """MPT keeps its attention's settings in a configuration of their own, the type of its weights among them."""
    from transformers import MptConfig

    single, half = (MptConfig(attn_config={"dtype": dtype}) for dtype in ("float32", "bfloat16"))
    assert behaviour(single) == behaviour(half)
    other = MptConfig(attn_config={"alibi_bias_max": 4})
    assert behaviour(single) != behaviour(other)


# -- where a checkpoint is --------------------------------------------------------------------------------------------


def test_an_empty_folder_is_said_to_be_empty(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="is empty; expected config.json"):
        resolve_folder(str(tmp_path))


def test_a_file_is_said_to_be_a_file(demo_model: Path) -> None:
    with pytest.raises(ModelLoadError, match="is a file; expected a folder"):
        resolve_folder(str(demo_model / "model.safetensors"))


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "~/nowhere-at-all", "a/b/c"])
def test_a_missing_folder_is_said_to_be_missing(name: str) -> None:
    with pytest.raises(ModelLoadError, match="no such folder"):
        resolve_folder(name)
    with pytest.raises(ModelLoadError, match="no such folder|ALLOW_NETWORK"):
        resolve_folder(Path(name))  # type: ignore[arg-type]  # many callers have a Path


@pytest.mark.parametrize("name", ["", "  "])
def test_no_name_is_not_the_current_folder(name: str) -> None:
    with pytest.raises(ModelLoadError, match="empty"):
        resolve_folder(name)


@pytest.mark.parametrize("name", ["gpt2", "nobody/nothing"])
def test_a_hub_id_that_is_not_cached_names_the_switch(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelLoadError, match="INVARLOCK_ALLOW_NETWORK=1"):
        resolve_folder(name)
    with pytest.raises(ModelLoadError, match="INVARLOCK_ALLOW_NETWORK=1"):
        HF_Causal_Adapter().load_model(name, device="cpu")


def test_names_that_no_hub_would_take_are_refused() -> None:
    with pytest.raises(ModelLoadError, match="neither a folder nor a valid hub id"):
        resolve_folder("not a model!")


# -- what is refused --------------------------------------------------------------------------------------------------


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _truncated_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def _garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"hello")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_no_config, "config.json"),
        (_broken_config, "config.json"),
        (_no_weights, "safetensors"),
        (_truncated, "truncated"),
        (_truncated_header, "truncated"),
        (_garbage, "truncated|not a safetensors"),
    ],
)
def test_a_broken_checkpoint_is_refused_by_the_reader_and_by_the_loader(
    llama_model: Path, tmp_path: Path, damage: Callable[[Path], None], named: str
) -> None:
    folder = Path(shutil.copytree(llama_model, tmp_path / "copy"))
    damage(folder)
    with pytest.raises(ModelLoadError, match=named):
        _structure(folder)
    with pytest.raises(InvarlockError) as caught:
        HF_Causal_Adapter().load_model(str(folder), device="cpu")
    assert isinstance(caught.value, ModelLoadError) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_missing_shard_is_named(demo_model: Path, copy_model: Copy) -> None:
    folder = copy_model(demo_model, max_shard_size="500KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    missing = _findings(demo_model, folder)
    assert missing and {code for code, _ in missing} == {"tensor_missing"}
    with pytest.raises(ModelLoadError):
        HF_Causal_Adapter().load_model(str(folder), device="cpu")


@pytest.mark.slow
def test_a_missing_tensor_is_refused_and_never_made_up(llama_model: Path, rewrite_tensors: Copy) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = rewrite_tensors(llama_model, lambda tensors: tensors.pop(name))
    assert _findings(llama_model, folder) == [("tensor_missing", name)]
    assert [f["code"] for f in baseline_damage(_structure(folder))] == ["tensor_missing"]
    with pytest.raises(CheckpointDamagedError, match="up_proj") as caught:
        HF_Causal_Adapter().load_model(str(folder), device="cpu")
    assert [f["tensor"] for f in caught.value.findings] == [name]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}], ids=["default", "asked to ignore"])
def test_a_tensor_of_another_shape_is_refused_by_name(
    llama_model: Path, rewrite_tensors: Copy, options: dict[str, Any]
) -> None:
    name = "model.layers.0.mlp.down_proj.weight"

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:, :-8].contiguous()

    folder = rewrite_tensors(llama_model, cut)
    assert ("tensor_shape", name) in _findings(llama_model, folder)
    assert [f["code"] for f in baseline_damage(_structure(folder))] == ["tensor_shape"]
    with pytest.raises(CheckpointDamagedError) as caught:
        HF_Causal_Adapter().load_model(str(folder), device="cpu", **options)
    assert [f["tensor"] for f in caught.value.findings] == [name]


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_single_non_finite_value_is_found(llama_model: Path, rewrite_tensors: Copy, value: float) -> None:
    name = "model.norm.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][7] = value

    folder = rewrite_tensors(llama_model, spoil)
    assert _findings(llama_model, folder) == [("non_finite", name)]
    assert [f["tensor"] for f in baseline_damage(_structure(folder))] == [name]


def test_a_tensor_of_the_largest_finite_values_is_finite(llama_model: Path, rewrite_tensors: Copy) -> None:
    folder = rewrite_tensors(llama_model, lambda t: t["model.norm.weight"].fill_(65504))
    assert baseline_damage(_structure(folder)) == []


@pytest.mark.slow
def test_an_extra_tensor_is_unexpected(llama_model: Path, rewrite_tensors: Copy) -> None:
    folder = rewrite_tensors(llama_model, lambda t: t.update({"model.layers.0.mlp.extra.weight": torch.ones(2)}))
    assert _findings(llama_model, folder) == [("tensor_unexpected", "model.layers.0.mlp.extra.weight")]


# -- what is no difference --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_saved_copy_is_the_same_checkpoint(demo_model: Path, llama_model: Path, copy_model: Copy) -> None:
    for source in (demo_model, llama_model):
        for options in ({}, {"max_shard_size": "500KB"}):
            folder = copy_model(source, **options)
            assert _findings(source, folder) == []
            assert _structure(folder).weights_digest() == _structure(source).weights_digest()


@pytest.mark.slow
def test_a_hub_file_without_the_prefix_is_the_same(demo_model: Path, rewrite_tensors: Copy) -> None:
    """GPT-2's own files call `h.0.attn.c_attn.weight` what a re-save calls `transformer.h.0.attn.c_attn.weight`."""

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    folder = rewrite_tensors(demo_model, strip)
    assert "h.0.attn.c_attn.weight" in load_file(folder / "model.safetensors")
    assert _findings(demo_model, folder) == _findings(folder, demo_model) == []


@pytest.mark.slow
def test_buffers_that_the_architecture_ignores_are_no_finding(demo_model: Path, rewrite_tensors: Copy) -> None:
    mask = torch.tril(torch.ones(1, 1, 8, 8, dtype=torch.uint8))
    folder = rewrite_tensors(demo_model, lambda t: t.update({"h.0.attn.bias": mask}))
    assert _findings(demo_model, folder) == []


@pytest.mark.slow
def test_a_tied_head_may_be_stored_when_it_is_bit_equal(llama_model: Path, rewrite_tensors: Copy) -> None:
    def store(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    assert _findings(llama_model, rewrite_tensors(llama_model, store)) == []


@pytest.mark.slow
def test_a_tied_head_stored_with_other_values_is_untied(llama_model: Path, rewrite_tensors: Copy) -> None:
    def store(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][3, 3] += 1

    assert _findings(llama_model, rewrite_tensors(llama_model, store)) == [("untied", "lm_head.weight")]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_type_throughout_is_no_structural_finding(llama_model: Path, copy_model: Copy, dtype: Any) -> None:
    folder = copy_model(llama_model, lambda model: model.to(dtype))
    assert {t.dtype for t in _structure(folder).tensors} == {{torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]}
    assert _findings(llama_model, folder) == []


@pytest.mark.slow
def test_file_and_live_model_have_the_same_structure(demo_model: Path, llama_model: Path) -> None:
    for folder in (demo_model, llama_model):
        live = live_structure(HF_Causal_Adapter().load_model(str(folder), device="cpu", dtype="float16"))
        file = _structure(folder)
        assert live.tensors == file.tensors
        assert (live.norms, live.embedding_rows, live.output_rows) == (
            file.norms,
            file.embedding_rows,
            file.output_rows,
        )
        assert sorted(map(sorted, live.tied)) == sorted(map(sorted, file.tied))


# -- configuration ----------------------------------------------------------------------------------------------------


def _set(folder: Path, key: str, value: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if key == "rope_theta":
        config["rope_parameters"] = {**(config.get("rope_parameters") or {"rope_type": "default"}), key: value}
    else:
        config[key] = value
    path.write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("rope_theta", 500.0, "rope_parameters"),
        ("rms_norm_eps", 1e-3, "rms_norm_eps"),
        ("hidden_act", "gelu", "hidden_act"),
        ("num_attention_heads", 2, "num_attention_heads"),
        ("tie_word_embeddings", False, "tie_word_embeddings"),
    ],
)
def test_configuration_that_bears_on_behaviour_is_a_finding(
    llama_model: Path, tmp_path: Path, key: str, value: Any, named: str
) -> None:
    folder = Path(shutil.copytree(llama_model, tmp_path / "copy"))
    _set(folder, key, value)
    assert ("config_changed", named) in _findings(llama_model, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"),
    [("use_cache", False), ("transformers_version", "1.0"), ("pad_token_id", 5), ("attention_dropout", 0.3)],
)
def test_configuration_that_does_not_bear_on_behaviour_is_none(
    llama_model: Path, tmp_path: Path, key: str, value: Any
) -> None:
    folder = Path(shutil.copytree(llama_model, tmp_path / "copy"))
    _set(folder, key, value)
    assert _findings(llama_model, folder) == []


@pytest.mark.slow
def test_a_single_file_of_any_name_is_read(llama_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama_model, tmp_path / "copy"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "weights.safetensors")
    assert _findings(llama_model, folder) == []


@pytest.mark.slow
def test_a_tensor_stored_twice_with_other_values_is_a_finding_under_the_foreign_name(
    llama_model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(llama_model, tmp_path / "copy"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name.removeprefix("model.")] = tensors[name].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert _findings(llama_model, folder) == []
    tensors[name.removeprefix("model.")] *= 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert _findings(llama_model, folder) == [("tensor_unexpected", name.removeprefix("model."))]


# -- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
def test_tensors_come_one_by_one_whether_in_one_file_or_in_shards(
    llama_model: Path, copy_model: Copy, sharded: bool
) -> None:
    folder = copy_model(llama_model, max_shard_size="1MB") if sharded else llama_model
    tensors = open_checkpoint(folder).tensors()
    assert next(tensors)[0].endswith(".weight")
    stored = load_file(llama_model / "model.safetensors")
    seen = dict(open_checkpoint(folder).tensors())
    assert seen.keys() == stored.keys() and all(torch.equal(seen[name], stored[name]) for name in stored)


@pytest.mark.slow
def test_a_format_is_one_class_and_a_row(
    llama_model: Path, rewrite_tensors: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Arrays(NamedTuple):
        """Weights in numpy's own format."""

        folder: Path
        layout: Layout | None

        def structure(self) -> Structure:
            return structure_of(self.tensors(), self.layout, "file")

        def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
            with np.load(self.folder / "weights.npz") as arrays:
                for name in arrays:
                    yield name, torch.from_numpy(arrays[name])

    folder = rewrite_tensors(llama_model, lambda tensors: None)
    file = folder / "model.safetensors"
    np.savez(folder / "weights.npz", **{name: tensor.numpy() for name, tensor in load_file(file).items()})
    file.unlink()
    row = Format("arrays", lambda folder: (folder / "weights.npz").is_file(), Arrays)
    monkeypatch.setattr("invarlock.checkpoints.files.FORMATS", (*FORMATS, row))
    assert _structure(folder) == _structure(llama_model)


def test_a_name_that_nobody_knows_takes_no_longer_than_the_renames_that_apply_to_it() -> None:
    """Each rename was tried on what all before it had left, changed or not: twenty of them made three million names."""
    shapes = {"model.b.weight": (1,), "model.x": (1,)}
    renames = ((r"\bgamma$", "weight"), *((f"^q{number}_", "") for number in range(40)), (r"^old\.", "model."))
    layout = Layout(shapes, {"tied": "model.x"}, (), "model", (), (), None, None, False, renames)
    for name, own in {
        "model.x": "model.x", "x": "model.x", "tied": "tied", "model.b.gamma": "model.b.weight", "b.gamma": "model.b.weight",
        "old.b.gamma": "model.b.weight", "q3_q7_old.x": "model.x", "model.model.x": "model.x", "nobody": "nobody",
    }.items():  # fmt: skip
        assert layout.canonical(name) == own
