"""Which weights a model has, and what each is for: the list that every weight-based guard walks.

Families are `ffn`, `attn`, `embed`, `router` and `other`. A table of name patterns decides; where none fits, the shape
does, and the entry says so (`by`). An adapter's `module_families` overrules both.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from invarlock.adapters.offload import named_weights, value_of, within_reach

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

__all__ = [
    "Family",
    "Role",
    "WeightMatrix",
    "classify",
    "is_expert_stack",
    "layer_index",
    "unreadable_weights",
    "weight_matrices",
]

Family = Literal["ffn", "attn", "embed", "router", "other"]
Role = Literal["head", "embedding", "linear"]

# The first pattern that is found in the dotted name decides, so the order matters: `self_attn_layer_norm` is a norm,
# `attention.output.dense` is attention although `output.dense` alone is BERT's feed-forward.
_PATTERNS: tuple[tuple[str, Family], ...] = (
    (r"norm|(^|\.)ln_\w+|(^|\.)pooler\.|(^|\.)classifier\.|(^|\.)score\.|qa_outputs|seq_relationship", "other"),
    (r"(^|\.)(predictions\.transform|vocab_transform|lm_head\.dense)\.", "other"),
    (r"(^|\.)(router|gate|wg|shared_expert_gate)(\.|$)", "router"),
    (r"attn|attention|query_key_value|wqkv|qkv_proj|(^|\.)[qkvo](_proj|_lin)?\.(weight|bias)$", "attn"),
    (r"embed|(^|\.)(wte|wpe|lm_head|output_projection|vocab_projector|shared)(\.|$)", "embed"),
    (r"predictions\.(decoder|bias)", "embed"),
    (r"mlp|ffn|feed_?forward|densereludense|experts?(\.|\[|$)|intermediate\.|output\.dense", "ffn"),
    (r"dense_(h_to_4h|4h_to_h)", "ffn"),
    (r"(^|\.)(fc\d|fc_in|fc_out|c_fc|lin\d|wi(_\d)?|wo|w[123])(\.|$)|(gate|up|down|gate_up)_proj", "ffn"),
)
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection|vocab_projector|predictions\.decoder)\.")
_LAYER = re.compile(r"(?:^|\.)(?:h|layers?|blocks?|encoder|decoder)\.(\d+)(?:\.|$)")
_PACKED = ("qweight", "weight_packed", "W_q", "_packed_params")


@dataclass(frozen=True)
class WeightMatrix:
    """One two-dimensional weight of a model.

    `name` is the parameter's (`h.0.mlp.c_fc.weight`; `...experts.down_proj[3]` within a stack of experts), `module`
    the path of the module that owns it, `shape` that of `tensor()`: [out, in], or [rows, width] for an embedding.
    `tied` says that another name holds the same tensor; it is listed under the first name only.
    """

    name: str
    module: str
    family: str
    by: str  # name, shape or adapter
    layer: int | None
    role: Role
    shape: tuple[int, int]
    tied: bool
    _owner: Module
    _expert: int | None = None
    _transposed: bool = False

    def tensor(self) -> Tensor:
        """Return the matrix as a detached view, on its own device and in its own dtype."""
        data = value_of(self._owner, self.name.partition("[")[0].rpartition(".")[2])
        if self._expert is not None:
            data = data[self._expert]
        return data.T if self._transposed else data


def classify(name: str, shape: Sequence[int]) -> tuple[Family, str]:
    """Return the family of a tensor called `name` and whether its name or its shape decided.

    By shape: [rows, columns] with at least 8 rows a column or more is an embedding, a square matrix attention, any
    other matrix feed-forward; fewer than two dimensions are `other`.
    """
    lowered = name.lower()
    for pattern, family in _PATTERNS:
        if re.search(pattern, lowered):
            return family, "name"
    if len(shape) < 2 or min(shape) < 2:
        return "other", "shape"
    rows, columns = shape[-2:]
    if rows >= 8 * columns:
        return "embed", "shape"
    return ("attn" if rows == columns else "ffn"), "shape"


def is_expert_stack(name: str, ndim: int) -> bool:
    """Say whether a tensor is a stack of matrices, one an expert, along its first dimension."""
    return ndim == 3 and "expert" in name.lower()


def layer_index(name: str) -> int | None:
    """Return the number of the layer in a dotted name, or None outside the stack of layers."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


def weight_matrices(model: Any, adapter: Any = None) -> list[WeightMatrix]:
    """List every dense 2-D weight in the model's own order, each expert of a stacked 3-D one by itself.

    Tied weights come once. Convolution kernels and quantized weights are left out; `unreadable_weights` lists these.
    """
    if not hasattr(model, "named_parameters"):
        return []  # an inference session and the like: there are no weights to look at
    overrides = dict(adapter.module_families(model)) if hasattr(adapter, "module_families") else {}
    aliases: dict[int, list[str]] = defaultdict(list)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        aliases[id(parameter)].append(name)
    for name, partner in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if name in parameters and partner in parameters and name not in aliases[id(parameters[partner])]:
            aliases[id(parameters[partner])].append(name)  # tied, and left elsewhere
    dense = ((owner, p) for _, owner, p in named_weights(model) if _is_dense(p) and within_reach(owner, p))
    return [entry for owner, p in dense for entry in _entries(aliases[id(p)], owner, p, overrides)]


def unreadable_weights(model: Any) -> list[str]:
    """List the weights that exist only in a packed or quantized form, or were left on disk by an offloading loader, by
    the name that the dense one would have."""
    found: list[str] = []
    for path, module in model.named_modules() if hasattr(model, "named_modules") else ():
        weight: Any = getattr(module, "weight", None)
        packed = any(getattr(module, name, None) is not None for name in _PACKED)
        if packed or (hasattr(weight, "element_size") and not (_is_dense(weight) and within_reach(module, weight))):
            found.append(f"{path}.weight")
    return found


def _is_dense(parameter: Any) -> bool:
    import torch

    # A quantizer's tensor subclass reports the dtype it stands for; 8-bit floats mean nothing without their scales.
    plain = type(parameter) in (torch.nn.Parameter, torch.Tensor)
    return plain and parameter.is_floating_point() and parameter.element_size() >= 2


def _entries(names: list[str], owner: Module, parameter: Tensor, chosen: dict[str, Family]) -> Iterator[WeightMatrix]:
    name, module = names[0], names[0].rpartition(".")[0]
    linear = type(owner).__name__ == "Conv1D"  # GPT-2's linear layer, stored [in, out]
    stacked = is_expert_stack(name, parameter.ndim)
    if ("Conv" in type(owner).__name__ and not linear) or not parameter.numel() or not (parameter.ndim == 2 or stacked):
        return
    rows, columns = parameter.shape[-2:]
    transposed = linear and not stacked
    shape = (columns, rows) if transposed else (rows, columns)
    layer, role, tied = layer_index(name), _role(names, owner), len(names) > 1
    for expert in range(parameter.shape[0]) if stacked else (None,):
        entry = name if expert is None else f"{name}[{expert}]"
        told = chosen.get(entry) or chosen.get(name) or chosen.get(module)
        family, by = (told, "adapter") if told else classify(name, shape)
        yield WeightMatrix(entry, module, family, by, layer, role, shape, tied, owner, expert, transposed)


def _role(names: list[str], owner: object) -> Role:
    import torch

    if isinstance(owner, torch.nn.Embedding):
        return "embedding"
    return "head" if any(_HEAD.search(name) for name in names) else "linear"
