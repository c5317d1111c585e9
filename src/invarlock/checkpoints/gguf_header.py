"""The header of a GGUF file: metadata, and where each tensor is. The package's own reader takes seconds for a vocabulary.

The layout follows https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from invarlock.core.exceptions import ModelLoadError
from invarlock.core.files import first_line
from invarlock.core.reading import check_size, open_regular

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

__all__ = ["Header", "StoredTensor", "read_header"]

#: types of values by number: `struct`'s letter; 8 is a text and 9 an array
_LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True)
class StoredTensor:
    """One tensor: its shape in torch's order, its type, and its bytes, which are not read before `dense`."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    data: memoryview

    def dense(self) -> NDArray[Any]:
        """Return the values. Raises ModelLoadError [UNSUPPORTED-FORMAT] for a type that the package gguf cannot read."""
        from gguf import dequantize, quant_shape_to_byte_shape

        stored = np.frombuffer(self.data, dtype=np.uint8).reshape(quant_shape_to_byte_shape(self.shape, self.kind))
        try:
            values: NDArray[Any] = dequantize(stored, self.kind)
            return values
        except NotImplementedError:
            raise ModelLoadError(
                f"{self.name} is packed as {self.kind.name}, which the installed package gguf does not read; update it, or "
                "quantize by another type",
                code="UNSUPPORTED-FORMAT",
            ) from None


@dataclass(frozen=True)
class Header:
    """`fields`: metadata by key. `raw`: the same, each as the bytes that hold key and value."""

    fields: Mapping[str, Any]
    raw: Mapping[str, bytes]
    tensors: tuple[StoredTensor, ...]
    alignment: int


def read_header(path: Path) -> Header:
    """Read the header of one file. Raises ModelLoadError for a file that is truncated, of another kind or version."""
    try:
        with open_regular(path, "a GGUF file", ModelLoadError) as file:
            return _Cursor(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))).header()
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError, struct.error) as error:
        raise ModelLoadError(
            f"{path} cannot be read ({first_line(error)}); it is truncated or not a GGUF file: copy it again"
        ) from error


class _Cursor:
    def __init__(self, view: memoryview) -> None:
        self.view, self.at, self.values = view, 0, 0

    def header(self) -> Header:
        magic, version, tensors, fields = self.numbers("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"begins with {magic!r}, version {version}; expected GGUF, version 2 or 3")
        values: dict[str, Any] = {}
        raw: dict[str, bytes] = {}
        self.count(fields + tensors)
        for _ in range(fields):
            start, key = self.at, self.text()
            (kind,) = self.numbers("I")
            values[key], raw[key] = self.value(kind), bytes(self.view[start : self.at])
        alignment = int(values.get("general.alignment", 32))
        table = [self.place() for _ in range(tensors)]
        self.at += -self.at % alignment
        return Header(values, raw, tuple(self.tensor(*place) for place in table), alignment)

    def numbers(self, letters: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{letters}", self.view, self.at)
        self.at += struct.calcsize(f"<{letters}")
        return found

    def count(self, values: int) -> None:
        """Hold the number of values to what any header has, before a list of them is made."""
        self.values += values
        check_size("header", "the header of a GGUF file", ModelLoadError, values=self.values)

    def text(self) -> str:
        (length,) = self.numbers("Q")
        if self.at + length > len(self.view):
            raise ValueError(f"a text of {length} bytes goes past the end")
        self.at += length
        return str(self.view[self.at - length : self.at], "utf-8")

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.numbers(_LETTERS[kind])[0]
        inner, count = self.numbers("IQ")
        self.count(count)
        if inner in _LETTERS:
            return list(self.numbers(f"{count}{_LETTERS[inner]}"))
        return [self.value(inner) for _ in range(count)]

    def place(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.text()
        (dimensions,) = self.numbers("I")
        shape = self.numbers(f"{dimensions}Q")
        return name, shape[::-1], *self.numbers("IQ")

    def tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> StoredTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        number = GGMLQuantizationType(kind)
        per_block, size = GGML_QUANT_SIZES[number]
        start, length = self.at + offset, prod(shape) // per_block * size
        if start + length > len(self.view):
            raise ValueError(f"the tensor {name} goes past the end")
        return StoredTensor(name, shape, number, self.view[start : start + length])
