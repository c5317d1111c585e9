"""A checkpoint as files: structure, tensors, behaviour, tokenizer."""

from __future__ import annotations

__all__: list[str] = []
