"""The largest magnitude of each block's output over all windows: does it fit the type that the model ships in?

Measured in the pass that runs anyway, in the type that it computes in. A model that overflows in its own type computes
NaN where it is served, and not here, where the CPU computes in single precision. What overflows within a block and is
small again at its end is not seen.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from invarlock.core.api import ModelLike
from invarlock.eval.sources.base import Watch
from invarlock.evidence.model import Structure
from invarlock.stats.linalg import finite

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LARGEST", "BlockPeaks", "shipped_type"]

_BLOCK = re.compile(r"(^|\.)(h|layers?|blocks?|block)\.\d+$")
#: the largest finite value of the types that models ship in
LARGEST: Mapping[str, float] = {"F16": 65504.0, "BF16": 3.3895313892515355e38, "F32": 3.4028234663852886e38}


class BlockPeaks:
    """Watches the blocks of a model; `peaks` is complete when all windows have been scored."""

    def __init__(self, model: ModelLike) -> None:
        modules = model.named_modules() if hasattr(model, "named_modules") else ()
        self._seen: dict[str, float] = {path: 0.0 for path, _ in modules if _BLOCK.search(path)}

    @property
    def paths(self) -> list[str]:
        """The blocks, in the model's order."""
        return list(self._seen)

    def watch(self, windows: int) -> Watch:
        return Watch(tuple(self._seen), frozenset(range(windows)), _largest, self._receive)

    def _receive(self, path: str, numbers: NDArray[np.float64]) -> None:
        largest = float(numbers[0])
        if not largest <= self._seen[path]:  # NaN is larger than anything
            self._seen[path] = largest if largest == largest else float("inf")

    def peaks(self) -> dict[str, float | None]:
        """Return the largest magnitude by block; None where it is not finite."""
        return {path: finite(value) for path, value in self._seen.items()}


def _largest(path: str, outputs: Tensor) -> NDArray[np.float64]:
    return np.array([float(outputs.detach().abs().amax())])


def shipped_type(structure: Structure) -> str | None:
    """Return the floating type that most matrices of a checkpoint are stored in; None where none is known."""
    types = Counter(t.dtype for t in structure.tensors if len(t.shape) > 1 and t.dtype in LARGEST)
    return types.most_common(1)[0][0] if types else None
