"""Edits: in-place changes of a model."""

from __future__ import annotations

from invarlock.edits.checkpoint import CheckpointEdit
from invarlock.edits.noop import NoopEdit
from invarlock.edits.rtn import RTNQuantEdit

__all__ = ["CheckpointEdit", "NoopEdit", "RTNQuantEdit"]
