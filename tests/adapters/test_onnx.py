"""An ONNX file is run by onnxruntime, its weights are those of its initializers, and what is wrong with it has a name."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from certification import Certify, reasons
from invarlock.adapters.auto import HF_Auto_Adapter
from invarlock.checkpoints.files import open_checkpoint
from invarlock.core import registry
from invarlock.core.exceptions import AdapterError, DependencyError, ModelLoadError

MATRIX = "model.layers.1.self_attn.q_proj.weight"
HERE = all(map(importlib.util.find_spec, ("onnx", "onnxruntime", "onnxscript")))
needs_onnx = pytest.mark.skipif(not HERE, reason="needs onnx, onnxruntime and, to export, onnxscript")
#: exports in a process of its own, where the exporter's warnings are no errors
EXPORT = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="eager")
model.config.use_cache = False
sizes = {"input_ids": {0: torch.export.Dim("rows", min=1, max=64), 1: torch.export.Dim("tokens", min=2, max=512)}}
torch.onnx.export(
    model.eval(), (torch.arange(5, 37).reshape(2, 16),), sys.argv[2], input_names=["input_ids"], output_names=["logits"],
    dynamo=True, dynamic_shapes=sizes, external_data=False,
)
"""


@pytest.fixture(scope="session")
def graph(llama_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test model as torch exports it."""
    folder = tmp_path_factory.mktemp("onnx") / "graph"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(llama_model / name, folder / name)
    command = [sys.executable, "-c", EXPORT, str(llama_model), str(folder / "model.onnx")]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def _changed(graph: Path, target: Path, matrix: str) -> Path:
    """Flip the sign of one matrix of a copy."""
    import onnx

    from invarlock.checkpoints.onnx import weight_names

    shutil.copytree(graph, target)
    model = onnx.load(target / "model.onnx")
    stored = {name: key for key, (name, _) in weight_names(model).items()}[matrix]
    for one in model.graph.initializer:
        if one.name == stored:
            one.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(one), stored))
    onnx.save(model, target / "model.onnx")
    return target


@needs_onnx
@pytest.mark.slow
def test_the_weights_of_a_graph_are_those_that_it_was_exported_from(graph: Path, llama_model: Path) -> None:
    read, dense = dict(open_checkpoint(graph).tensors()), load_file(llama_model / "model.safetensors")
    assert set(read) - {"lm_head.weight"} == set(dense) - {"model.embed_tokens.weight"}
    assert all(torch.equal(read[name], dense[name].float()) for name in set(read) & set(dense))
    assert HF_Auto_Adapter().select(str(graph)).name == "hf_causal_onnx"


@needs_onnx
def test_a_graph_passes_against_its_original_and_perfectly_against_itself(
    graph: Path, llama_model: Path, certify_models: Certify
) -> None:
    good = certify_models(graph, llama_model).certificate
    facts = good["meta"]["subject_model"]["describe"]
    assert (facts["executed"], facts["runtime"]["package"]) == ("native", "onnxruntime")
    assert facts["runtime"]["kl"] < 1e-6
    assert good["primary_metric"]["ratio_vs_baseline"] == pytest.approx(1.0, abs=1e-4)
    assert not good["spectral"]["errors"] and not good["invariants"]["errors"]
    itself = certify_models(graph, graph).certificate
    assert itself["primary_metric"]["ratio_vs_baseline"] == 1.0


@needs_onnx
def test_damage_in_a_graph_fails_and_names_the_matrix(
    graph: Path, llama_model: Path, tmp_path: Path, certify_models: Certify
) -> None:
    certificate = certify_models(_changed(graph, tmp_path / "damaged", MATRIX), llama_model).certificate
    assert certificate["verdict"]["status"] == "FAIL"
    assert MATRIX in [tensor for _, tensor in reasons(certificate)]


@needs_onnx
@pytest.mark.slow
def test_weights_beside_a_graph_and_a_graph_that_is_damaged_are_refused(graph: Path, tmp_path: Path) -> None:
    adapter = registry.adapters.create("hf_causal_onnx")
    both = Path(shutil.copytree(graph, tmp_path / "both"))
    (both / "model.safetensors").touch()
    with pytest.raises(AdapterError, match="safetensors beside"):
        adapter.load_model(str(both))
    cut = Path(shutil.copytree(graph, tmp_path / "cut"))
    (cut / "model.onnx").write_bytes((graph / "model.onnx").read_bytes()[:5000])
    with pytest.raises(ModelLoadError, match=r"model\.onnx"):
        adapter.load_model(str(cut))


@pytest.mark.skipif(importlib.util.find_spec("onnx") is not None, reason="onnx is installed")
def test_without_onnxruntime_the_extra_is_named(llama_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DependencyError, match=r"invarlock\[onnx\]"):
        registry.adapters.create("hf_causal_onnx")
    shutil.copyfile(llama_model / "config.json", tmp_path / "config.json")
    (tmp_path / "model.onnx").touch()
    with pytest.raises(DependencyError, match=r"invarlock\[onnx\]"):
        next(iter(open_checkpoint(tmp_path).tensors()))
