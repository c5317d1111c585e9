"""What every checkpoint format offers: its tensors, one at a time, and the table of facts that follows from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from invarlock.checkpoints.structure import Layout
    from invarlock.evidence.model import Structure

__all__ = ["Checkpoint", "Format", "readers"]


class Checkpoint(Protocol):
    """A model as files, whatever their format."""

    def structure(self) -> Structure:
        """Return names, shapes, types, digests and ties; reads every tensor once."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor), one tensor in memory at a time, dequantized, under the names that `Layout.canonical`
        knows. Raises ModelLoadError for a file that cannot be read, naming it."""


class Format(NamedTuple):
    """One row of the table of formats. `recognises` looks at file names and headers alone."""

    name: str
    recognises: Callable[[Path], bool]
    open: Callable[[Path, Layout | None], Checkpoint]


def readers(checkpoint: Checkpoint) -> dict[str, Callable[[], Tensor]]:
    """Return for each name what reads its tensor, in any order. A format that cannot read one at a time is read whole."""
    own: Callable[[], dict[str, Callable[[], Tensor]]] | None = getattr(checkpoint, "readers", None)
    if own is not None:
        return own()
    return {name: partial(_itself, tensor) for name, tensor in checkpoint.tensors()}


def _itself(tensor: Tensor) -> Tensor:
    return tensor
