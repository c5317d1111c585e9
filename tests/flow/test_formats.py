"""Models that are shipped packed, or as an adapter: measured as the weights that they stand for, and damage has a name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from certification import Certify, reasons
from gguf_files import Arrays, write_gguf
from invarlock.adapters.hf import HF_Causal_Adapter
from invarlock.checkpoints.files import resolve_folder
from invarlock.core.exceptions import CheckpointDamagedError, ModelLoadError

Tensors = dict[str, torch.Tensor]
MATRIX = "model.layers.1.self_attn.q_proj"
GROUP = 16
WEIGHTS = "adapter_model.safetensors"


def _nibbles_to_words(codes: torch.Tensor) -> torch.Tensor:
    """Pack each eight codes of a row into one int32, lowest first."""
    words = sum(codes[:, place::8].long() << 4 * place for place in range(8))
    assert isinstance(words, torch.Tensor)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()


def _gptq(weight: torch.Tensor) -> Tensors:
    """Round to 4 bits in act order: the columns of a group are not neighbours."""
    rows, columns = weight.shape
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(0)) % (columns // GROUP)
    scales = torch.stack([weight[:, order == group].abs().amax(1) / 7 for group in range(columns // GROUP)], 1).half()
    codes = (weight / scales[:, order]).round().clamp(-8, 7) + 8
    zeros = torch.full((columns // GROUP, rows // 8), 0x77777777, dtype=torch.int32)
    packed = {"qweight": _nibbles_to_words(codes).T, "qzeros": zeros, "scales": scales.T, "g_idx": order.int()}
    return {name: tensor.contiguous() for name, tensor in packed.items()}


def _int8(weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax(1) / 127
    return {"weight": (weight / scale[:, None]).round().to(torch.int8), "SCB": scale * 127}


def _fp8(weight: torch.Tensor) -> Tensors:
    blocks = weight.view(len(weight) // GROUP, GROUP, -1, GROUP)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    codes = (blocks / scale).view(weight.shape).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale.view(len(weight) // GROUP, -1).contiguous()}


FORMATS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], Tensors]]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "desc_act": True, "sym": True}, _gptq),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, _int8),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [GROUP, GROUP]}, _fp8),
}


@pytest.fixture(scope="session")
def packed(llama_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Pack the projections of attention (4 bits are harmless there), and then `change` the stored tensors."""

    def build(kind: str, change: Callable[[Tensors], object] = lambda tensors: None) -> Path:
        folder = tmp_path_factory.mktemp(kind) / "packed"
        shutil.copytree(llama_model, folder)
        settings, pack = FORMATS[kind]
        tensors: Tensors = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            if "self_attn" in name:
                base = name.removesuffix("weight")
                tensors |= {f"{base}{part}": value for part, value in pack(tensor.float()).items()}
            else:
                tensors[name] = tensor
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
        return folder

    return build


@pytest.mark.parametrize("kind", FORMATS)
def test_a_packed_model_passes_against_its_original_and_perfectly_against_itself(
    kind: str, packed: Callable[..., Path], llama_model: Path, certify_models: Certify
) -> None:
    folder = packed(kind)
    good = certify_models(folder, llama_model).certificate
    assert good["verdict"] == {"status": "PASS", "reasons": []}
    assert good["primary_metric"]["ratio_vs_baseline"] != 1.0
    assert (good["invariants"]["errors"], good["invariants"]["warnings"]) == ([], [])
    itself = certify_models(folder, folder).certificate
    assert itself["verdict"] == {"status": "PASS", "reasons": []}
    assert itself["primary_metric"]["ratio_vs_baseline"] == 1.0


def test_the_same_values_in_two_formats_are_the_same_model(
    packed: Callable[..., Path], tmp_path: Path, certify_models: Certify
) -> None:
    folder, dense = packed("gptq"), tmp_path / "dense"
    adapter = HF_Causal_Adapter()
    model = adapter.load_model(str(folder), "cpu")
    assert adapter.describe(model)["executed"] == "dequantized"
    adapter.save(model, dense)
    for path in folder.glob("tokenizer*"):
        shutil.copyfile(path, dense / path.name)
    certificate = certify_models(dense, folder).certificate
    assert certificate["verdict"]["status"] == "PASS"
    assert certificate["primary_metric"]["ratio_vs_baseline"] == 1.0


def _scales(kind: str) -> str:
    return f"{MATRIX}.{'scales' if kind == 'gptq' else 'SCB'}"


