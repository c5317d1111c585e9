"""Keeps the unedited state of a model, in memory or on disk, whichever the machine has room for."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from invarlock.core import settings
from invarlock.core.exceptions import ConfigError

__all__ = ["Snapshot", "SnapshotPlan", "plan_snapshot", "take_snapshot"]

_MODES = ("auto", "bytes", "chunked")


@dataclass(frozen=True)
class SnapshotPlan:
    """How a snapshot is kept. `ram_fraction`: largest share of free memory that `bytes` may take; `threshold_mb`: above
    this size `auto` goes to disk; `disk_free_margin_ratio`: free space needed on disk, as a multiple of the size."""

    mode: Literal["auto", "bytes", "chunked"] = "auto"
    ram_fraction: float = 0.4
    threshold_mb: float = 768.0
    disk_free_margin_ratio: float = 1.2
    temp_dir: Path | None = None


def plan_snapshot(context: Mapping[str, Any]) -> SnapshotPlan:
    """Read `context.snapshot.*`; the environment stands in for keys that are absent."""
    given = dict(context.get("snapshot") or {})
    known = {"mode", "ram_fraction", "threshold_mb", "disk_free_margin_ratio", "temp_dir"}
    unknown = sorted(given.keys() - known)
    if unknown:
        raise ConfigError(f"context.snapshot.{unknown[0]} is unknown; expected one of: {', '.join(sorted(known))}")
    mode = given.get("mode") or settings.get("INVARLOCK_SNAPSHOT_MODE") or "auto"
    if mode not in _MODES:
        raise ConfigError(f"context.snapshot.mode is {mode!r}; expected one of: {', '.join(_MODES)}")
    fraction = given.get("ram_fraction", settings.get("INVARLOCK_SNAPSHOT_AUTO_RAM_FRACTION"))
    threshold = given.get("threshold_mb", settings.get("INVARLOCK_SNAPSHOT_THRESHOLD_MB"))
    folder = given.get("temp_dir")
    return SnapshotPlan(
        mode=mode,
        ram_fraction=float(fraction),
        threshold_mb=float(threshold),
        disk_free_margin_ratio=float(given.get("disk_free_margin_ratio", 1.2)),
        temp_dir=Path(folder) if folder else None,
    )


@dataclass
class Snapshot:
    """A kept state. `release` frees it; safe to call twice."""

    adapter: Any
    mode: Literal["bytes", "chunked"]
    size_bytes: int
    _blob: bytes | None = None
    _path: Path | None = None
    _folder: Path | None = None

    def restore(self, model: Any) -> None:
        """Bring `model` back, bit for bit."""
        if self._blob is not None:
            self.adapter.restore(model, self._blob)
        else:
            self.adapter.restore_chunked(model, self._path)

    def release(self) -> None:
        """Forget the state and remove its files."""
        self._blob = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _state_bytes(model: Any) -> int:
    if not hasattr(model, "parameters"):
        return 0
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


def _free_memory() -> int | None:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None  # macOS does not tell; the size threshold decides alone


def _choose(plan: SnapshotPlan, size: int) -> Literal["bytes", "chunked"]:
    if plan.mode != "auto":
        return plan.mode
    free = _free_memory()
    fits = free is None or size <= plan.ram_fraction * free
    return "bytes" if fits and size <= plan.threshold_mb * 2**20 else "chunked"


def take_snapshot(model: Any, adapter: Any, plan: SnapshotPlan) -> Snapshot:
    """Keep the state of `model`. Adapters that follow the protocol but not the base class keep bytes."""
    size = _state_bytes(model)
    mode = _choose(plan, size) if hasattr(adapter, "snapshot_chunked") else "bytes"
    if mode == "bytes":
        return Snapshot(adapter, "bytes", size, _blob=adapter.snapshot(model))
    folder = Path(tempfile.mkdtemp(prefix="invarlock-snapshot-", dir=plan.temp_dir))  # 0700
    try:
        free = shutil.disk_usage(folder).free
        if free < plan.disk_free_margin_ratio * size:
            raise ConfigError(
                f"{folder.parent} has {free >> 20} MB free for a snapshot of {size >> 20} MB; expected "
                f"{plan.disk_free_margin_ratio:g} times that: set context.snapshot.temp_dir to a larger disk"
            )
        return Snapshot(adapter, "chunked", size, _path=adapter.snapshot_chunked(model, folder), _folder=folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
