"""The safetensors format: one file, or shards and an index that names them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from invarlock.checkpoints.headers import open_tensors, read_header
from invarlock.checkpoints.structure import Layout, structure_of
from invarlock.core.exceptions import ModelLoadError
from invarlock.core.files import first_line, read_json
from invarlock.evidence.model import Structure

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SafetensorsFolder"]

_INDEX = "model.safetensors.index.json"
_SHARDS = "model-*-of-*.safetensors"


@dataclass(frozen=True)
class SafetensorsFolder:
    """A folder of safetensors files; `layout` is None where the architecture is not known."""

    folder: Path
    layout: Layout | None

    @staticmethod
    def recognises(folder: Path) -> bool:
        return any(folder.glob("*.safetensors")) or (folder / _INDEX).is_file()

    def structure(self) -> Structure:
        """See `Checkpoint`. What stands in an absent shard is missing, where the architecture says what there should be."""
        return structure_of(self._tensors(absent_too=self.layout is None), self.layout, "file")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Checkpoint`. Also refuses one tensor that stands in two files with different values."""
        return self._tensors()

    def _tensors(self, *, absent_too: bool = True) -> Iterator[tuple[str, Tensor]]:
        where: dict[str, Path] = {}
        for path in self.files(absent_too=absent_too):
            try:
                with open_tensors(path) as shard:
                    for name in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                        tensor = shard.get_tensor(name)
                        if name in where:
                            _require_same(name, tensor, where[name], path)
                            continue
                        where[name] = path
                        yield name, tensor
            except (SafetensorError, OSError) as error:
                raise ModelLoadError(
                    f"{path} cannot be read ({first_line(error)}); it is truncated or not a safetensors file: "
                    "copy it again"
                ) from error

    def count(self) -> int:
        """Return how many tensors the files that are there hold, by their headers alone."""
        return len({name for path in self.files(absent_too=False) for name in read_header(path)})

    def readers(self) -> dict[str, Callable[[], Tensor]]:
        """See `base.readers`. A file is mapped while a tensor of it is read, so that memory holds no more than that."""
        return {name: partial(_read, path, name) for path in self.files() for name in read_header(path)}

    def files(self, *, absent_too: bool = True) -> list[Path]:
        """Return the files that hold the weights, as the loader resolves them; with `absent_too=False` those that are there.

        Raises ModelLoadError where the index is broken, names absent files or another file than the one that holds a
        tensor, and where the folder holds two sets of weights: which of them is read depends on the tool.
        """
        index, single = self.folder / _INDEX, self.folder / "model.safetensors"
        if not index.is_file():
            if not single.is_file():
                return sorted(self.folder.glob("*.safetensors"))
            self._refuse_second_set([single], sorted(self.folder.glob(_SHARDS)))
            return [single]
        try:
            where = dict(read_json(index, "a safetensors index", ModelLoadError, "checkpoint")["weight_map"])
            names = sorted(set(where.values()))
            if odd := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
                raise ValueError(f"{odd[0]!r} is no name of a file beside it")
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise ModelLoadError(
                f"{index} cannot be read ({first_line(error)}); expected a safetensors index"
            ) from None
        absent = [name for name in names if not (self.folder / name).is_file()]
        if absent and (absent_too or len(absent) == len(names)):
            raise ModelLoadError(
                f"{self.folder} lacks {', '.join(absent[:3])}, which {_INDEX} names; copy the missing shards"
            )
        files = [self.folder / name for name in names if name not in absent]
        others = {single, *self.folder.glob(_SHARDS)} - set(files)
        self._refuse_second_set(files, sorted(path for path in others if path.is_file()))
        self._check_map(where, files)
        return files

    def _refuse_second_set(self, files: list[Path], others: list[Path]) -> None:
        if others:
            raise ModelLoadError(
                f"{self.folder} holds two sets of weights: {_named(files)} and {_named(others)}; which is read depends on "
                "the tool, so keep the one that ships and remove the other"
            )

    def _check_map(self, where: Mapping[str, str], files: list[Path]) -> None:
        """Refuse an index that says of a tensor that it stands in another file than it does."""
        held: dict[str, set[str]] = {}
        for path in files:
            try:
                with open_tensors(path) as shard:
                    for name in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                        held.setdefault(name, set()).add(path.name)
            except (SafetensorError, OSError):
                continue  # reading its tensors says what is wrong with it
        for name, file in where.items():
            if name in held and file not in held[name]:
                raise ModelLoadError(
                    f"{self.folder}/{_INDEX} says that {name} is in {file}, but it is in {', '.join(sorted(held[name]))}; "
                    "write the checkpoint again"
                )


def _read(path: Path, name: str) -> Tensor:
    with open_tensors(path) as shard:
        tensor: Tensor = shard.get_tensor(name)
    return tensor


def _named(files: list[Path]) -> str:
    more = f" and {len(files) - 2} more" if len(files) > 2 else ""
    return ", ".join(path.name for path in files[:2]) + more


def _require_same(name: str, tensor: Tensor, first: Path, second: Path) -> None:
    import torch

    with open_tensors(first) as shard:
        other = shard.get_tensor(name)
    if other.dtype != tensor.dtype or not torch.equal(other.view(torch.uint8), tensor.view(torch.uint8)):
        raise ModelLoadError(
            f"{name} stands in {first.name} and in {second.name} with different values; which is loaded depends on the "
            "tool: write the checkpoint again"
        )
