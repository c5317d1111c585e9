"""GGUF files are read as the checkpoint that they were made from: weights, configuration, tokenizer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gguf_files import Arrays, gguf_name, write_gguf
from invarlock.adapters.auto import HF_Auto_Adapter
from invarlock.checkpoints.files import open_checkpoint, resolve_folder
from invarlock.checkpoints.side import Loading, Side, read_side
from invarlock.core.exceptions import ModelLoadError
from invarlock.guards.invariants import InvariantsGuard

gguf = pytest.importorskip("gguf")


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    return dict(open_checkpoint(resolve_folder(str(file))).tensors())


def _side(path: Path) -> Side:
    return read_side(HF_Auto_Adapter(), str(path), Loading())


def _findings(baseline: Path, subject: Path) -> list[tuple[str, str]]:
    guard = InvariantsGuard()
    sides = (
        guard.stats_from(s.structure, s.behaviour, *s.tokenizer_facts, s.usage) for s in map(_side, (baseline, subject))
    )
    return [(finding["code"], finding["message"]) for finding in guard.pair(*sides)["findings"]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_a_file_is_read_under_dense_names_with_rotary_rows_in_their_order(
    kind: str, llama_model: Path, tmp_path: Path
) -> None:
    read = _tensors(write_gguf(llama_model, tmp_path / "m.gguf", kind))
    dense = load_file(llama_model / "model.safetensors")
    assert set(read) == set(dense)
    number = gguf.GGMLQuantizationType[kind]
    for name, tensor in dense.items():
        values = tensor.float().numpy()
        if values.ndim == 2 and values.shape[1] % gguf.GGML_QUANT_SIZES[number][0] == 0:  # rows are rounded one by one
            values = gguf.dequantize(gguf.quantize(values, number), number)
        assert read[name].dtype == torch.float32
        torch.testing.assert_close(read[name], torch.from_numpy(np.ascontiguousarray(values)), rtol=0, atol=1e-3)


@pytest.mark.slow
def test_the_same_values_are_the_same_checkpoint_with_the_same_tokenizer(llama_model: Path, tmp_path: Path) -> None:
    assert _findings(llama_model, write_gguf(llama_model, tmp_path / "m.gguf", "F16")) == []


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["llama-bpe", "qwen2"])
def test_another_pre_tokenizer_is_another_tokenizer(cut: str, llama_model: Path, tmp_path: Path) -> None:
    file = write_gguf(llama_model, tmp_path / "m.gguf", "F16", fields={"pre": cut})
    assert [code for code, _ in _findings(llama_model, file)] == ["E002"]


@pytest.mark.slow
def test_a_folder_with_one_file_is_that_file_and_of_several_one_must_be_named(
    llama_model: Path, tmp_path: Path
) -> None:
    file = write_gguf(llama_model, tmp_path / "a.gguf", "F16")
    assert resolve_folder(str(tmp_path)) == resolve_folder(str(file))
    (tmp_path / "b.gguf").write_bytes(file.read_bytes())
    with pytest.raises(ModelLoadError, match=r"2 GGUF files \(a.gguf, b.gguf\)"):
        resolve_folder(str(tmp_path))


@pytest.mark.slow
def test_numbered_shards_are_one_checkpoint_and_an_absent_one_is_named(llama_model: Path, tmp_path: Path) -> None:
    write_gguf(llama_model, tmp_path / "m.gguf", "F16", shards=3)
    assert set(_tensors(tmp_path)) == set(load_file(llama_model / "model.safetensors"))
    last = sorted(tmp_path.glob("*.gguf"))[-1]
    last.unlink()
    with pytest.raises(ModelLoadError, match=last.name):
        resolve_folder(str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("keep", [3, 40, 5000, 1_000_000])
def test_a_truncated_file_is_refused_by_name(keep: int, llama_model: Path, tmp_path: Path) -> None:
    file = write_gguf(llama_model, tmp_path / "m.gguf", "Q8_0")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match=r"m\.gguf cannot be read .*copy it again"):
        resolve_folder(str(file))


def test_an_architecture_that_is_not_read_is_neither_damage_nor_a_verdict(llama_model: Path, tmp_path: Path) -> None:
    file = write_gguf(llama_model, tmp_path / "m.gguf", "F16", architecture="rwkv6")
    with pytest.raises(ModelLoadError, match="rwkv6") as caught:
        resolve_folder(str(file))
    assert caught.value.code == "UNSUPPORTED-FORMAT"


def _config(file: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((resolve_folder(str(file)) / "config.json").read_text())
    return config


def _stretch(factor: float) -> Arrays:
    """The factors of Llama 3.1's positions for heads of 32: 1 for short waves, `factor` for long ones, and between."""
    waves = 2 * math.pi * 10000.0 ** (np.arange(16) / 16)
    smooth = np.clip((8192 / waves - 1) / 3, 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)}


@pytest.mark.slow
def test_stretched_positions_are_known_again(llama_model: Path, tmp_path: Path) -> None:
    file = write_gguf(llama_model, tmp_path / "m.gguf", "F16", change=lambda tensors: tensors.update(_stretch(8)))
    rope = _config(file)["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("llama3", 8.0, 10000.0)
    assert "rope_freqs.weight" not in _tensors(file)


@pytest.mark.slow
def test_positions_stretched_in_an_unknown_way_are_not_guessed(llama_model: Path, tmp_path: Path) -> None:
    odd = {"rope_freqs.weight": np.linspace(1, 5, 16, dtype=np.float32)}
    file = write_gguf(llama_model, tmp_path / "m.gguf", "F16", change=lambda tensors: tensors.update(odd))
    with pytest.raises(ModelLoadError, match="stretches positions") as caught:
        resolve_folder(str(file))
    assert caught.value.code == "UNSUPPORTED-FORMAT"


@pytest.mark.slow
def test_a_tensor_that_the_file_lacks_is_missing_and_one_too_many_unexpected(llama_model: Path, tmp_path: Path) -> None:
    gone, odd = "model.layers.1.mlp.up_proj.weight", {"blk.0.odd.weight": np.ones((2, 2), dtype=np.float32)}

    def change(tensors: Arrays) -> None:
        del tensors[gguf_name(gone)]
        tensors.update(odd)

    codes = _findings(llama_model, write_gguf(llama_model, tmp_path / "m.gguf", "F16", change=change))
    assert {code for code, _ in codes} >= {"tensor_missing", "tensor_unexpected"}
    assert any(gone in message for _, message in codes)
