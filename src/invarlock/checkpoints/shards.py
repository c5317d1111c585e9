"""The safetensors format: one file, or shards and an index that names them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from invarlock.checkpoints.structure import Layout, structure_of
from invarlock.core.exceptions import ModelLoadError
from invarlock.core.files import first_line
from invarlock.evidence.model import Structure

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SafetensorsFolder"]

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class SafetensorsFolder:
    """A folder of safetensors files; `layout` is None where the architecture is not known."""

    folder: Path
    layout: Layout | None

    @staticmethod
    def recognises(folder: Path) -> bool:
        return any(folder.glob("*.safetensors")) or (folder / _INDEX).is_file()

    def structure(self) -> Structure:
        return structure_of(self.tensors(), self.layout, "file")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for path in self.files():
            try:
                with safe_open(path, framework="pt") as shard:
                    for name in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                        yield name, shard.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise ModelLoadError(
                    f"{path} cannot be read ({first_line(error)}); it is truncated or not a safetensors file: "
                    "copy it again"
                ) from error

    def files(self) -> list[Path]:
        """Return the files that hold the weights; ModelLoadError where the index is broken or names absent ones."""
        index, single = self.folder / _INDEX, self.folder / "model.safetensors"
        if not index.is_file():
            return [single] if single.is_file() else sorted(self.folder.glob("*.safetensors"))
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise ModelLoadError(
                f"{index} cannot be read ({first_line(error)}); expected a safetensors index"
            ) from None
        absent = [name for name in names if not (self.folder / name).is_file()]
        if absent:
            raise ModelLoadError(
                f"{self.folder} lacks {', '.join(absent[:3])}, which {_INDEX} names; copy the missing shards"
            )
        return [self.folder / name for name in names]
