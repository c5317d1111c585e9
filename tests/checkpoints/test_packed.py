"""Packed weights are read as the matrices that they stand for. Each file is packed here bit by bit, in plain Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from invarlock.checkpoints.files import open_checkpoint, read_structure
from invarlock.checkpoints.packed import PackedFolder, packing_facts
from invarlock.checkpoints.sanity import check_config
from invarlock.checkpoints.shards import SafetensorsFolder
from invarlock.core.exceptions import ModelLoadError

ROWS, COLUMNS, GROUP = 40, 64, 16
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
Built = tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor]  # settings, stored tensors, the dense matrix


def _random(*shape: int, low: int = 0, high: int = 16) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape) + high))


def _scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) + 0.5


def _words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack each row into int32 words by way of one long whole number."""
    rows = []
    for row in codes.tolist():
        number = sum(code << place * bits for place, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        words = [(number >> 32 * place) & 0xFFFFFFFF for place in range(count)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def _each(values: torch.Tensor, group: int = GROUP) -> torch.Tensor:
    """Repeat the values of groups of columns by hand."""
    return torch.stack([values[:, column // group] for column in range(values.shape[1] * group)], 1)


def _gptq(bits: int = 4, version: str = "gptq", *, act_order: bool = False, method: str = "gptq") -> Built:
    codes, groups = _random(ROWS, COLUMNS, high=2**bits), COLUMNS // GROUP
    zeros, scales = _random(ROWS, groups, low=1, high=2**bits), _scales(ROWS, groups)
    order = torch.arange(COLUMNS) // GROUP
    if act_order:
        order = order[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0))]
    dense = (codes - zeros[:, order]) * scales[:, order]
    stored = zeros - (0 if version in ("gptq_v2", "auto_round") else 1)
    parts = {"qweight": _words(codes, bits).T, "qzeros": _words(stored.T, bits), "scales": scales.T}
    key = "checkpoint_format" if method == "gptq" else "packing_format"
    settings = {"quant_method": method, key: version, "bits": bits, "sym": False, "desc_act": act_order}
    return settings, parts | ({"g_idx": order.int()} if act_order else {}), dense


def _gptq_part(bits: int = 4, *, indexed: bool) -> Built:
    """56 columns in groups of 24, of which the last has 8."""
    codes, zeros, scales, order = (
        _random(ROWS, 56, high=2**bits),
        2 ** (bits - 1),
        _scales(ROWS, 3),
        torch.arange(56) // 24,
    )
    stored = torch.full((3, ROWS), zeros - 1)
    parts = {"qweight": _words(codes, bits).T, "qzeros": _words(stored, bits), "scales": scales.T}
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 24, "sym": True, "desc_act": False}
    return settings, parts | ({"g_idx": order.int()} if indexed else {}), (codes - zeros) * scales[:, order]


def _awq(settings: dict[str, Any]) -> Built:
    codes, groups = _random(COLUMNS, ROWS), COLUMNS // GROUP
    zeros, scales = _random(groups, ROWS), _scales(groups, ROWS)
    order = [8 * word + place for word in range(ROWS // 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
    dense = (codes.T - _each(zeros.T)) * _each(scales.T)
    return (
        settings,
        {"qweight": _words(codes[:, order], 4), "qzeros": _words(zeros[:, order], 4), "scales": scales},
        dense,
    )


def _ct(kind: str, **weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": {"weights": weights}}}


def _aligned(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack each row as compressed-tensors did until 0.14: what is left of a word is empty."""
    return torch.cat([_words(part, bits) for part in codes.split(32 // bits, 1)], 1)


def _ct_packed(
    bits: int = 4, *, zeros: bool = False, act_order: bool = False, pack: Callable[..., torch.Tensor] = _words
) -> Built:
    half, groups = 1 << bits - 1, COLUMNS // GROUP
    codes, scales = _random(ROWS, COLUMNS, high=2 * half), _scales(ROWS, groups)
    order = torch.arange(COLUMNS) // GROUP
    if act_order:
        order = order[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0))]
    points = _random(ROWS, groups, high=2 * half) if zeros else torch.full((ROWS, groups), half)
    parts = {
        "weight_packed": pack(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([ROWS, COLUMNS]),
    }
    parts |= {"weight_zero_point": pack(points.T, bits).T} if zeros else {}
    parts |= {"weight_g_idx": order.int()} if act_order else {}
    return _ct("pack-quantized", num_bits=bits), parts, (codes - points[:, order]) * scales[:, order]


def _ct_unset() -> Built:
    settings, parts, dense = _ct_packed()
    return settings, parts | {"weight_g_idx": torch.full((COLUMNS,), -1, dtype=torch.int32)}, dense


def _fp4(packing: str) -> Built:
    codes = _random(ROWS, COLUMNS)
    values = torch.where(codes > 7, -1, 1) * FP4[codes % 8]
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    if packing == "mxfp4-pack-quantized":
        exponents = _random(ROWS, COLUMNS // 32, low=120, high=132)
        parts = {"weight_packed": packed, "weight_scale": exponents.to(torch.uint8)}
        return _ct(packing), parts, values * _each(2.0 ** (exponents - 127), 32)
    scales, divisor = _scales(ROWS, COLUMNS // 16).to(torch.float8_e4m3fn), torch.tensor([3.0])
    parts = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": divisor}
    return _ct(packing), parts, values * _each(scales.float() / divisor)


def _bytes(settings: dict[str, Any], scale: str, *shape: int, dtype: torch.dtype = torch.float8_e4m3fn) -> Built:
    codes, scales = _random(ROWS, COLUMNS, low=-100, high=100).to(dtype), _scales(*shape)
    high, wide = settings.get("weight_block_size", (-(-ROWS // shape[0]), -(-COLUMNS // shape[-1])))
    dense = codes.float().clone()
    for row in range(ROWS):
        for column in range(COLUMNS):
            dense[row, column] *= scales[row // high, column // wide]
    return settings, {"weight": codes, scale: scales}, dense


def _mxfp8() -> Built:
    codes, exponents = (
        _random(ROWS, COLUMNS, low=-100, high=100).to(torch.float8_e4m3fn),
        _random(ROWS, 2, low=120, high=132),
    )
    parts = {"weight": codes, "weight_scale": exponents.to(torch.uint8)}
    return _ct("mxfp8-quantized"), parts, codes.float() * _each(2.0 ** (exponents - 127), 32)


def _bnb8() -> Built:
    codes, scales = _random(ROWS, COLUMNS, low=-127, high=128).to(torch.int8), _scales(ROWS)
    parts = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return {"quant_method": "bitsandbytes", "load_in_8bit": True}, parts, codes.float() * scales[:, None] / 127


def _nf4(*, nested: bool) -> Built:
    codes, table, blocks = _random(ROWS * COLUMNS), torch.linspace(-1, 1, 16), ROWS * COLUMNS // 64
    facts: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "shape": [ROWS, COLUMNS], "dtype": "float32"}
    parts = {"weight": (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None], "weight.quant_map": table}
    scales = _scales(blocks)
    parts["weight.absmax"] = scales
    if nested:
        facts |= {"nested_blocksize": 16, "nested_offset": 0.25}
        outer, inner, index = torch.linspace(0, 1, 256), _scales(-(-blocks // 16)), _random(blocks, high=256)
        parts |= {
            "weight.absmax": index.to(torch.uint8),
            "weight.nested_absmax": inner,
            "weight.nested_quant_map": outer,
        }
        scales = torch.stack([outer[code] * inner[place // 16] + 0.25 for place, code in enumerate(index)])
    parts["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    dense = torch.stack([table[code] * scales[place // 64] for place, code in enumerate(codes)]).view(ROWS, COLUMNS)
    return {"quant_method": "bitsandbytes", "load_in_4bit": True}, parts, dense


def _torchao() -> Built:
    codes, scales = _random(ROWS, COLUMNS, low=-8, high=8), _scales(ROWS, COLUMNS // GROUP)
    zeros = _random(ROWS, COLUMNS // GROUP, low=-2, high=3)
    parts = {"_weight_qdata": codes.to(torch.int8), "_weight_scale": scales, "_weight_zero_point": zeros.to(torch.int8)}
    return {"quant_method": "torchao"}, parts, (codes - _each(zeros)) * _each(scales)


BUILT: dict[str, Callable[[], Built]] = {
    **{f"gptq of {bits} bits": lambda bits=bits: _gptq(bits) for bits in (2, 3, 4, 8)},
    "gptq v2": lambda: _gptq(version="gptq_v2"),
    "gptq in act order": lambda: _gptq(act_order=True),
    "gptq without an index, the last group a part": lambda: _gptq_part(indexed=False),
    "gptq of 3 bits, the last word a part": lambda: _gptq_part(3, indexed=True),
    "awq": lambda: _awq({"quant_method": "awq", "version": "gemm"}),
    "auto-round as gptq": lambda: _gptq(version="auto_round:auto_gptq", method="auto-round"),
    "auto-round as awq": lambda: _awq({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}),
    "auto-round's own": lambda: _gptq(version="auto_round", method="auto-round"),
    **{f"compressed-tensors of {bits} bits": lambda bits=bits: _ct_packed(bits) for bits in (3, 4, 8)},
    "compressed-tensors, asymmetric": lambda: _ct_packed(zeros=True),
    **{
        f"compressed-tensors of {bits} bits in whole words": lambda bits=bits: _ct_packed(
            bits, zeros=True, pack=_aligned
        )
        for bits in (3, 5, 7)
    },
    "compressed-tensors with an unset order": _ct_unset,
    "compressed-tensors in act order": lambda: _ct_packed(act_order=True),
    "nvfp4": lambda: _fp4("nvfp4-pack-quantized"),
    "mxfp4 of compressed-tensors": lambda: _fp4("mxfp4-pack-quantized"),
    "mxfp8 of compressed-tensors": lambda: _mxfp8(),
    "int8 rows": lambda: _bytes(_ct("int-quantized"), "weight_scale", ROWS, 1, dtype=torch.int8),
    "float8 tensor": lambda: _bytes(_ct("float-quantized"), "weight_scale", 1, 1),
    "float8 blocks": lambda: _bytes(
        {"quant_method": "fp8", "weight_block_size": [16, 24]}, "weight_scale_inv", -(-ROWS // 16), -(-COLUMNS // 24)
    ),
    "bitsandbytes int8": _bnb8,
    "bitsandbytes nf4": lambda: _nf4(nested=False),
    "bitsandbytes nf4, nested": lambda: _nf4(nested=True),
    "torchao": _torchao,
}


def _write(folder: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def _named(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"layer.{name}": tensor for name, tensor in parts.items()}


@pytest.mark.parametrize("kind", BUILT)
def test_a_packed_matrix_is_read_as_the_one_that_it_stands_for(kind: str, tmp_path: Path) -> None:
    settings, parts, dense = BUILT[kind]()
    half = torch.ones(COLUMNS, dtype=torch.float16)
    aside = {f"layer.{name}": torch.ones(1) for name in ("input_zero_point", "k_zero_point", "output_global_scale")}
    folder = _write(tmp_path, settings, {**_named(parts), "norm.weight": half, **aside})
    read = dict(open_checkpoint(folder).tensors())
    assert set(read) == {"layer.weight", "norm.weight"}
    assert all(tensor.dtype == torch.float32 for tensor in read.values())
    torch.testing.assert_close(read["layer.weight"], dense.float(), rtol=1e-6, atol=1e-6)
    assert packing_facts(folder)["executed"] == "dequantized"


@pytest.mark.parametrize("kind", BUILT)
def test_a_packing_is_read_from_pickled_files_as_from_safetensors(kind: str, tmp_path: Path) -> None:
    settings, parts, _ = BUILT[kind]()
    folder = _write(tmp_path, settings, _named(parts))
    before = dict(open_checkpoint(folder).tensors())
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    after = dict(open_checkpoint(folder).tensors())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_settings_of_a_packing_are_no_sizes_of_the_model(tmp_path: Path) -> None:
    settings = {
        "quant_method": "torchao",
        "quant_type": {"default": {"_data": {"granularity": {"_data": {"dim": -1}}}}},
    }
    assert check_config(_write(tmp_path, settings, {"a": torch.ones(2)}))["quantization_config"] == settings


def test_stacked_experts_are_read_in_the_dense_models_orientation(tmp_path: Path) -> None:
    codes, exponents = _random(3, 8, 2, 32), _random(3, 8, 2, low=120, high=132)
    values = torch.where(codes > 7, -1, 1) * FP4[codes % 8] * 2.0 ** (exponents - 127)[..., None]
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
    stored = {"experts.down_proj_blocks": packed, "experts.down_proj_scales": exponents.to(torch.uint8)}
    read = dict(open_checkpoint(_write(tmp_path, {"quant_method": "mxfp4"}, stored)).tensors())
    torch.testing.assert_close(read["experts.down_proj"], values.reshape(3, 8, 64).transpose(1, 2))


def test_layers_that_hold_their_weights_turned_are_read_as_the_dense_model_has_them(
    demo_model: Path, tmp_path: Path
) -> None:
    """A GPT-2 has Conv1D layers, [in, out]; tools pack them as linear ones, [out, in]."""
    dense = load_file(demo_model / "model.safetensors")
    matrices = [name for name in dense if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))]
    stored = {name: tensor for name, tensor in dense.items() if name not in matrices}
    for name in matrices:
        scale = dense[name].float().T.abs().amax(1)
        stored[name] = (dense[name].float().T / scale[:, None] * 127).round().to(torch.int8)
        stored[name.replace("weight", "SCB")] = scale
    folder = _write(tmp_path, {"quant_method": "bitsandbytes", "load_in_8bit": True}, stored)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    for name, tensor in open_checkpoint(folder).tensors():
        assert tensor.shape == dense[name].shape
        assert float((tensor - dense[name].float()).abs().max()) <= float(dense[name].abs().max()) / 200, name


def test_the_parts_of_a_weight_may_stand_in_several_files(tmp_path: Path) -> None:
    settings, parts, dense = BUILT["gptq of 4 bits"]()
    _write(tmp_path, settings, {"layer.scales": parts.pop("scales")})
    (tmp_path / "model.safetensors").rename(tmp_path / "b.safetensors")
    _write(tmp_path, settings, _named(parts))
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    torch.testing.assert_close(dict(open_checkpoint(tmp_path).tensors())["layer.weight"], dense.float())


@pytest.mark.parametrize(
    "kind", ["gptq of 4 bits", "awq", "compressed-tensors of 4 bits", "torchao", "bitsandbytes nf4"]
)
def test_codes_without_their_scales_are_no_weight(kind: str, tmp_path: Path) -> None:
    settings, parts, _ = BUILT[kind]()
    scales = next(name for name in parts if name.endswith(("scale", "scales", "absmax")))
    folder = _write(tmp_path, settings, _named({name: part for name, part in parts.items() if name != scales}))
    names = [name for name, _ in open_checkpoint(folder).tensors()]
    assert "layer.weight" not in names
    assert any("codes" in name for name in names), names


def test_bytes_without_a_scale_are_no_weight(tmp_path: Path) -> None:
    settings, parts, _ = BUILT["float8 blocks"]()
    names = [
        row.name for row in read_structure(_write(tmp_path, settings, {"layer.weight": parts["weight"]}), None).tensors
    ]
    assert names == ["layer.weight [codes without scales]"]


def test_a_symmetric_file_whose_zero_points_are_one_off_is_not_read(tmp_path: Path) -> None:
    settings, parts, _ = _gptq()
    parts["qzeros"] = torch.full_like(parts["qzeros"], 0x66666666)
    names = [name for name, _ in open_checkpoint(_write(tmp_path, {**settings, "sym": True}, _named(parts))).tensors()]
    assert len(names) == 1 and "zero points are not 8" in names[0]


def test_a_scale_that_is_not_finite_shows_in_the_weight(tmp_path: Path) -> None:
    settings, parts, _ = BUILT["awq"]()
    parts["scales"][0, 0] = float("nan")
    (row,) = read_structure(_write(tmp_path, settings, _named(parts)), None).tensors
    assert (row.name, row.non_finite) == ("layer.weight", GROUP)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "hqq"},
        {"quant_method": "awq", "version": "gemv"},
        {"quant_method": "gptq", "checkpoint_format": "marlin"},
        {**_ct("pack-quantized"), "transform_config": {"config_groups": {"u": {}}}},
    ],
    ids=lambda settings: settings["quant_method"],
)
def test_a_packing_that_is_not_known_is_named(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = _write(tmp_path, settings, {"layer.W_q": torch.zeros(4, 4, dtype=torch.uint8)})
    with pytest.raises(ModelLoadError, match=settings["quant_method"]) as caught:
        read_structure(folder, None)
    assert caught.value.code == "UNSUPPORTED-FORMAT"


def test_plain_weights_beside_a_quantization_config_are_plain(tmp_path: Path, llama_model: Path) -> None:
    tensors = load_file(llama_model / "model.safetensors")
    folder = _write(tmp_path, {"quant_method": "bitsandbytes", "load_in_4bit": True}, tensors)
    assert not PackedFolder.recognises(folder)
    assert isinstance(open_checkpoint(folder), SafetensorsFolder)
    assert packing_facts(folder)["quantization_config_unused"] == "bitsandbytes"
