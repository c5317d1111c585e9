"""ONNX files: the weights are the graph's initializers, found by their names or by those of the nodes that use them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from invarlock.checkpoints.structure import Layout, structure_of
from invarlock.core.device import require_extra
from invarlock.core.exceptions import ModelLoadError
from invarlock.core.files import first_line
from invarlock.evidence.model import Structure

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor

__all__ = ["OnnxFolder", "weight_names"]

_MATRIX = ".MatMul.weight"  # as builders of graphs name it; exporters name the node alone
_SCOPES = "pkg.torch.onnx.name_scopes"  # where torch says from which module a node comes: a list, as a text
_LEAVES = (".weight", ".bias")


@dataclass(frozen=True)
class OnnxFolder:
    """A folder with one `model.onnx`, also in a folder `onnx`; `layout` is None where the architecture is not known."""

    folder: Path
    layout: Layout | None

    @staticmethod
    def recognises(folder: Path) -> bool:
        return OnnxFolder(folder, None).file() is not None

    def file(self) -> Path | None:
        """Return the graph, or None where there is none."""
        return next(
            (path for path in (self.folder / "model.onnx", self.folder / "onnx/model.onnx") if path.is_file()), None
        )

    def structure(self) -> Structure:
        return structure_of(self.tensors(), self.layout, "file")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Checkpoint`. Raises ModelLoadError [UNSUPPORTED-FORMAT] where initializers do not tell all weights: names are
        lost where an exporter folds or packs them."""
        require_extra(f"the file {self.file()}", "onnx", "onnx")
        import onnx
        import torch
        from onnx.external_data_helper import ExternalDataInfo

        path = self.file()
        assert path is not None
        try:
            graph = onnx.load(path, load_external_data=False)
        except Exception as error:  # a damaged message ends the parser anywhere
            raise ModelLoadError(
                f"{path} cannot be read ({first_line(error)}); it is damaged: copy it again"
            ) from error
        named = weight_names(graph)
        told = {self.layout.canonical(name) for name, _ in named.values()} if self.layout else set()
        told |= {self.layout.alias[name] for name in told & self.layout.alias.keys()} if self.layout else set()
        if self.layout and (
            untold := [n for n in self.layout.shapes if n not in told and not self.layout.is_ignored(n)]
        ):
            raise ModelLoadError(
                f"{path}: no initializer is called as {untold[0]} ({len(untold)} weights so); export it without folding and "
                "packing weights, or give the checkpoint that it was made from",
                code="UNSUPPORTED-FORMAT",
            )
        for stored in (one for one in graph.graph.initializer if one.name in named):
            if stored.data_location == onnx.TensorProto.EXTERNAL and not _beside(
                path, ExternalDataInfo(stored).location
            ):
                raise ModelLoadError(f"{path} keeps {stored.name} in another place than beside it; put it there")
            name, transposed = named[stored.name]
            values = onnx.numpy_helper.to_array(stored, base_dir=str(path.parent))
            yield name, torch.from_numpy(np.array(values.T if transposed else values, dtype=np.float32, order="C"))


def _beside(path: Path, location: str) -> bool:
    return Path(location).name == location and (path.parent / location).is_file()


def weight_names(model: ModelProto) -> dict[str, tuple[str, bool]]:
    """Return for each initializer that is a weight its dense name, and whether it is stored transposed."""
    stored = {one.name: len(one.dims) for one in model.graph.initializer}
    found = {name: (name.replace(_MATRIX, ".weight"), _MATRIX in name) for name in stored if name.endswith(_LEAVES)}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored and node.input[1] not in found:
            scopes = next((one.value for one in node.metadata_props if one.key == _SCOPES), None)
            path = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            found[node.input[1]] = (f"{ast.literal_eval(scopes)[-2] if scopes else path}.weight", True)
    return found
