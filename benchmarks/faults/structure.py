"""Where things are in a model: layers, projections and heads, read off names and shapes so that any model can be tried."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from invarlock.guards.families import WeightMatrix, weight_matrices

_LAYER = re.compile(r"^(.*?\.(?:h|block|blocks|layer|layers)\.\d+)\.")
_ROLES = {
    "query": re.compile(r"(^|\.)(q|q_proj|query)$"),
    "key": re.compile(r"(^|\.)(k|k_proj|key)$"),
    "value": re.compile(r"(^|\.)(v|v_proj|value)$"),
    "fused": re.compile(r"(^|\.)(c_attn|query_key_value|qkv_proj)$"),
}


@dataclass(frozen=True)
class Attention:
    """One attention as views [heads, width, ...] of its queries, keys and values, weights and biases; with fewer
    key-value heads than query heads, the queries that share one count as one head. `output` is [out, heads, width].
    """

    names: tuple[str, ...]
    query: list[torch.Tensor]
    key: list[torch.Tensor]
    value: list[torch.Tensor]
    output: torch.Tensor


def layer_of(name: str) -> str | None:
    """Return the path of the layer that a parameter belongs to, or None outside the stacks."""
    found = _LAYER.match(name)
    return found.group(1) if found else None


def layers(model: Any) -> dict[str, list[WeightMatrix]]:
    """Map each layer's path to its attention and feed-forward matrices, in the model's order."""
    grouped: dict[str, list[WeightMatrix]] = {}
    for weight in weight_matrices(model):
        path = layer_of(weight.name)
        if path and weight.family in ("attn", "ffn") and weight.role == "linear":
            grouped.setdefault(path, []).append(weight)
    return grouped


def bias_of(model: Any, weight: WeightMatrix) -> list[torch.Tensor]:
    """Return the bias that goes with a matrix in a list, or an empty list."""
    bias = getattr(model.get_submodule(weight.module), "bias", None)
    return [bias.detach()] if isinstance(bias, torch.Tensor) else []


def head_count(model: Any) -> int:
    """Return the number of key-value heads."""
    config = model.config
    names = ("num_key_value_heads", "num_attention_heads", "n_head", "num_heads")
    return int(next(v for n in names if (v := getattr(config, n, None)) is not None))


def attentions(model: Any) -> list[Attention]:
    """List the attentions whose heads are interchangeable (T5's self-attention has a position bias a head)."""
    by_path: dict[str, list[WeightMatrix]] = {}
    for members in layers(model).values():
        for weight in members:
            if weight.family == "attn" and "SelfAttention" not in weight.name:
                path = re.sub(r"\.(self|output)\.[^.]+$|\.[^.]+$", "", weight.module, count=1)
                by_path.setdefault(path, []).append(weight)
    return [found for members in by_path.values() if (found := _attention(model, members))]


def _attention(model: Any, members: list[WeightMatrix]) -> Attention | None:
    count = head_count(model)
    roles: dict[str, WeightMatrix] = {}
    for weight in members:
        role = next((role for role, pattern in _ROLES.items() if pattern.search(weight.module)), "output")
        roles[role] = weight
    if "output" not in roles:
        return None
    if "fused" in roles:
        if roles["fused"].shape[0] != 3 * roles["output"].shape[1]:
            return None  # fewer keys and values than queries, in an order of the architecture's own
        parts = _cut_fused(model, roles["fused"], count)
    elif {"query", "key", "value"} <= roles.keys():
        parts = {
            role: [t.unflatten(0, (count, -1)) for t in (roles[role].tensor(), *bias_of(model, roles[role]))]
            for role in ("query", "key", "value")
        }
    else:
        return None
    output = roles["output"].tensor().unflatten(1, (count, -1))
    biases = [f"{w.module}.bias" for role, w in roles.items() if role != "output" and bias_of(model, w)]
    return Attention((*(w.name for w in members), *biases), parts["query"], parts["key"], parts["value"], output)


def _cut_fused(model: Any, weight: WeightMatrix, count: int) -> dict[str, list[torch.Tensor]]:
    """Cut a fused projection: queries, keys and values one after the other (GPT-2), or head by head (NeoX)."""
    parts: dict[str, list[torch.Tensor]] = {"query": [], "key": [], "value": []}
    for tensor in (weight.tensor(), *bias_of(model, weight)):
        by_head = weight.module.endswith("query_key_value")
        cut = tensor.unflatten(0, (count, 3, -1) if by_head else (3, count, -1))
        for index, role in enumerate(parts):
            parts[role].append(cut[:, index] if by_head else cut[index])
    return parts


def feed_forward(members: list[WeightMatrix]) -> tuple[list[WeightMatrix], WeightMatrix] | None:
    """Return the matrices into the hidden neurons of a layer and the one out of them, or None."""
    inner = [w for w in members if w.family == "ffn"]
    if len(inner) < 2:
        return None
    *into, out = inner
    width = out.shape[1]
    return (into, out) if all(w.shape == (width, out.shape[0]) for w in into) else None
