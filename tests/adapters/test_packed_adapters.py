"""Each packing has its adapter, which `auto` chooses by the configuration, and refuses every other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from invarlock.adapters import HF_AWQ_Adapter, HF_BNB_Adapter, HF_Causal_Adapter, HF_GPTQ_Adapter
from invarlock.adapters.auto import HF_Auto_Adapter
from invarlock.core import registry
from invarlock.core.exceptions import AdapterError

PACKED = (HF_BNB_Adapter, HF_GPTQ_Adapter, HF_AWQ_Adapter)
SETTINGS: dict[str, dict[str, Any] | None] = {
    "hf_bnb": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "hf_gptq": {"quant_method": "gptq", "bits": 4},
    "hf_awq": {"quant_method": "awq", "bits": 4, "version": "gemm"},
    "hf_gptq, by AutoRound": {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"},
    "hf_awq, by AutoRound": {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_awq"},
    "hf_causal": {"quant_method": "fp8"},
    "hf_causal, plain": None,
}


def _folder(settings: dict[str, Any] | None, llama_model: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(llama_model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ({"quantization_config": settings} if settings else {})))
    return folder


@pytest.mark.parametrize("kind", SETTINGS)
def test_auto_chooses_by_the_packing_and_the_others_refuse(kind: str, llama_model: Path, tmp_path: Path) -> None:
    folder, name = str(_folder(SETTINGS[kind], llama_model, tmp_path)), kind.split(",")[0]
    assert HF_Auto_Adapter().select(folder).name == name
    assert [adapter.name for adapter in (kind() for kind in PACKED) if adapter.can_handle(folder)] == [
        n for n in (name,) if n != "hf_causal"
    ]
    assert HF_Causal_Adapter().can_handle(folder)
    for adapter in (kind() for kind in PACKED if kind.name != name):
        with pytest.raises(AdapterError, match=f"{adapter.name} expects a causal model packed by"):
            adapter.load_model(folder, "cpu")


@pytest.mark.parametrize("kind", PACKED)
def test_each_is_registered_under_its_name(kind: type[HF_Causal_Adapter]) -> None:
    assert type(registry.adapters.create(kind.name)) is kind
