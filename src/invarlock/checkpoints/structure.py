"""The structure of a model: what its architecture expects, what a file or a live model holds, and how the two fit.

What an architecture expects is read off the model class itself, built on the `meta` device from the configuration: names,
shapes, ties, ignored buffers and normalisation layers. So there is no table of architectures to keep.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from invarlock.core.api import ModelLike
from invarlock.core.exceptions import ModelLoadError
from invarlock.core.files import first_line
from invarlock.evidence.model import Structure, TensorFacts

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import AutoModel, PretrainedConfig

__all__ = ["Layout", "layout_of", "live_structure", "stored_names", "stored_type", "structure_of"]

#: torch's names of types and those of safetensors
_DTYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_FLOATS = {stored: name for name, stored in _DTYPES.items() if "float" in name}
#: buffers that earlier releases of the library stored and later ones compute
_OLD_BUFFERS = (r"(^|\.)(masked_bias|rotary_emb\.inv_freq|position_ids)$", r"(^|\.)(attn|attention)\.bias$")
_OLD_NAMES = ((r"\bgamma$", "weight"), (r"\bbeta$", "bias"))
_LAYER = re.compile(r".*?\.\d+\.")


@dataclass(frozen=True)
class Layout:
    """What an architecture expects. Names are the model's own; `alias` maps a tied name to the one it shares with."""

    shapes: dict[str, tuple[int, ...]]
    alias: dict[str, str]
    ignored: tuple[str, ...]
    prefix: str
    norms: tuple[str, ...]
    buffers: tuple[str, ...]
    embedding: str | None
    output: str | None
    converted: bool  # the library rewrites tensors while loading; only the loaded model tells what is missing
    renames: tuple[tuple[str, str], ...]  # patterns of names in files and what the library makes of them

    def canonical(self, name: str) -> str:
        """Return the model's own name for a name found in a file."""
        return next((found for found in self._spellings(name) if found in self.shapes or found in self.alias), name)

    def _spellings(self, name: str) -> Iterator[str]:
        """Yield what the library may make of a name, each once: with the prefix, without it, and renamed."""
        found = dict.fromkeys([name, f"{self.prefix}.{name}", name.removeprefix(f"{self.prefix}.")])
        yield from found
        for pattern, replacement in self.renames:
            renamed = dict.fromkeys(re.sub(pattern, replacement, known) for known in found)
            yield from (new for new in renamed if new not in found)
            found |= renamed

    def is_ignored(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self.ignored)


def layout_of(config: PretrainedConfig, auto_class: type[AutoModel]) -> Layout | None:
    """Build the architecture without weights and read its layout; None where the class is not in the library."""
    import torch

    try:
        with torch.device("meta"):
            model = auto_class.from_config(config)
    except ImportError:
        return None
    except (
        ValueError, LookupError, RuntimeError, TypeError, ArithmeticError, AttributeError, AssertionError, MemoryError
    ) as error:  # fmt: skip
        if type(config) not in getattr(auto_class, "_model_mapping", ()):
            return None  # code that ships with the checkpoint, or a class that this task has no head for
        raise ModelLoadError(
            f"config.json of a {config.model_type} describes a model that cannot be built: {first_line(error)}"
        ) from error
    return _layout_of_model(model)


def structure_of(
    tensors: Iterable[tuple[str, Tensor]], layout: Layout | None, source: Literal["file", "model"]
) -> Structure:
    """Go through (name, tensor) once: names, shapes, types, digests, non-finite values.

    Where two stored names stand for one tensor and differ, the one that is not the model's own name counts as
    unexpected: which of them is loaded nobody can tell.
    """
    rows: dict[str, TensorFacts] = {}
    stored_as: dict[str, str] = {}
    for stored, tensor in tensors:
        name = layout.canonical(stored) if layout else stored
        facts = _facts(name, tensor)
        if name in rows and rows[name].digest != facts.digest:
            other = stored_as[name] if stored == name else stored
            rows[other] = (rows[name] if stored == name else facts).model_copy(update={"name": other})
            if stored != name:
                continue
        rows[name], stored_as[name] = facts, stored
    if layout is None:
        return Structure(source=source, tensors=[rows[name] for name in sorted(rows)])
    return _against_layout(rows, layout, source)


