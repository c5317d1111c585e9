"""The baseline's compact next-token distributions: in memory, and as the file beside its report."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invarlock.core.exceptions import ModelLoadError
from invarlock.core.files import write_whole
from invarlock.evidence.model import TokenFile

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "TokenReference",
    "joined",
    "read_reference",
    "reference_bytes",
    "reference_digest",
    "reference_from",
    "token_file",
    "write_reference",
]

_FIELDS = ("ids", "log_probs", "label_log_prob", "tail_ids", "tail_log_probs", "vocabulary")


@dataclass(frozen=True)
class TokenReference:
    """The baseline's compact distributions for n scored tokens: `ids` [n, k] int32, `log_probs` [n, k] float32
    (nats), `label_log_prob` [n] float32.

    `tail_ids` [n, m] int32 are drawn from all other ids, `tail_log_probs` [n, m] float32 are theirs; `vocabulary` [n]
    int32 is how many ids there are. These are None where a source knows the most likely ids alone.
    """

    ids: Tensor
    log_probs: Tensor
    label_log_prob: Tensor
    tail_ids: Tensor | None = None
    tail_log_probs: Tensor | None = None
    vocabulary: Tensor | None = None

    def arrays(self) -> dict[str, Any]:
        """Return the arrays that there are, by name."""
        return {name: getattr(self, name) for name in _FIELDS if getattr(self, name) is not None}

    def rows(self, start: int, stop: int) -> TokenReference:
        """Return the part of the tokens from `start` to `stop`."""
        return TokenReference(**{name: array[start:stop] for name, array in self.arrays().items()})

    def to(self, device: object) -> TokenReference:
        """Return the same on another device."""
        return TokenReference(**{name: array.to(device) for name, array in self.arrays().items()})


def joined(parts: Sequence[TokenReference]) -> TokenReference:
    """Return one reference of several, token after token."""
    import torch

    arrays: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in parts[0].arrays()}
    return TokenReference(**arrays)


def reference_digest(reference: TokenReference) -> str:
    """Return 32 hex digits of SHA-256 over the arrays."""
    sha = hashlib.sha256()
    for array in reference.arrays().values():
        sha.update(array.contiguous().numpy().tobytes())
    return sha.hexdigest()[:32]


def write_reference(reference: TokenReference, path: Path) -> TokenFile:
    """Write the compact distributions beside the report and return what the evidence says of them."""
    blob = reference_bytes(reference)
    write_whole(path, blob)
    return token_file(blob, path.name, len(reference.label_log_prob))


def token_file(blob: bytes, name: str, tokens: int) -> TokenFile:
    """Return what the evidence says of a file of distributions of so many tokens."""
    return TokenFile(name=name, sha256=hashlib.sha256(blob).hexdigest(), bytes_per_token=len(blob) / max(tokens, 1))


def read_reference(path: Path, facts: TokenFile) -> TokenReference:
    """Read what `write_reference` wrote; ModelLoadError where the file is gone or is not the one recorded."""
    if not path.is_file():
        raise ModelLoadError(f"the baseline's evidence file {path} is missing; expected it beside its report.json")
    blob = path.read_bytes()
    if hashlib.sha256(blob).hexdigest() != facts.sha256:
        raise ModelLoadError(f"{path} is not the file that the baseline's report recorded; measure the baseline again")
    return reference_from(blob)


def reference_bytes(reference: TokenReference) -> bytes:
    """Return the compact distributions as a safetensors file."""
    from safetensors.torch import save

    data: bytes = save({name: array.contiguous() for name, array in reference.arrays().items()})
    return data


def reference_from(blob: bytes) -> TokenReference:
    """Return what `reference_bytes` wrote. Raises ModelLoadError for anything else."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        arrays: dict[str, Any] = load(blob)
        return TokenReference(**{name: arrays[name] for name in _FIELDS if name in arrays})
    except (SafetensorError, TypeError, ValueError, KeyError) as error:
        raise ModelLoadError(f"a baseline's distributions cannot be read ({error}); measure it again") from None
