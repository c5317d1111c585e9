"""GGUF files: weights, configuration and tokenizer in one file, or in shards that are numbered.

The weights stay where they are and are dequantized tensor by tensor under the names of the dense checkpoint. What the
rest of the library reads beside weights (config.json, the tokenizer's files) is written from the file's metadata into a
private folder that stands until the program ends.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invarlock.checkpoints.behaviour import REBUILT, load_config
from invarlock.checkpoints.gguf_header import Header, read_header
from invarlock.checkpoints.quiet import quiet_transformers
from invarlock.checkpoints.structure import Layout, layout_of, structure_of
from invarlock.core.device import require_extra
from invarlock.core.exceptions import InvarlockError, ModelLoadError
from invarlock.core.files import first_line, kept_folder
from invarlock.evidence.model import Structure

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PretrainedConfig

__all__ = ["GGUFFolder", "gguf_facts", "unfolded", "weights_file"]

_SLIM = "metadata.gguf"
_VOCABULARY = tuple(f"tokenizer.ggml.{part}" for part in ("tokens", "scores", "token_type", "merges"))
_OTHER_NAMES = {  # the library's names of architectures where llama.cpp has others
    "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss", "minimax_m2": "minimax-m2", "umt5": "t5",
}  # fmt: skip
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight")
_ROPE = "rope_freqs.weight"  # how Llama 3.1 and later stretch their positions: no weight of the model
_NOTE = "llama.cpp rounds activations too where weights are quantized; here weights alone were rounded"
_done: dict[tuple[tuple[Path, int], ...], Path] = {}  # by files and their age


def weights_file(path: Path) -> Path | None:
    """Return the GGUF file that a path stands for (the first of its shards), or None where it is no GGUF checkpoint.

    Raises ModelLoadError for a folder with several: which of them is meant, nobody can tell.
    """
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if (path / REBUILT).is_file() or any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin")):
        return None
    found = sorted(
        file for file in path.glob("*.gguf") if not (shard := _SHARD.search(file.name)) or shard[1] == "00001"
    )
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:4])
        raise ModelLoadError(f"{path} holds {len(found)} GGUF files ({names}); give the path of one of them")
    return found[0] if found else None


def unfolded(file: Path) -> Path:
    """Return a private folder with the configuration and the tokenizer that a GGUF file describes and a link to it.

    Raises ModelLoadError for a file that cannot be read, and [UNSUPPORTED-FORMAT] for an architecture that the library
    cannot build from metadata.
    """
    shards = _shards(file.resolve())
    key = tuple((shard, shard.stat().st_mtime_ns) for shard in shards)
    if key not in _done:
        require_extra(f"the file {file}", "gguf", "gguf")
        require_extra(f"the file {file}", "adapters", "torch", "transformers")
        target = kept_folder()
        try:
            _unfold(shards, target)
        except InvarlockError:
            raise
        except Exception as error:  # metadata of another type than the library expects fail anywhere in it
            raise _unsupported(f"{file} cannot be read: {type(error).__name__}: {first_line(error)}") from error
        _done[key] = target
    return _done[key]


def gguf_facts(folder: Path) -> dict[str, Any]:
    """Return what a report says of how a GGUF file was read; {} for any other folder."""
    path = folder / REBUILT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _unfold(shards: Sequence[Path], target: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    file = shards[0]
    headers = [read_header(shard) for shard in shards]
    arch = _architecture(file, headers[0])
    types = Counter(tensor.kind.name for header in headers for tensor in header.tensors)
    (target / _SLIM).write_bytes(_without_vocabulary(arch, headers))
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(target, gguf_file=_SLIM, local_files_only=True)
            config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
            config.save_pretrained(target)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
            tokenizer.save_pretrained(target)
    except Exception as error:  # whatever the library cannot make of the metadata, the file cannot be used
        raise _unsupported(f"{file} (architecture {arch}) cannot be read: {first_line(error)}") from error
    (target / _SLIM).unlink()
    _finish_config(arch, headers, config, target)
    for place, shard in enumerate(shards):
        (target / f"weights-{place:05d}.gguf").symlink_to(shard)
    facts = {"executed": "dequantized", "quant_method": "gguf", "types": dict(sorted(types.items()))}
    notes = [_NOTE] if any(name not in ("F32", "F16", "BF16") for name in types) else []
    (target / REBUILT).write_text(json.dumps({**facts, "notes": notes}), encoding="utf-8")


def _unsupported(what: str) -> ModelLoadError:
    return ModelLoadError(f"{what}; give the checkpoint that the file was made from", code="UNSUPPORTED-FORMAT")


def _architecture(file: Path, header: Header) -> str:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    arch = str(header.fields.get("general.architecture"))
    known = sorted({_OTHER_NAMES.get(name, name) for name in GGUF_SUPPORTED_ARCHITECTURES} - {"general", "tokenizer"})
    if arch not in known or f"{arch}.expert_count" in header.fields and arch == "llama":
        raise _unsupported(f"{file} is of the architecture {arch!r}; expected one of {', '.join(known)}")
    return arch


def _shards(file: Path) -> list[Path]:
    found = _SHARD.search(file.name)
    if found is None:
        return [file]
    count, stem = int(found[2]), file.name[: found.start()]
    shards = [file.with_name(f"{stem}-{place:05d}-of-{count:05d}.gguf") for place in range(1, count + 1)]
    if absent := [shard.name for shard in shards if not shard.is_file()]:
        raise ModelLoadError(f"{file.parent} lacks {', '.join(absent[:3])}; copy the missing shards")
    return shards


def _without_vocabulary(arch: str, headers: Sequence[Header]) -> bytes:
    """Return a GGUF file with the metadata and the names of tensors alone: the library's reader takes seconds for each
    ten thousand tokens, and asks for them only to build the tokenizer."""
    first = headers[0]
    kept = [raw for name, raw in first.raw.items() if not name.startswith(_VOCABULARY)]
    if f"{arch}.vocab_size" not in first.fields:
        count = len(first.fields.get("tokenizer.ggml.tokens") or ())
        kept.append(_text(f"{arch}.vocab_size") + struct.pack("<II", 4, count))
    names = [tensor.name for header in headers for tensor in header.tensors]
    table = b"".join(_text(name) + struct.pack("<IQIQ", 1, 1, 0, 0) for name in names)  # one float32, the same for all
    head = b"GGUF" + struct.pack("<IQQ", 3, len(names), len(kept)) + b"".join(kept) + table
    return head + bytes(-len(head) % first.alignment + first.alignment)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _finish_config(arch: str, headers: Sequence[Header], config: PretrainedConfig, target: Path) -> None:
    """Write into config.json what the library leaves out: decimals instead of float32, and how positions are stretched.

    Factors of the Llama 3.1 kind are stored as a tensor; they are known again by the one number that differs between
    releases. Raises ModelLoadError [UNSUPPORTED-FORMAT] for factors that are none of these.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    path, fields = target / "config.json", headers[0].fields
    values = _as_decimals(json.loads(path.read_text(encoding="utf-8")))
    key = "rope_parameters" if "rope_parameters" in values else "rope_scaling"
    given, kind = dict(values.get(key) or {}), fields.get(f"{arch}.rope.scaling.type")
    stretch = [tensor for header in headers for tensor in header.tensors if tensor.name == _ROPE]
    if stretch:
        factors = stretch[0].dense().astype(np.float64)
        limits = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        given |= {"rope_type": "llama3", "factor": float(factors.max()), **limits}
        setattr(config, key, given)
        plain = values.get("rope_theta") or given["rope_theta"]
        stretched = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].double().numpy()
        if not np.allclose(plain ** (-np.arange(len(factors)) / len(factors)) / stretched, factors, rtol=1e-3):
            raise _unsupported(f"{_ROPE} stretches positions in a way that is not known")
    elif kind in ("linear", "yarn"):
        given |= {"rope_type": kind, "factor": fields.get(f"{arch}.rope.scaling.factor", 1.0)}
        original = fields.get(f"{arch}.rope.scaling.original_context_length")
        given |= {"original_max_position_embeddings": original} if original else {}
    if given:
        values[key] = _as_decimals(given)
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")


