"""Round-to-nearest weight quantization: each weight is replaced by the nearest value of a symmetric b-bit grid.

The model stays in its own type (simulated quantization), so its damage is measured without a special kernel. Rounding is
symmetric, w ≈ s·clamp(round(w / s), -(2^(b-1) - 1), 2^(b-1) - 1), with one scale s a row (output channel), a group of
inputs within a row, or the whole matrix. Source: Nagel et al., "A White Paper on Neural Network Quantization", 2021, §2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from invarlock.core.api import AdapterLike, ModelEdit, ModelLike
from invarlock.core.device import require_extra
from invarlock.core.exceptions import EditError
from invarlock.guards.families import is_expert_stack

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RTNQuantEdit", "round_to_nearest"]

_ATTENTION = re.compile(r"(^|\.)(attn|attention|self_attn|selfattention|crossattention|encdecattention)(\.|$)", re.I)
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection|classifier|score|cls|predictions)(\.|$)", re.I)


def round_to_nearest(
    weight: Tensor, bitwidth: int, *, per_channel: bool, group_size: int | None, clamp_ratio: float
) -> Tensor:
    """Return `weight` [out, in] rounded to `bitwidth` bits, in the same type.

    group_size g gives every g neighbouring inputs of a row a scale of their own; a last, smaller group takes what is
    left over. clamp_ratio c in [0, 1) takes the scale from the (1 - c) quantile of the magnitudes instead of their
    maximum, and clips what lies beyond.
    """
    levels = 2 ** (bitwidth - 1) - 1
    work = weight.float()
    if group_size and group_size < work.shape[1]:
        cut = work.shape[1] // group_size * group_size
        rounded = work.new_empty(work.shape)
        rounded[:, :cut] = _round_rows(work[:, :cut].reshape(-1, group_size), levels, clamp_ratio).reshape(-1, cut)
        if cut < work.shape[1]:
            rounded[:, cut:] = _round_rows(work[:, cut:], levels, clamp_ratio)
    else:
        rows = work if per_channel else work.reshape(1, -1)
        rounded = _round_rows(rows, levels, clamp_ratio).reshape(work.shape)
    return rounded.to(weight.dtype)


def _round_rows(rows: Tensor, levels: int, clamp_ratio: float) -> Tensor:
    sizes = rows.abs()
    top = sizes.amax(dim=1, keepdim=True)
    if clamp_ratio > 0:
        rank = max(1, round((1.0 - clamp_ratio) * sizes.shape[1]))
        clipped = sizes.kthvalue(rank, dim=1, keepdim=True).values
        top = clipped.where(clipped > 0, top)  # a row of almost only zeros keeps its few weights
    scale = (top / levels).clamp_min(float(np.finfo(np.float32).tiny))
    return (rows / scale).round().clamp(-levels, levels) * scale


@dataclass(eq=False)
class RTNQuantEdit(ModelEdit):
    """Round the weights of linear layers (`torch.nn.Linear`, GPT-2's `Conv1D` and stacked experts) to a few bits.

    bitwidth: 2 to 8. per_channel: one scale an output channel, else one a matrix. group_size: inputs that share a
    scale, None for whole rows. clamp_ratio: share of each row's or group's largest magnitudes that is clipped, in
    [0, 0.5). scope: `attn`, `ffn` or `all`; output heads are left alone. max_modules: at most that many, in model order.
    """

    name = "quant_rtn"
    bitwidth: int = 8
    per_channel: bool = True
    group_size: int | None = None
    clamp_ratio: float = 0.0
    scope: Literal["attn", "ffn", "all"] = "all"
    max_modules: int | None = None

    def __post_init__(self) -> None:
        require_extra(type(self).__name__, "edits", "torch")
        self.settings: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        self._checked({})

    def _checked(self, config: dict[str, Any]) -> dict[str, Any]:
        unknown = sorted(config.keys() - self.settings.keys())
        if unknown:
            raise EditError(f"quant_rtn got {unknown[0]!r}; expected one of: {', '.join(self.settings)}")
        plan = {**self.settings, **config}
        bits, group, most = plan["bitwidth"], plan["group_size"], plan["max_modules"]
        rules = (
            ("bitwidth", isinstance(bits, int) and 2 <= bits <= 8, "a whole number from 2 to 8"),
            ("group_size", group is None or (isinstance(group, int) and group >= 1), "None or 1 and more"),
            ("clamp_ratio", 0.0 <= plan["clamp_ratio"] < 0.5, "at least 0 and below 0.5"),
            ("scope", plan["scope"] in ("attn", "ffn", "all"), "attn, ffn or all"),
            ("max_modules", most is None or (isinstance(most, int) and most >= 1), "None or 1 and more"),
        )
        for key, holds, expected in rules:
            if not holds:
                raise EditError(f"quant_rtn got {key}={plan[key]!r}; expected {expected}")
        return plan

    def apply(self, model: ModelLike, adapter: AdapterLike, **config: object) -> dict[str, Any]:
        """Round the weights in place. `config` overrides the constructor's settings.

        Returns `deltas` with the counts and `modules`, one row a matrix: its relative change ‖ΔW‖/‖W‖ and how many
        weights moved. Raises EditError where the scope holds no linear layer.
        """
        import torch

        plan = self._checked(config)
        targets = list(_linear_layers(model, plan["scope"]))[: plan["max_modules"]]
        if not targets:
            raise EditError(f"quant_rtn found no linear layer in scope {plan['scope']!r}; expected at least one")
        rounding = {key: plan[key] for key in ("bitwidth", "per_channel", "group_size", "clamp_ratio")}
        rows: list[dict[str, Any]] = []
        with torch.no_grad():
            for name, weight, transposed in targets:
                matrix = weight.t() if transposed else weight
                rounded = round_to_nearest(matrix, **rounding)
                difference = (rounded.float() - matrix.float()).norm() / matrix.float().norm().clamp_min(1e-30)
                moved = int((rounded != matrix).sum())
                weight.copy_(rounded.t() if transposed else rounded)
                rows.append({"module": name, "relative_change": float(difference), "weights_changed": moved})
        return {
            "name": self.name,
            "plan": plan,
            "deltas": {
                "params_changed": sum(row["weights_changed"] for row in rows),
                "layers_modified": len(rows),
                "bitwidth": plan["bitwidth"],
            },
            "modules": rows,
        }


def _linear_layers(model: ModelLike, scope: str) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield (name, weight, whether it is stored [in, out]) of the layers in scope, output heads excluded; of a stack of
    experts each matrix, named `name[i]`."""
    from torch.nn import Linear

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        if (
            module is head
            or _HEAD.search(name)
            or (scope != "all" and (scope == "attn") != bool(_ATTENTION.search(name)))
        ):
            continue
        transposed = type(module).__name__ == "Conv1D"
        if transposed or isinstance(module, Linear):
            yield name, module.get_parameter("weight"), transposed
            continue
        for own, stack in module.named_parameters(recurse=False):
            if is_expert_stack(f"{name}.{own}", stack.ndim):
                turned = bool(getattr(module, "is_transposed", False))
                yield from ((f"{name}.{own}[{expert}]", matrix, turned) for expert, matrix in enumerate(stack.detach()))
