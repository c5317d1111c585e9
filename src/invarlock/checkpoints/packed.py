"""Packed (quantized) weights, read as the dense matrices that they stand for, straight from their safetensors files.

One small function a scheme, in plain torch, and two tables: which tensors make up one weight, and which schemes a
`quant_method` uses. Numbers of bits and sizes of groups follow from the shapes, since files mix them.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError

from invarlock.checkpoints.headers import open_tensors
from invarlock.checkpoints.pickled import PickledFolder, open_pickle
from invarlock.checkpoints.shards import SafetensorsFolder
from invarlock.checkpoints.structure import Layout, structure_of
from invarlock.core.exceptions import InvarlockError, ModelLoadError
from invarlock.core.files import first_line, read_json
from invarlock.evidence.model import Structure

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PackedFolder", "Parts", "Settings", "packing_facts"]

Parts = Mapping[str, "Tensor"]  # the tensors of one weight by their suffix, without the leading dot
Settings = Mapping[str, Any]  # the configuration's `quantization_config`, and `turned`: see `_settings`

_PLAIN = {"F64", "F32", "F16", "BF16", "I64", "BOOL"}
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where each of eight columns stands in its word
#: what quantizes activations and caches in service: no part of a weight
_ASIDE = re.compile(r"(^|\.)(input|output|activation|[qkv])_(scale|zero_point|global_scale)$")


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Return the codes (uint8) of int32 words whose last dimension is one stream of bits, lowest first."""
    import torch

    period = math.lcm(bits, 32)
    words = torch.nn.functional.pad(words, (0, -words.shape[-1] % (period // 32)))
    words = words.reshape(*words.shape[:-1], -1, period // 32)
    codes = torch.empty(*words.shape[:-1], period // bits, dtype=torch.uint8)
    for place in range(period // bits):
        word, low = divmod(place * bits, 32)
        code = (words[..., word] >> low) & (2 ** min(bits, 32 - low) - 1)
        if low + bits > 32:
            code |= words[..., word + 1] << (32 - low)
        codes[..., place] = code & (2**bits - 1)
    return codes.flatten(-2)


def _nibbles(packed: Tensor, *, high_first: bool = False) -> Tensor:
    """Return the two 4-bit codes of each byte, as indices, along the last dimension."""
    import torch

    halves = (packed >> 4, packed & 15) if high_first else (packed & 15, packed >> 4)
    return torch.stack(halves, -1).flatten(-2).int()


def _spread(values: Tensor, shape: Sequence[int], block: Sequence[int] | None = None) -> Tensor:
    """Repeat one value a block to one a weight. `block` is needed only where it does not divide the shape."""
    values = values.float()
    if values.numel() == 1:
        return values.reshape(())
    values = values.reshape(*values.shape, *[1] * (len(shape) - values.ndim))
    for dim, size in enumerate(shape):
        have = values.shape[dim]
        if have in (1, size):
            continue
        step = block[dim - len(shape)] if block else -(-size // have)
        if -(-size // step) != have:
            raise ValueError(f"{have} scales do not fit {size} weights")
        values = values.repeat_interleave(step, dim).narrow(dim, 0, size)
    return values


def _gptq(parts: Parts, settings: Settings) -> Tensor:
    """Codes [in, out] packed down the rows; zero points are stored less one but in version 2 of the format."""
    import torch

    scales = parts["scales"].float()
    groups, columns = scales.shape
    bits = parts["qzeros"].shape[1] * 32 // columns
    codes, zeros = _unpack(parts["qweight"].T.contiguous(), bits), _unpack(parts["qzeros"], bits)
    if settings.get("checkpoint_format", settings.get("packing_format")) not in _ZEROS_AS_THEY_ARE:
        zeros = (zeros + 1) & (2**bits - 1)
    odd = zeros[:, :columns] != 1 << bits - 1
    if settings.get("sym") and bool(odd.any()):
        raise ValueError(f"{int(odd.sum())} zero points are not {1 << bits - 1}, as those of a symmetric file are")
    index = parts["g_idx"] if settings.get("desc_act") else parts.get("g_idx")
    if index is None:
        rows, size = codes.shape[1], int(settings.get("group_size") or 0)  # the last group may be a part of one
        fits = size > 0 and -(-rows // size) == groups
        index = torch.arange(rows) // (size if fits else -(-rows // groups))
    index = index.long()
    return (codes[:, : len(index)].float() - zeros[:, :columns].T.float()[:, index]) * scales.T[:, index]


def _awq(parts: Parts, settings: Settings) -> Tensor:
    """Codes [in, out] packed along the columns, eight to a word in AWQ's own order."""
    scales = parts["scales"].float()
    bits = parts["qzeros"].shape[1] * 32 // scales.shape[1]
    codes, zeros = (_unpack(parts[name], bits) for name in ("qweight", "qzeros"))
    if bits == 4:
        codes, zeros = (each.reshape(len(each), -1, 8)[..., _AWQ_ORDER].flatten(1) for each in (codes, zeros))
    shape = codes.shape
    return ((codes.float() - _spread(zeros, shape)) * _spread(scales, shape)).T


def _ct_packed(parts: Parts, settings: Settings) -> Tensor:
    """Signed codes [out, in] stored with an offset; zero points are packed down the rows. Bytes hold 4-bit floats."""
    if parts["weight_packed"].element_size() == 1:
        return _fp4(parts, settings)
    rows, columns = (int(size) for size in parts["weight_shape"])
    scale, zeros = parts["weight_scale"], parts.get("weight_zero_point")
    bits, whole = _ct_words(parts["weight_packed"].shape[1], columns, settings)
    codes = _ct_codes(parts["weight_packed"], columns, bits, whole)
    if zeros is not None:
        if zeros.shape != scale.shape:
            zeros = _ct_codes(zeros.T.contiguous(), rows, bits, whole).T
        codes -= _grouped(zeros, parts, codes.shape)
    return codes * _grouped(scale, parts, codes.shape)


def _ct_words(words: int, count: int, settings: Settings) -> tuple[int, bool]:
    """Return the bits of a code, and whether every word holds whole ones alone, as releases until 0.14 wrote them."""
    groups = (settings.get("config_groups") or {}).values()
    told = sorted(
        {int(w["num_bits"]) for group in groups if (w := group.get("weights") or {}).get("num_bits")} or range(1, 9)
    )
    filled = {bits: (-(-count * bits // 32), -(-count // (32 // bits))) for bits in told}
    for whole in (False, True):
        for bits, sizes in filled.items():
            if words == sizes[whole]:
                return bits, whole
    raise ValueError(f"{words} words do not hold {count} codes of {' or '.join(map(str, told))} bits")


def _ct_codes(words: Tensor, count: int, bits: int, whole: bool) -> Tensor:
    """Return the signed codes [rows, count] of words, which are stored with an offset, as float32."""
    codes = _unpack(words[..., None], bits)[..., : 32 // bits].flatten(-2) if whole else _unpack(words, bits)
    return codes[:, :count].float() - (1 << bits - 1)


def _grouped(values: Tensor, parts: Parts, shape: Sequence[int]) -> Tensor:
    index = parts.get("weight_g_idx")
    if index is None or bool((index < 0).any()):  # -1: an index that was never set
        return _spread(values, shape)
    return values.float()[:, index.long()]


def _fp4(parts: Parts, settings: Settings) -> Tensor:
    """NVFP4: 4-bit floats, float8 scales a group and one float32 divisor. MXFP4: scales are exponents."""
    import torch

    codes = torch.tensor(_FP4)[_nibbles(parts["weight_packed"])]
    scale, divisor = _factors(parts["weight_scale"]), parts.get("weight_global_scale")
    return codes * _spread(scale if divisor is None else scale / divisor, codes.shape)


def _factors(scales: Tensor) -> Tensor:
    """Return scales as float32. Bytes are exponents of two."""
    exponents = scales.element_size() == 1 and not scales.is_floating_point()
    return (scales.float() - 127).exp2() if exponents else scales.float()


def _scaled(parts: Parts, settings: Settings) -> Tensor:
    """Codes of 8 bits (integers or floats) times one scale a tensor, row, group or block."""
    codes = parts["weight"].float()
    groups = settings.get("config_groups") or {}
    blocks = [group.get("weights", {}).get("block_structure") for group in groups.values()]
    block = settings.get("weight_block_size") or next(filter(None, blocks), None)
    if "weight_zero_point" in parts:
        codes = codes - _spread(parts["weight_zero_point"], codes.shape, block)
    scale = parts["weight_scale_inv"] if "weight_scale_inv" in parts else parts["weight_scale"]
    return codes * _spread(_factors(scale), codes.shape, block)


def _bnb8(parts: Parts, settings: Settings) -> Tensor:
    """Codes of 8 bits and the largest magnitude of each row, as bitsandbytes multiplies them out."""
    if int(parts.get("weight_format", 0)):
        raise ValueError("the rows are in the order of one GPU's kernels")
    return parts["weight"].float() * parts["SCB"].float()[:, None] * 7.874015718698502e-3


def _bnb4(parts: Parts, settings: Settings) -> Tensor:
    """NF4 or FP4: entries of a table times the largest magnitude of each block, itself packed where nested."""
    import torch

    state = next(value for name, value in parts.items() if "quant_state" in name)
    facts = json.loads(bytes(state.tolist()))
    codes = _nibbles(parts["weight"].contiguous().view(torch.uint8).flatten(), high_first=True)
    scale = parts["weight.absmax"]
    if "weight.nested_absmax" in parts:
        nested = parts["weight.nested_absmax"].repeat_interleave(facts["nested_blocksize"])[: scale.numel()]
        scale = parts["weight.nested_quant_map"][scale.int()] * nested + facts["nested_offset"]
    count = math.prod(facts["shape"])
    values = parts["weight.quant_map"].float()[codes[:count]]
    return (values * scale.float().repeat_interleave(facts["blocksize"])[:count]).reshape(facts["shape"])


def _torchao(parts: Parts, settings: Settings) -> Tensor:
    """Codes in bytes, one scale and zero point a group."""
    codes = parts["_weight_qdata"].float()
    if "_weight_zero_point" in parts:
        codes = codes - _spread(parts["_weight_zero_point"], codes.shape)
    return codes * _spread(parts["_weight_scale"], codes.shape)


def _mxfp4(parts: Parts, settings: Settings) -> Tensor:
    """Experts [expert, out, group, 16 bytes], one exponent a group; the dense form is [expert, in, out]."""
    import torch

    codes = torch.tensor(_FP4)[_nibbles(parts["_blocks"])]
    dense = torch.ldexp(codes, parts["_scales"].int()[..., None] - 127)
    return dense.flatten(-2).transpose(-2, -1)


class _Scheme(NamedTuple):
    """How one weight is stored. The first suffix holds the codes; `joint` stands between a module's path and a suffix."""

    read: Callable[[Parts, Settings], Tensor]
    suffixes: tuple[str, ...]
    dense: str = "weight"
    joint: str = "."


_GPTQ = (_Scheme(_gptq, ("qweight", "qzeros", "scales", "g_idx")),)
_AWQ = (_Scheme(_awq, ("qweight", "qzeros", "scales")),)
_BYTES = (
    _Scheme(_scaled, ("weight", "weight_scale_inv")),
    _Scheme(_scaled, ("weight", "weight_scale", "weight_zero_point")),
)
_COMPRESSED = (
    _Scheme(
        _ct_packed,
        ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale"),
    ),
    *_BYTES,
)
_NF4 = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    *(f"quant_state.bitsandbytes__{k}" for k in ("nf4", "fp4")),
)
_BITSANDBYTES = (
    _Scheme(_bnb8, ("weight", "SCB", "weight_format")),
    _Scheme(_bnb4, ("weight", *(f"weight.{part}" for part in _NF4))),
)
_TORCHAO = (_Scheme(_torchao, ("_weight_qdata", "_weight_scale", "_weight_zero_point")),)
_MXFP4 = (_Scheme(_mxfp4, ("_blocks", "_scales"), "", ""),)
_ZEROS_AS_THEY_ARE = ("gptq_v2", "auto_round", "auto_round:gptqmodel")
_FORMATS = ("pack", "int", "float", "naive", "nvfp4-pack", "mxfp4-pack", "mxfp8")
#: `quant_method` -> the key that tells variants apart, and how each variant that is read is stored
_METHODS: dict[str, tuple[str, dict[str | None, tuple[_Scheme, ...]]]] = {
    "gptq": ("checkpoint_format", dict.fromkeys((None, "gptq", "gptq_v2"), _GPTQ)),
    "awq": ("version", dict.fromkeys((None, "gemm", "GEMM"), _AWQ)),
    "auto-round": (
        "packing_format",
        {**dict.fromkeys((*_ZEROS_AS_THEY_ARE, "auto_round:auto_gptq"), _GPTQ), "auto_round:auto_awq": _AWQ},
    ),
    "compressed-tensors": (
        "format",
        dict.fromkeys((*(f"{name}-quantized" for name in _FORMATS), "mixed-precision"), _COMPRESSED),
    ),
    "bitsandbytes": ("", {None: _BITSANDBYTES}),
    "torchao": ("", {None: _TORCHAO}),
    "fp8": ("", {None: _BYTES}),
    "fbgemm_fp8": ("", {None: _BYTES}),
    "mxfp4": ("", {None: _MXFP4}),
}
_SCALES = ("scales", "weight_scale", "_weight_scale", "weight.absmax", "_scales")
_GROUPED = 256  # bytes of codes that share a scale, at most: a group, and no row
_CONV1D = ("gpt2", "openai-gpt")
_TURNED = re.compile(r"\.(c_attn|q_attn|c_proj|c_fc)\.weight$")
_TORCHAO_TYPES = ("Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")


def _settings(folder: Path) -> Settings | None:
    """Return the `quantization_config` of a folder's config.json, or None; whether the rest is readable is no matter.
    `turned` says that its layers are Conv1D, which every tool packs as the linear layers that they stand for."""
    with contextlib.suppress(InvarlockError, AttributeError):
        config = read_json(folder / "config.json", "a configuration", kind="checkpoint")
        found = config.get("quantization_config")
        return {**found, "turned": config.get("model_type") in _CONV1D} if isinstance(found, dict) else None
    return None


def _schemes(folder: Path, settings: Settings, types: set[str]) -> tuple[_Scheme, ...]:
    """Return how the folder's weights may be stored; ModelLoadError [UNSUPPORTED-FORMAT] where none of it is known."""
    method = str(settings.get("quant_method"))
    key, variants = _METHODS.get(method, ("", {}))
    variant = settings.get(key)
    what = f"{key} {variant!r}" if key else ""
    if settings.get("transform_config"):  # rotations that are applied to activations as the model runs
        variants, what = {}, "a transform_config"
    if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
        variants, what = {}, f"sparsity_config.format {settings['sparsity_config']['format']!r}"
    if method == "torchao" and types - {*_TORCHAO_TYPES}:
        variants, what = {}, f"tensors of type {', '.join(sorted(types - {*_TORCHAO_TYPES}))}"
    if variant not in variants:
        raise ModelLoadError(
            f"{folder} is packed by quant_method {method!r}{what and ' with ' + what}, which is not read; give the model "
            f"dequantized (`model.dequantize()`, `save_pretrained`), or packed by one of: {', '.join(_METHODS)}",
            code="UNSUPPORTED-FORMAT",
        )
    return variants[variant]


def packing_facts(folder: Path) -> dict[str, Any]:
    """Return what a report says of how the weights are stored and executed, with notes in words; {} for a folder of plain
    weights."""
    settings = _settings(folder)
    if settings is None:
        return {}
    method = str(settings.get("quant_method"))
    if not PackedFolder.recognises(folder):
        note = (
            f"the file holds plain float weights beside a quantization_config ({method}); they were used as they stand"
        )
        return {"executed": "native", "quantization_config_unused": method, "notes": [note]}
    rounds = _rounds_activations(settings)
    note = "a server that runs this format quantizes activations too; here weights alone were quantized"
    facts = {"executed": "dequantized", "quant_method": method, "rounds_activations": rounds}
    if PackedFolder(folder, None).rounded_alike():
        facts["rounded_alike"] = True
    return {**facts, "notes": [note] if rounds else []}


def _rounds_activations(settings: Settings) -> bool:
    """Say whether the format's own kernels quantize activations too."""
    groups = (settings.get("config_groups") or {}).values()
    told = (
        settings.get("activation_scheme")
        or settings.get("load_in_8bit")
        or any(g.get("input_activations") for g in groups)
    )
    return bool(told) or "DynamicActivation" in json.dumps(settings.get("quant_type"))


@dataclass(frozen=True)
class PackedFolder:
    """A folder of safetensors files whose `quantization_config` says how weights are packed. All floats are yielded as
    float32, so that their digests do not depend on the packing."""

    folder: Path
    layout: Layout | None

    @staticmethod
    def recognises(folder: Path) -> bool:
        """Say whether weights are packed; a `quantization_config` beside plain floats does not make them so."""
        if _settings(folder) is None:
            return False
        with PackedFolder(folder, None)._opened() as stored:
            return any(file.get_slice(name).get_dtype() not in _PLAIN for name, file in stored.items())

    def structure(self) -> Structure:
        return structure_of(self.tensors(), self.layout, "file")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Checkpoint`. Codes that cannot be read for want of their scales are yielded raw, under a name that says so."""
        settings = _settings(self.folder) or {}
        with self._opened() as stored:
            packed, parts = self._packed(stored, settings)
            for name in sorted(stored):
                if name in packed:
                    yield _dense(name, *packed[name], stored, settings)
                elif name not in parts:
                    yield from _other(name, stored[name].get_tensor(name))

    def readers(self) -> dict[str, Callable[[], Tensor]]:
        """See `base.readers`."""
        settings = _settings(self.folder) or {}
        with self._opened() as stored:
            packed, parts = self._packed(stored, settings)
        plain = (name for name in stored if name not in packed.keys() | parts and not _ASIDE.search(name))
        own: dict[str, Callable[[], Tensor]] = {
            how[1]: partial(self._read, name, how, settings) for name, how in packed.items()
        }
        return own | {name: partial(self._read, name, None, settings) for name in plain}

    def parts(self) -> dict[str, str]:
        """Return for every stored part of a packed weight the name of the dense one."""
        with self._opened() as stored:
            packed, _ = self._packed(stored, _settings(self.folder) or {})
        return {part: dense for _, dense, names in packed.values() for part in names.values()}

    def rounded_alike(self) -> bool:
        """Whether as many codes share a scale in each packed weight, so that rounding leaves about the same share of each.
        AWQ's matrices are also scaled against each other."""
        settings = _settings(self.folder) or {}
        if "awq" in f"{settings.get('quant_method')} {settings.get('packing_format')}":
            return False
        with self._opened() as stored:
            packed, _ = self._packed(stored, settings)
            sizes = [_bytes_a_scale(names, stored) for _, _, names in packed.values()]
        return bool(sizes) and max(sizes) <= min(_GROUPED, 1.2 * min(sizes))

    def _read(self, name: str, how: tuple[_Scheme, str, dict[str, str]] | None, settings: Settings) -> Tensor:
        with self._opened() as stored:
            if how is not None:
                return _dense(name, *how, stored, settings)[1]
            return next(tensor for _, tensor in _other(name, stored[name].get_tensor(name)))

    def _packed(
        self, stored: Mapping[str, Any], settings: Settings
    ) -> tuple[dict[str, tuple[_Scheme, str, dict[str, str]]], set[str]]:
        """Return how each weight is stored, by the name of its codes, and the names of all parts of weights."""
        told = {id(file): file.metadata() or {} for file in stored.values()}.values()
        types = {json.loads(text)["_type"] for facts in told for text in facts.values() if text.startswith('{"_type')}
        schemes = _schemes(self.folder, settings, types)
        packed = {name: found for name in stored if (found := _weight(name, schemes, stored))}
        return packed, {part for _, _, names in packed.values() for part in names.values()}

    @contextlib.contextmanager
    def _opened(self) -> Iterator[dict[str, Any]]:
        """Yield the open file of each tensor; a weight's parts may stand in several."""
        with contextlib.ExitStack() as stack:
            stored: dict[str, Any] = {}
            if not SafetensorsFolder.recognises(self.folder) and PickledFolder.recognises(self.folder):
                for file in map(open_pickle, PickledFolder(self.folder, None).files()):
                    stored |= dict.fromkeys(file.keys(), file)
            for path in SafetensorsFolder(self.folder, None).files():
                try:
                    file = stack.enter_context(open_tensors(path))
                except (SafetensorError, OSError) as error:
                    raise ModelLoadError(
                        f"{path} cannot be read ({first_line(error)}); it is truncated or not a safetensors file: "
                        "copy it again"
                    ) from error
                stored |= dict.fromkeys(file.keys(), file)
            yield stored


def _weight(
    name: str, schemes: Sequence[_Scheme], stored: Mapping[str, object]
) -> tuple[_Scheme, str, dict[str, str]] | None:
    """Return the scheme, the dense name and the parts of the weight whose codes a tensor holds; None where it holds none."""
    for scheme in schemes:
        codes, base = scheme.suffixes[0], name.removesuffix(scheme.joint + scheme.suffixes[0])
        if base != name:
            names = {suffix: f"{base}{scheme.joint}{suffix}" for suffix in scheme.suffixes}
            names = {suffix: part for suffix, part in names.items() if part in stored}
            if codes != "weight" or scheme.suffixes[1] in names:
                return scheme, f"{base}{scheme.joint}{scheme.dense}", names
    return None


def _bytes_a_scale(names: Mapping[str, str], stored: Mapping[str, Any]) -> float:
    """Return how many bytes of codes share a scale; infinity where there is none."""
    codes, scale = next(iter(names.values())), next((names[part] for part in _SCALES if part in names), None)
    size, scales = (math.prod(stored[part].get_slice(part).get_shape()) if part else 0 for part in (codes, scale))
    bits = int(re.sub(r"\D.*", "", stored[codes].get_slice(codes).get_dtype()[1:]) or 8)
    return size * bits / 8 / scales if scales else math.inf


def _dense(
    name: str, scheme: _Scheme, dense: str, names: Mapping[str, str], stored: Mapping[str, Any], settings: Settings
) -> tuple[str, Tensor]:
    parts = {suffix: stored[part].get_tensor(part) for suffix, part in names.items()}
    try:
        read = scheme.read(parts, settings)
        return dense, (read.T if settings.get("turned") and _TURNED.search(dense) else read).contiguous()
    except KeyError as error:
        return f"{name} [codes without {error.args[0]}]", parts[scheme.suffixes[0]]
    except (ValueError, RuntimeError, IndexError, StopIteration, TypeError, OverflowError, MemoryError) as error:
        return f"{name} [codes that cannot be read: {first_line(error)}]", parts[scheme.suffixes[0]]


def _other(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield what is not packed, in float32. What quantizes activations is no weight, and is passed over if it is finite."""
    if _ASIDE.search(name) and bool(tensor.float().isfinite().all()):
        return
    floating = tensor.is_floating_point()
    if tensor.ndim > 1 and (tensor.element_size() == 1 or (not floating and tensor.element_size() < 8)):
        yield f"{name} [codes without scales]", tensor
    else:
        yield name, tensor.float() if floating and tensor.element_size() < 4 else tensor