def _as_decimals(value: Any) -> Any:
    """Return JSON data in which a number that passed through float32 is the shortest decimal that it stands for."""
    if isinstance(value, dict):
        return {key: _as_decimals(entry) for key, entry in value.items()}
    if isinstance(value, float) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


@dataclass(frozen=True)
class GGUFFolder:
    """The folder that `unfolded` makes. All floats are yielded as float32, as for every packed format."""

    folder: Path
    layout: Layout | None

    @staticmethod
    def recognises(folder: Path) -> bool:
        return (folder / REBUILT).is_file()

    def structure(self) -> Structure:
        return structure_of(self.tensors(), self.layout, "file")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Checkpoint`. A tensor of the file for which the architecture has no place keeps its name in the file."""
        try:
            yield from self._tensors()
        except InvarlockError:
            raise
        except Exception as error:  # tensors that are not what the metadata say fail anywhere in the library
            raise ModelLoadError(
                f"the tensors of {self.folder.name} cannot be read: {type(error).__name__}: {first_line(error)}; the file is "
                "damaged: copy it again"
            ) from error

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        import torch
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        config = load_config(self.folder)
        headers = [read_header(file) for file in sorted(self.folder.glob("*.gguf"))]
        arch = str(headers[0].fields["general.architecture"])
        names = _dense_names(arch, config, self._layout(config))
        back = TENSOR_PROCESSORS.get(arch, TensorProcessor)(config=_sizes(config))
        for stored in (tensor for header in headers for tensor in header.tensors if tensor.name != _ROPE):
            for name, part in _parts(stored.name, _undone(back, stored.dense(), stored.name), names):
                yield name, torch.from_numpy(part.astype("float32", order="C", copy=True))

    def _layout(self, config: PretrainedConfig) -> Layout:
        from transformers import AutoModelForCausalLM

        layout = self.layout or layout_of(config, AutoModelForCausalLM)
        assert layout is not None  # the configuration was written by a class that the library has
        return layout


def _sizes(config: PretrainedConfig) -> dict[str, Any]:
    """Return what the library's own converters ask a configuration, under either of its names."""
    return {
        **config.to_dict(),
        **{name: getattr(config, name) for name in ("n_head", "n_layer") if hasattr(config, name)},
    }


def _dense_names(arch: str, config: PretrainedConfig, layout: Layout) -> dict[str, str]:
    """Map the file's names to those of the dense checkpoint."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next(number for number, name in MODEL_ARCH_NAMES.items() if name == arch)
    table = get_tensor_name_map(kind, config.get_text_config().num_hidden_layers)
    named = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in (*layout.alias, *layout.shapes)}
    return {stored: name for name, stored in named.items() if stored is not None}


def _undone(back: Any, values: NDArray[Any], name: str) -> NDArray[Any]:
    """Undo what the converter did to a tensor (rotary rows, transposed or shifted weights) by the library's own inverse."""
    kept: dict[str, dict[str, Tensor]] = {"tensors": {}}
    result = back.process(weights=values, name=name, tensor_key_mapping=None, parsed_parameters=kept)
    if result.name is None and kept["tensors"]:
        return next(iter(kept["tensors"].values())).numpy()
    return result.weights  # type: ignore[no-any-return]


def _parts(name: str, values: NDArray[Any], names: Mapping[str, str]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield a tensor under its dense name; a stack of experts one by one, as checkpoints have them."""
    stack = _EXPERTS.fullmatch(name)
    if stack is None or name in names:
        yield names.get(name, name), values
        return
    for expert, matrix in enumerate(values):
        yield f"model.layers.{stack[1]}.mlp.experts.{expert}.{stack[2]}_proj.weight", matrix