def live_structure(model: ModelLike, like: Structure | None = None) -> Structure:
    """Return the structure of a live model as it would be saved, under the names that a checkpoint has.

    like: the structure of the files that it was loaded from. It is returned itself where every tensor agrees with it in
    the type that the files have: a model computed in float32 may be stored in float16, and is still that checkpoint.
    A buffer that no checkpoint stores, such as the frequencies of rotary positions, is listed where it is not finite.
    """
    layout = _layout_of_model(model, like.tied if like is not None else ())
    spoilt = {
        name: buffer
        for name, buffer in model.named_buffers()
        if name not in layout.shapes and buffer.is_floating_point() and not bool(buffer.isfinite().all())
    }
    layout = replace(layout, shapes={**layout.shapes, **{name: tuple(t.shape) for name, t in spoilt.items()}})
    if like is not None and like.tensors:
        declared = {row.name: row.dtype for row in like.tensors}
        stated = structure_of(_as_declared(_as_saved(model, layout, spoilt), layout, declared), layout, "model")
        if _agree(stated, like):
            return like
    return structure_of(_as_saved(model, layout, spoilt), layout, "model")


def _agree(found: Structure, like: Structure) -> bool:
    """Say whether a live model holds what its files do, but for what the loader passed over."""
    expected = [row for row in like.tensors if row.name not in like.unexpected]
    known = bool(like.norms or like.buffers or like.embedding_rows)  # else the files were read without a layout
    return found.tensors == expected and (not known or (found.tied, found.norms) == (like.tied, like.norms))


