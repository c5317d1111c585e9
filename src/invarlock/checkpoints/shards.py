"""The safetensors format: one file, or shards and an index that names them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from invarlock.checkpoints.headers import open_tensors, read_header
from invarlock.checkpoints.pickled import OpenPickle, PickledFolder, open_pickle
from invarlock.checkpoints.structure import Layout, structure_of
from invarlock.core.exceptions import ModelLoadError
from invarlock.core.files import first_line, read_json
from invarlock.evidence.model import Structure

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SafetensorsFolder"]

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_PICKLED = Path("pytorch_model*.bin")
_SHARDS = ("model-*-of-*.safetensors", "shard-*-model-*-of-*.safetensors")  # the second are read before all others


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
        beside = self._pickled()
        for path in self.files(absent_too=absent_too):
            try:
                with open_tensors(path) as shard:
                    for name in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                        tensor = shard.get_tensor(name)
                        if name in where:
                            _require_same(name, _read(where[name], name), tensor, where[name], path)
                            continue
                        if name in beside:
                            _require_same(name, beside[name].get_tensor(name), tensor, _PICKLED, path, cast=True)
                        where[name] = path
                        yield name, tensor
            except (SafetensorError, OSError) as error:
                raise ModelLoadError(
                    f"{path} cannot be read ({first_line(error)}); it is truncated or not a safetensors file: "
                    "copy it again"
                ) from error

    def _pickled(self) -> dict[str, OpenPickle]:
        """Return in which file beside these a tensor stands pickled, too: older tools read those."""
        found: dict[str, OpenPickle] = {}
        if PickledFolder.recognises(self.folder):
            with contextlib.suppress(ModelLoadError):
                for file in map(open_pickle, PickledFolder(self.folder, None).files()):
                    found |= dict.fromkeys(file.keys(), file)
        return found

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
        index, single = self._roots()
        others = {self.folder / _SINGLE, *(path for pattern in _SHARDS for path in self.folder.glob(pattern))}
        if index is None or not index.is_file():
            if not single.is_file():
                return sorted(self.folder.glob("*.safetensors"))
            self._refuse_second_set([single], others - {single})
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
                f"{self.folder} lacks {', '.join(absent[:3])}, which {index.name} names; copy the missing shards"
            )
        files = [self.folder / name for name in names if name not in absent]
        self._refuse_second_set(files, others - set(files))
        self._check_map(index, where, files)
        return files

    def _roots(self) -> tuple[Path | None, Path]:
        """Return the index and the single file that the loader looks for: the configuration may name one of them."""
        path = self.folder / "config.json"
        config = read_json(path, "a model's configuration", ModelLoadError, "checkpoint") if path.is_file() else {}
        given = config.get("transformers_weights") if isinstance(config, dict) else None
        if given is None:
            return self.folder / _INDEX, self.folder / _SINGLE
        if not isinstance(given, str) or Path(given).name != given or not (self.folder / given).is_file():
            raise ModelLoadError(f"{path}: transformers_weights is {given!r}; expected the name of a file beside it")
        named = self.folder / given
        return (named, self.folder / _SINGLE) if named.suffix == ".json" else (None, named)

    def _refuse_second_set(self, files: list[Path], others: set[Path]) -> None:
        there = sorted(path for path in others if path.is_file())
        if there:
            raise ModelLoadError(
                f"{self.folder} holds two sets of weights: {_named(files)} and {_named(there)}; which is read depends on "
                "the tool, so keep the one that ships and remove the other"
            )

    def _check_map(self, index: Path, where: Mapping[str, str], files: list[Path]) -> None:
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
                    f"{index} says that {name} is in {file}, but it is in {', '.join(sorted(held[name]))}; "
                    "write the checkpoint again"
                )


def _read(path: Path, name: str) -> Tensor:
    with open_tensors(path) as shard:
        tensor: Tensor = shard.get_tensor(name)
    return tensor


def _named(files: list[Path]) -> str:
    more = f" and {len(files) - 2} more" if len(files) > 2 else ""
    return ", ".join(path.name for path in files[:2]) + more


def _require_same(name: str, one: Tensor, other: Tensor, first: Path, second: Path, *, cast: bool = False) -> None:
    """Refuse a tensor that stands in two files with different values; with `cast`, in the shorter type of the two."""
    import torch

    short = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    one, other = (tensor.to(short) if cast else tensor for tensor in (one, other))
    same = (one.dtype, one.shape) == (other.dtype, other.shape)
    if not same or not torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)):
        raise ModelLoadError(
            f"{name} stands in {first.name} and in {second.name} with different values; which is loaded depends on the "
            "tool: write the checkpoint again"
        )
