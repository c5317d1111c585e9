"""Which experts the text reached: how many tokens each router sent to each of its experts, in the pass that runs anyway.

An expert that no token was routed to is not exercised: whatever happened to it, the behaviour on this text does not show
it. Counted from the router's scores: the experts that a token goes to are those of its highest ones. Routers that choose
in groups of experts, or by scores that are corrected afterwards, may send a few tokens elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from invarlock.core.api import ModelLike
from invarlock.eval.sources.base import Watch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RoutedTokens", "expert_of", "not_exercised"]

_ROUTER = re.compile(r"(^|\.)(router|gate|wg)$")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k", "moe_k")
_SINGLE = re.compile(r"^(?P<block>.*)\.experts\.(?P<inner>.*\.)?(?P<expert>\d+)\.")
_STACKED = re.compile(r"^(?P<block>.*)\.experts\..*\[(?P<expert>\d+)\]$")


class RoutedTokens:
    """Watches the routers of a model; `counts` is complete when all windows have been scored."""

    def __init__(self, model: ModelLike) -> None:
        modules = dict(model.named_modules()) if hasattr(model, "named_modules") else {}
        config = getattr(model, "config", None)
        text = getattr(config, "get_text_config", lambda: config)()
        usual = next((value for key in _CHOSEN if isinstance(value := getattr(text, key, None), int)), None)
        self._chosen: dict[str, int] = {}
        for path, module in modules.items():
            chosen = getattr(module, "top_k", None) or usual
            if _ROUTER.search(path) and f"{path.rpartition('.')[0]}.experts" in modules and isinstance(chosen, int):
                self._chosen[path] = chosen
        self._counts: dict[str, NDArray[np.int64]] = {}

    def watch(self, windows: int) -> Watch:
        return Watch(tuple(self._chosen), frozenset(range(windows)), self._see, self._receive)

    def _see(self, path: str, outputs: Tensor) -> NDArray[np.float64]:
        """Count the experts of one window's tokens; `outputs` are their scores [T, experts]."""
        experts = outputs.shape[-1]
        chosen = outputs.detach().topk(min(self._chosen[path], experts), dim=-1).indices
        return np.bincount(chosen.reshape(-1).cpu().numpy(), minlength=experts).astype(np.float64)

    def _receive(self, path: str, numbers: NDArray[np.float64]) -> None:
        counts = numbers.astype(np.int64)
        block = path.rpartition(".")[0]
        self._counts[block] = self._counts.get(block, np.zeros(len(counts), dtype=np.int64)) + counts

    def counts(self, earlier: Mapping[str, list[int]] = {}) -> dict[str, list[int]]:
        """Return the tokens routed to each expert, by the block that holds them, added to those of earlier windows."""
        return {b: (counts + earlier.get(b, [0] * len(counts))).tolist() for b, counts in self._counts.items()}


def expert_of(name: str) -> tuple[str, int] | None:
    """Return the block and the number of the expert that a weight belongs to; None for a weight of no single expert."""
    found = _STACKED.match(name) or _SINGLE.match(name)
    return (found["block"], int(found["expert"])) if found else None


def not_exercised(*sides: Mapping[str, list[int]]) -> set[tuple[str, int]]:
    """Return the experts (block, number) that no token was routed to on any of the sides."""
    idle = ({(b, i) for b, counts in side.items() for i, count in enumerate(counts) if not count} for side in sides)
    return set.intersection(*idle) if sides else set()