def _as_saved(model: ModelLike, layout: Layout, spoilt: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model as the library would save them. What it converted while loading (stacked experts) is
    converted back, a layer at a time, so that the copy stays small."""
    state = {**_state(model), **spoilt}
    if not layout.converted:
        yield from state.items()
        return
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        found = _LAYER.match(name)
        layers.setdefault(found[0] if found else "", {})[name] = tensor.detach()
    for layer in layers.values():
        yield from _reverted(model, layer).items()


def stored_names(model: ModelLike, names: Iterable[str]) -> list[str]:
    """Name parameters as the model's checkpoint does, where what the library stacks in memory (experts) stands one by one."""
    parameters = dict(model.named_parameters())
    return [stored for name in names for stored in _reverted(model, {name: parameters[name].detach()})]


def _reverted(model: ModelLike, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as a checkpoint holds them, what the library converted while loading converted back."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 converts nothing
        return tensors
    found: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return found


def _as_declared(
    tensors: Iterable[tuple[str, Tensor]], layout: Layout, declared: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield floating tensors in the types that the files have; `declared` maps names to those."""
    import torch

    for name, tensor in tensors:
        own = layout.canonical(name)
        dtype = _FLOATS.get(declared.get(own) or declared.get(layout.alias.get(own, ""), ""))
        yield name, tensor.detach().to(getattr(torch, dtype)) if dtype and tensor.is_floating_point() else tensor


def _layout_of_model(model: ModelLike, tied: Iterable[list[str]] = ()) -> Layout:
    state = _state(model)
    alias = _aliases(getattr(model, "all_tied_weights_keys", None) or dict(tied), state)
    steps = _loading_steps(model)
    return Layout(
        shapes={name: tuple(tensor.shape) for name, tensor in state.items() if name not in alias},
        alias=alias,
        ignored=(*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *_OLD_BUFFERS),
        prefix=getattr(model, "base_model_prefix", ""),
        norms=tuple(_norm_weights(model)),
        buffers=tuple(name for name, _ in model.named_buffers()),
        embedding=_weight_name(model, "get_input_embeddings"),
        output=_weight_name(model, "get_output_embeddings"),
        converted=None in steps,
        renames=(*_OLD_NAMES, *(step for step in steps if step is not None)),
    )


def _state(model: ModelLike) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint would hold; a name that is tied to another has the same object."""
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if hasattr(value, "dtype")}


def _aliases(declared: Mapping[str, str], state: Mapping[str, Tensor]) -> dict[str, str]:
    """Map tied names to the name that they share with: as it is declared, else to the first of them."""
    alias = {name: partner for name, partner in declared.items() if name in state}
    first: dict[int, str] = {}
    for name, tensor in state.items():
        other = first.setdefault(id(tensor), name)
        other = alias.get(other, other)
        if other != name and name not in alias:
            alias[name] = other
    return alias


def _loading_steps(model: ModelLike) -> list[tuple[str, str] | None]:
    """Return what the library does while loading: (pattern, replacement) for names, None where it rewrites tensors."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # transformers 4 never rewrites tensors
        return []
    found: list[tuple[str, str] | None] = []
    for step in get_model_conversion_mapping(model):
        if isinstance(step, WeightRenaming):
            targets = step.target_patterns
            found += zip(step.source_patterns, targets * len(step.source_patterns), strict=False)
        else:
            found.append(None)
    return found


def _weight_name(model: ModelLike, accessor: str) -> str | None:
    module: Module | None = getattr(model, accessor, lambda: None)()
    if module is None or not hasattr(module, "weight"):
        return None
    return next((f"{name}.weight" for name, found in model.named_modules() if found is module), None)


def _norm_weights(model: ModelLike) -> Iterator[str]:
    for name, module in model.named_modules():
        if "norm" in type(module).__name__.lower():
            yield from (f"{name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False))


def stored_type(tensor: Tensor) -> str:
    """Return what safetensors calls a tensor's type, such as F16; torch's own name for the rarer ones."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return _DTYPES.get(dtype, dtype)


def _facts(name: str, tensor: Tensor) -> TensorFacts:
    import torch

    tensor = tensor.detach()
    floating = tensor.is_floating_point()
    bad = 0
    if floating and not bool(torch.isfinite(tensor.sum() if tensor.dtype == torch.float64 else tensor.float().sum())):
        bad = int((~torch.isfinite(tensor.float())).sum())  # the sum may also overflow; the count decides
    dtype = stored_type(tensor)
    flat = tensor.cpu().contiguous()
    sha = hashlib.sha256(f"{dtype}{list(tensor.shape)}".encode())
    if flat.numel():
        sha.update(flat.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # hashlib takes any buffer
    return TensorFacts(name=name, shape=list(tensor.shape), dtype=dtype, digest=sha.hexdigest()[:32], non_finite=bad)


def _against_layout(rows: dict[str, TensorFacts], layout: Layout, source: Literal["file", "model"]) -> Structure:
    kept = {name: row for name, row in rows.items() if name in layout.shapes or not layout.is_ignored(name)}
    tied, missing, misshapen = [], [], []
    for name, partner in sorted(layout.alias.items()):
        here, there = kept.get(name), kept.get(partner)
        if here is None or (there is not None and here.digest == there.digest):
            kept.pop(name, None)
            tied.append([name, partner])
        elif there is None:  # stored once, under its other name
            kept[partner] = kept.pop(name).model_copy(update={"name": partner})
            tied.append([name, partner])
    for name, shape in layout.shapes.items():
        if name not in kept:
            missing.append(name)
        elif tuple(kept[name].shape) != shape:
            misshapen.append(f"{name}: got {kept[name].shape}, expected {list(shape)}")
    unexpected = sorted(name for name in kept if name not in layout.shapes and name not in layout.alias)
    return Structure(
        source=source,
        tensors=[kept[name] for name in sorted(kept)],
        missing=[] if layout.converted else sorted(missing),
        unexpected=[] if layout.converted else unexpected,
        misshapen=[] if layout.converted else sorted(misshapen),
        tied=tied,
        norms=sorted(layout.norms),
        buffers=sorted(layout.buffers),
        embedding_rows=_rows_of(kept, layout.embedding, layout.alias),
        output_rows=_rows_of(kept, layout.output, layout.alias),
    )


def _rows_of(rows: dict[str, TensorFacts], name: str | None, alias: dict[str, str]) -> int | None:
    row = rows.get(name or "") or rows.get(alias.get(name or "", ""))
    return row.shape[0] if row is not None and row.shape else None
