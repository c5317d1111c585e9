"""A packed model is run by its format's own runtime where that is installed, and runtime and reader prove one another."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from certification import Certify
from invarlock.adapters import HF_Causal_Adapter
from invarlock.adapters.native import hand_over
from invarlock.core.exceptions import ModelLoadError

IDS = [*range(5, 69)]
MATRIX = "model.layers.1.self_attn.q_proj"


class RoundsActivations(torch.nn.Linear):
    """What a kernel of 8 bits does: the rows of its input are rounded to 255 levels."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        step = inputs.abs().amax(-1, keepdim=True) / 127
        return super().forward((inputs / step).round() * step)


@pytest.fixture
def load(llama_model: Path) -> Callable[[], PreTrainedModel]:
    return lambda: AutoModelForCausalLM.from_pretrained(llama_model, dtype=torch.float32).eval()


def _runtime(model: PreTrainedModel) -> set[str]:
    """Turn the projections of attention into those of a runtime; return their names."""
    names = {name for name, module in model.named_modules() if name.endswith("_proj") and "self_attn" in name}
    for name in names:
        model.get_submodule(name).__class__ = RoundsActivations
    return names


def _logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([IDS])).logits
    return logits


@pytest.mark.slow
def test_a_model_runs_as_its_runtime_does_and_keeps_its_dense_weights(load: Callable[[], PreTrainedModel]) -> None:
    model, native = load(), load()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed, dense = _runtime(native), _logits(model)
    facts = hand_over(model, native, packed, IDS, rounds_activations=True)
    assert 0 < facts["kl"] < 1e-2 and facts["tokens"] == len(IDS)
    assert torch.equal(_logits(model), _logits(native)) and not torch.equal(_logits(model), dense)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("rounds_activations", [False, True])
def test_a_runtime_that_reads_other_weights_than_the_reader_is_refused(
    rounds_activations: bool, load: Callable[[], PreTrainedModel]
) -> None:
    model, native = load(), load()
    packed = _runtime(native) if rounds_activations else {MATRIX}
    with torch.no_grad():  # as where zero points of 4 bits are read one off
        for name, weight in native.named_parameters():
            if name.endswith("_proj.weight"):
                weight += weight.abs().amax(1, keepdim=True) / 7
    with pytest.raises(ModelLoadError, match="one of the two misreads it"):
        hand_over(model, native, packed, IDS, rounds_activations)


@pytest.mark.slow
def test_a_model_that_computes_nothing_finite_is_left_to_its_verdict(load: Callable[[], PreTrainedModel]) -> None:
    model, native = load(), load()
    with torch.no_grad():
        for one in (model, native):
            one.get_submodule(MATRIX).weight.mul_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        hand_over(model, native, {MATRIX}, IDS, rounds_activations=False)


@pytest.mark.slow
def test_a_runtime_that_packs_more_than_linear_layers_is_not_taken_over_by_halves(
    load: Callable[[], PreTrainedModel],
) -> None:
    model, native = load(), load()
    before = _logits(model)
    with torch.no_grad():
        native.get_input_embeddings().weight.mul_(1.001)
    with pytest.raises(ValueError, match="more of it"):
        hand_over(model, native, {MATRIX}, IDS, rounds_activations=True)
    assert torch.equal(_logits(model), before)


@pytest.mark.parametrize("kind", ["load_in_8bit", "load_in_4bit"])
def test_bitsandbytes_runs_its_own_files(kind: str, llama_model: Path, tmp_path: Path, certify_models: Certify) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(**{kind: True}, bnb_4bit_quant_type="nf4")
    packed = AutoModelForCausalLM.from_pretrained(llama_model, quantization_config=settings, device_map={"": "cpu"})
    packed.save_pretrained(tmp_path / "packed")
    for path in llama_model.glob("tokenizer*"):
        shutil.copyfile(path, tmp_path / "packed" / path.name)
    certificate = certify_models(tmp_path / "packed", tmp_path / "packed").certificate
    facts = certificate["meta"]["subject_model"]["describe"]
    assert facts["executed"] == "native", facts["notes"]
    assert facts["runtime"]["package"] == "bitsandbytes"
    assert facts["runtime"]["kl"] < (1e-2 if kind == "load_in_8bit" else 1e-3)
    assert certificate["verdict"]["status"] == "PASS" and certificate["primary_metric"]["ratio_vs_baseline"] == 1.0
    stored = HF_Causal_Adapter().load_model(str(tmp_path / "packed"), "cpu")
    dense = load_file(llama_model / "model.safetensors")[f"{MATRIX}.weight"].float()
    assert (stored.get_submodule(MATRIX).weight - dense).abs().max() < dense.abs().max() / 4
