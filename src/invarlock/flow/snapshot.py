"""Keeps the unedited state of a model, in memory or on disk, whichever the machine has room for."""

from __future__ import annotations

import copy
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
    mode: Any = given.get("mode") or settings.get("INVARLOCK_SNAPSHOT_MODE") or "auto"
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


class _Objects:
    """Which modules, tensors, hooks and settings each module and configuration held: what an edit may replace as objects.

    The values of tensors are the adapter's part. An edit that puts new parameters or modules in place of old ones keeps
    the old ones alive until the snapshot is released.
    """

    def __init__(self, model: Any) -> None:
        modules = list(model.modules()) if hasattr(model, "modules") else []
        configs = {id(c): c for c in (vars(m).get("config") for m in modules) if hasattr(c, "__dict__")}
        self._kept = [
            (item, type(item), {name: (value, _copied(value)) for name, value in vars(item).items()})
            for item in (*modules, *configs.values())
        ]

    def restore(self) -> None:
        for item, kind, attributes in self._kept:
            if type(item) is not kind:
                item.__class__ = kind  # a parametrized module has a class of its own
            for name in vars(item).keys() - attributes.keys():
                del vars(item)[name]
            for name, (value, copied) in attributes.items():
                if isinstance(value, (dict, set)):
                    value.clear()
                    value.update(copied)
                elif isinstance(value, list):
                    value[:] = copied
                vars(item)[name] = value


def _copied(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, (dict, list, set)) else None


@dataclass
class Snapshot:
    """A kept state. `release` frees it; safe to call twice."""

    adapter: Any
    mode: Literal["bytes", "chunked"]
    size_bytes: int
    _blob: bytes | None = None
    _path: Path | None = None
    _folder: Path | None = None
    _objects: _Objects | None = None

    def restore(self, model: Any) -> None:
        """Bring `model` back, bit for bit; modules, hooks and settings that the edit put in place are taken out again."""
        if self._objects is not None:
            self._objects.restore()
        if self._blob is not None:
            self.adapter.restore(model, self._blob)
        else:
            self.adapter.restore_chunked(model, self._path)

    def release(self) -> None:
        """Forget the state and remove its files."""
        self._blob = self._objects = None
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
        return Snapshot(adapter, "bytes", size, _blob=adapter.snapshot(model), _objects=_Objects(model))
    folder = Path(tempfile.mkdtemp(prefix="invarlock-snapshot-", dir=plan.temp_dir))  # 0700
    try:
        free = shutil.disk_usage(folder).free
        if free < plan.disk_free_margin_ratio * size:
            raise ConfigError(
                f"{folder.parent} has {free >> 20} MB free for a snapshot of {size >> 20} MB; expected "
                f"{plan.disk_free_margin_ratio:g} times that: set context.snapshot.temp_dir to a larger disk"
            )
        path = adapter.snapshot_chunked(model, folder)
        return Snapshot(adapter, "chunked", size, _path=path, _folder=folder, _objects=_Objects(model))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
