"""A model in torch on several ranks as one source: batches are cut first and dealt then, so that every loss is the same bits
whatever the number of ranks.

In a round every rank computes one batch, and all get what all computed. What a rank computed is kept in `folder`, a file a
batch, so that a run that lost a rank goes on where it was, on any number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from invarlock.core.api import ModelLike
from invarlock.core.files import write_whole
from invarlock.core.ranks import Ranks
from invarlock.eval.metrics import Task
from invarlock.eval.sources.base import Scored, Seen
from invarlock.eval.sources.torch_model import BATCH_TOKENS, TorchSource
from invarlock.evidence.reference import TokenReference

__all__ = ["RankedSource"]


class RankedSource(TorchSource):
    """Scores windows with the models that several processes hold, one each. `folder`: of these windows and this model alone;
    None keeps nothing."""

    def __init__(
        self,
        model: ModelLike,
        task: Task = "causal",
        *,
        ranks: Ranks,
        folder: Path | None = None,
        device: str | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        super().__init__(model, task, device=device, batch_tokens=batch_tokens)
        self.ranks = ranks
        self.folder = folder

    def _deal(self, batches: Sequence[list[int]], compute: Callable[[list[int]], Scored]) -> Iterator[Scored]:
        for start, own in self.ranks.deal(len(batches)):
            part = None if own is None else self._part(own, batches[own], compute)
            what = f"batch {start + 1} of {len(batches)}"
            yield from (one for one in self.ranks.share(part, what) if one is not None)

    def _part(self, number: int, indices: list[int], compute: Callable[[list[int]], Scored]) -> Scored:
        path = None if self.folder is None else self.folder / f"{number:05d}.safetensors"
        if path is not None and path.is_file():
            kept = _load(path)
            if kept.indices == indices:
                return kept
        part = compute(indices)
        if path is not None:
            _save(part, path)
        return part


def _save(part: Scored, path: Path) -> None:
    """Write a part: arrays as they are, the rest as JSON, which gives floats back bit for bit."""
    import torch
    from safetensors.torch import save

    arrays: dict[str, Any] = {f"kl.{n}": torch.from_numpy(kl) for n, kl in enumerate(part.kl)}
    for n, reference in enumerate(part.references):
        arrays |= {f"reference.{n}.{name}": array.contiguous() for name, array in reference.arrays().items()}
    arrays |= {f"seen.{n}": torch.from_numpy(one.numbers) for n, one in enumerate(part.seen)}
    facts = {
        "indices": part.indices,
        "columns": part.columns,
        "counts": [len(part.kl), len(part.references), len(part.seen)],
        "seen": [[one.watch, one.window, one.path] for one in part.seen],
        "reference": sorted(part.references[0].arrays()) if part.references else [],
    }
    write_whole(path, save(arrays, metadata={"part": json.dumps(facts)}))


def _load(path: Path) -> Scored:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["part"])
        kl, references, seen = facts["counts"]
        names = facts["reference"]
        kept = [{name: file.get_tensor(f"reference.{n}.{name}") for name in names} for n in range(references)]
        looked = [(watch, window, path) for watch, window, path in facts["seen"]]
        return Scored(
            facts["indices"],
            facts["columns"],
            [file.get_tensor(f"kl.{n}").numpy() for n in range(kl)],
            [TokenReference(**arrays) for arrays in kept],
            [Seen(*looked[n], np.asarray(file.get_tensor(f"seen.{n}").numpy())) for n in range(seen)],
        )
