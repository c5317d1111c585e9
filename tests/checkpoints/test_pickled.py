"""Pickled weights are read as plain tensors, and nothing in them is run."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from invarlock.adapters.hf import HF_Causal_Adapter
from invarlock.checkpoints.files import open_checkpoint, read_structure
from invarlock.core.exceptions import ModelLoadError


@pytest.fixture
def pickled(llama_model: Path, tmp_path: Path) -> Path:
    """The trained Llama with its weights in `pytorch_model.bin`."""
    folder = Path(shutil.copytree(llama_model, tmp_path / "pickled"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.slow
def test_the_same_weights_are_the_same_checkpoint_and_the_same_model(pickled: Path, llama_model: Path) -> None:
    assert read_structure(pickled, None).weights_digest() == read_structure(llama_model, None).weights_digest()
    ours, theirs = (HF_Causal_Adapter().load_model(str(path), "cpu").state_dict() for path in (pickled, llama_model))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("mapped", [True, False], ids=["archive", "form before torch 1.6"])
def test_shards_and_their_index_are_one_checkpoint(mapped: bool, pickled: Path, llama_model: Path) -> None:
    tensors = sorted(torch.load(pickled / "pytorch_model.bin", weights_only=True).items())
    (pickled / "pytorch_model.bin").unlink()
    where = {}
    for place, part in enumerate((tensors[::2], tensors[1::2]), start=1):
        file = f"pytorch_model-{place:05d}-of-00002.bin"
        torch.save(dict(part), pickled / file, _use_new_zipfile_serialization=mapped)
        where |= dict.fromkeys(dict(part), file)
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    assert read_structure(pickled, None).weights_digest() == read_structure(llama_model, None).weights_digest()
    (pickled / file).unlink()
    with pytest.raises(ModelLoadError, match=file):
        read_structure(pickled, None)


class _Runs:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (str(self.mark),)


def test_what_would_be_run_is_refused_and_not_run(pickled: Path, tmp_path: Path) -> None:
    mark = tmp_path / "run"
    torch.save({"weight": torch.ones(2), "more": _Runs(mark)}, pickled / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="more than plain tensors") as caught:
        list(open_checkpoint(pickled).tensors())
    assert caught.value.code == "UNSUPPORTED-FORMAT"
    assert not mark.exists()


@pytest.mark.parametrize("content", ["half", b"", b"no pickle", pickle.dumps([1, 2])])
def test_a_file_that_holds_no_weights_is_refused_by_name(content: object, pickled: Path) -> None:
    path = pickled / "pytorch_model.bin"
    data = path.read_bytes()
    path.write_bytes(content if isinstance(content, bytes) else data[: len(data) // 2])
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin"):
        list(open_checkpoint(pickled).tensors())


def test_weights_in_a_form_that_is_not_read_are_named_with_their_method(pickled: Path) -> None:
    (pickled / "pytorch_model.bin").rename(pickled / "qmodel.pt")
    config = json.loads((pickled / "config.json").read_text())
    (pickled / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "hqq"}}))
    with pytest.raises(ModelLoadError, match=r"qmodel\.pt \(quant_method 'hqq'\)") as caught:
        read_structure(pickled, None)
    assert caught.value.code == "UNSUPPORTED-FORMAT"