def _change(part: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{MATRIX}.{part}"] = how(tensors[f"{MATRIX}.{part}"]).contiguous()

    return change


def _with_nan(scales: torch.Tensor) -> torch.Tensor:
    scales.view(-1)[0] = float("nan")
    return scales


DAMAGE: dict[str, tuple[str, Callable[[Tensors], None]]] = {
    "sign of the scales": ("gptq", _change("scales", torch.neg)),
    "sign of the scales, int8": ("bitsandbytes", _change("SCB", torch.neg)),
    "shuffled codes": ("gptq", _change("qweight", lambda codes: codes.flip(0))),
    "shuffled codes, int8": ("bitsandbytes", _change("weight", lambda codes: codes.roll(7, 0))),
    "scales times four": ("gptq", _change("scales", lambda scales: scales * 4)),
    "NaN scale": ("gptq", _change("scales", _with_nan)),
    "NaN scale, int8": ("bitsandbytes", _change("SCB", _with_nan)),
    "zero points off by one": ("gptq", _change("qzeros", lambda zeros: zeros + 0x11111111)),
    "no group index": ("gptq", lambda tensors: tensors.__delitem__(f"{MATRIX}.g_idx")),
    "no scales": ("gptq", lambda tensors: tensors.__delitem__(f"{MATRIX}.scales")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_inside_packed_tensors_fails_and_names_the_matrix(
    damage: str, packed: Callable[..., Path], llama_model: Path, certify_models: Certify
) -> None:
    kind, change = DAMAGE[damage]
    certificate = certify_models(packed(kind, change), llama_model).certificate
    assert certificate["verdict"]["status"] == "FAIL"
    assert any(str(tensor).startswith(MATRIX) for _, tensor in reasons(certificate)), certificate["verdict"]


def test_a_packed_baseline_that_is_damaged_is_refused(packed: Callable[..., Path], certify_models: Certify) -> None:
    folder = packed("bitsandbytes", _change("SCB", _with_nan))
    with pytest.raises(CheckpointDamagedError, match=MATRIX):
        certify_models(folder, folder)


# --- GGUF -----------------------------------------------------------------------------------------------------------


def test_a_gguf_file_passes_against_its_original_and_perfectly_against_itself(
    llama_model: Path, tmp_path: Path, certify_models: Certify
) -> None:
    pytest.importorskip("gguf")
    file = write_gguf(llama_model, tmp_path / "m.gguf", "Q8_0")
    good = certify_models(file, llama_model).certificate
    assert good["verdict"] == {"status": "PASS", "reasons": []}
    assert good["primary_metric"]["ratio_vs_baseline"] != 1.0
    assert good["invariants"]["errors"] == []
    itself = certify_models(file, file).certificate
    assert itself["verdict"] == {"status": "PASS", "reasons": []}
    assert itself["primary_metric"]["ratio_vs_baseline"] == 1.0


def _blocks(tensors: Arrays) -> Arrays:
    """Return the scales (float16) and codes (int8) of a matrix in Q8_0, as views."""
    blocks = tensors["blk.1.attn_q.weight"].reshape(-1, 34)
    return {"scales": blocks[:, :2].view("<f2"), "codes": blocks[:, 2:].view("i1")}


GGUF_DAMAGE: dict[str, Callable[[Arrays], None]] = {
    "sign of the scales": lambda blocks: blocks["scales"].__imul__(-1),
    "scales times four": lambda blocks: blocks["scales"].__imul__(4),
    "NaN scale": lambda blocks: blocks["scales"].__setitem__(3, float("nan")),
    "shuffled codes": lambda blocks: blocks["codes"].__setitem__(slice(None), blocks["codes"][::-1].copy()),
}


@pytest.mark.parametrize("damage", GGUF_DAMAGE)
def test_damage_inside_a_gguf_file_fails_and_names_the_matrix(
    damage: str, llama_model: Path, tmp_path: Path, certify_models: Certify
) -> None:
    pytest.importorskip("gguf")
    file = write_gguf(
        llama_model, tmp_path / "m.gguf", "Q8_0", change=lambda tensors: GGUF_DAMAGE[damage](_blocks(tensors))
    )
    certificate = certify_models(file, llama_model).certificate
    assert certificate["verdict"]["status"] == "FAIL"
    assert any(str(tensor).startswith(MATRIX) for _, tensor in reasons(certificate)), certificate["verdict"]


# --- adapters --------------------------------------------------------------------------------------------------------


def _adapter(base: Path, folder: Path, *, size: float = 0.02, **settings: Any) -> Path:
    """A LoRA of rank 4 on the query projections, as its training would write it; `size` 0 has never been trained."""
    folder.mkdir(exist_ok=True)
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, weight in load_file(base / "model.safetensors").items():
        if name.endswith("q_proj.weight"):
            path = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(4, weight.shape[1], generator=generator) * size
            tensors[f"{path}.lora_B.weight"] = torch.randn(weight.shape[0], 4, generator=generator) * size
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
        "base_model_name_or_path": str(base), **settings,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_an_adapter_is_merged_and_what_it_touched_is_listed(
    llama_model: Path, tmp_path: Path, certify_models: Certify
) -> None:
    pytest.importorskip("peft")
    folder = _adapter(llama_model, tmp_path / "lora")
    merged = load_file(resolve_folder(str(folder)) / "model.safetensors")
    base, lora = (load_file(path) for path in (llama_model / "model.safetensors", folder / "adapter_model.safetensors"))
    path = f"base_model.model.{MATRIX}"
    by_hand = base[f"{MATRIX}.weight"].float() + 2 * lora[f"{path}.lora_B.weight"] @ lora[f"{path}.lora_A.weight"]
    torch.testing.assert_close(merged[f"{MATRIX}.weight"], by_hand)
    outcome = certify_models(folder, llama_model, intent="finetune")
    assert outcome.status == "PASS"
    assert outcome.certificate["primary_metric"]["ratio_vs_baseline"] != 1.0
    adapter = HF_Causal_Adapter()
    facts = adapter.describe(adapter.load_model(str(folder), "cpu"))["adapter"]
    assert facts["touched"] == sorted(name for name in base if name.endswith("q_proj.weight"))
    assert certify_models(folder, folder).certificate["primary_metric"]["ratio_vs_baseline"] == 1.0


@pytest.mark.slow
def test_a_merge_that_changed_nothing_is_said(llama_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    adapter = HF_Causal_Adapter()
    facts = adapter.describe(adapter.load_model(str(_adapter(llama_model, tmp_path / "lora", size=0.0)), "cpu"))
    assert facts["adapter"]["touched"] == []
    assert "changed no tensor" in facts["notes"][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 2}}, 0.5),
    ],
    ids=["alpha/r", "alpha/sqrt(r)", "of one layer"],
)
def test_an_adapter_is_merged_with_the_scale_that_its_configuration_says(
    settings: dict[str, Any], scale: float, llama_model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    folder = _adapter(llama_model, tmp_path / "lora", **settings)
    merged, lora = load_file(resolve_folder(str(folder)) / "model.safetensors"), load_file(folder / WEIGHTS)
    base, path = load_file(llama_model / "model.safetensors")[f"{MATRIX}.weight"], f"base_model.model.{MATRIX}"
    delta = lora[f"{path}.lora_B.weight"] @ lora[f"{path}.lora_A.weight"]
    torch.testing.assert_close(merged[f"{MATRIX}.weight"], base.float() + scale * delta)


@pytest.mark.slow
def test_a_merge_with_another_scale_than_the_adapters_is_refused(
    llama_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = pytest.importorskip("peft.tuners.lora.layer").Linear
    right = layer.get_delta_weight
    monkeypatch.setattr(layer, "get_delta_weight", lambda self, adapter: right(self, adapter) / 2)
    with pytest.raises(ModelLoadError, match=r"q_proj moved by 0\.5 times what the adapter says \(scale 4\)"):
        resolve_folder(str(_adapter(llama_model, tmp_path / "lora", use_rslora=True)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"base_model_name_or_path": "/no/such/base"}, "base of the adapter"),
        ({"target_modules": ["k_proj"]}, "match nothing in the base|no attribute|moved by"),
        ({"target_modules": ["qkv_proj"]}, "not found in the base model"),
    ],
    ids=["no base", "other modules", "fused projections"],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    settings: dict[str, Any], told: str, llama_model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    with pytest.raises(ModelLoadError, match=told):
        resolve_folder(str(_adapter(llama_model, tmp_path / "lora", **settings)))


def test_base_weights_beside_an_adapter_are_never_measured_without_it(
    llama_model: Path, tmp_path: Path, certify_models: Certify
) -> None:
    both = Path(shutil.copytree(llama_model, tmp_path / "both"))
    _adapter(llama_model, both)
    with pytest.raises(ModelLoadError, match=r"base weights .* and an adapter"):
        certify_models(both, llama_model)
