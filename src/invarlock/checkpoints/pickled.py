"""Pickled weights (`pytorch_model.bin`, one file or shards and an index), read as plain tensors: nothing in them is run."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, KeysView, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from invarlock.checkpoints.structure import Layout, stored_type, structure_of
from invarlock.core.exceptions import ModelLoadError
from invarlock.core.files import first_line, read_json
from invarlock.core.reading import open_regular
from invarlock.evidence.model import Structure

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OpenPickle", "PickledFolder", "open_pickle"]

_INDEX = "pytorch_model.bin.index.json"


class OpenPickle:
    """The tensors of one file, mapped and not read before they are asked for, as an open safetensors file has them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def keys(self) -> KeysView[str]:
        return self._tensors.keys()

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def get_slice(self, name: str) -> SimpleNamespace:
        tensor = self._tensors[name]
        return SimpleNamespace(get_dtype=lambda: stored_type(tensor), get_shape=lambda: list(tensor.shape))

    def metadata(self) -> dict[str, str]:
        return {}


def open_pickle(path: Path) -> OpenPickle:
    """Open one file. Raises ModelLoadError for one that is truncated, and [UNSUPPORTED-FORMAT] where it holds anything but
    plain tensors."""
    import torch

    with open_regular(path, "a file of weights", ModelLoadError):  # the reader itself takes a path, to map it
        pass
    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the form before torch 1.6 cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelLoadError(
            f"{path} holds more than plain tensors ({first_line(error)[:120]}), which is not run; save the model as "
            "safetensors: `model.save_pretrained(folder)`",
            code="UNSUPPORTED-FORMAT",
        ) from None
    except Exception as error:  # a damaged archive ends the reader anywhere
        raise ModelLoadError(f"{path} cannot be read ({first_line(error)}); it is damaged: copy it again") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else None
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ModelLoadError(f"{path} holds no table of tensors; expected the state of a model by names")
    return OpenPickle(found)


@dataclass(frozen=True)
class PickledFolder:
    """A folder of pickled files; `layout` is None where the architecture is not known."""

    folder: Path
    layout: Layout | None

    @staticmethod
    def recognises(folder: Path) -> bool:
        return any(folder.glob("pytorch_model*.bin")) or (folder / _INDEX).is_file()

    def structure(self) -> Structure:
        return structure_of(self.tensors(), self.layout, "file")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Checkpoint`."""
        for path in self.files():
            file = open_pickle(path)
            for name in file.keys():  # noqa: SIM118 - no mapping
                yield name, file.get_tensor(name)

    def files(self) -> list[Path]:
        """Return the files that hold the weights. Raises ModelLoadError where the index is broken or names absent files."""
        index, single = self.folder / _INDEX, self.folder / "pytorch_model.bin"
        if not index.is_file():
            return [single] if single.is_file() else sorted(self.folder.glob("pytorch_model*.bin"))
        try:
            names = sorted(
                set(
                    read_json(index, "an index of pickled weights", ModelLoadError, "checkpoint")["weight_map"].values()
                )
            )
        except (KeyError, AttributeError, TypeError) as error:
            raise ModelLoadError(f"{index} cannot be read ({first_line(error)}); expected an index of files") from None
        if absent := [name for name in names if not (self.folder / name).is_file()]:
            raise ModelLoadError(f"{self.folder} lacks {', '.join(absent[:3])}, which {_INDEX} names; copy the files")
        return [self.folder / name for name in names]
