"""Keeps the unedited state of a model, in memory or on disk, whichever the machine has room for."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from invarlock.core import settings
from invarlock.core.exceptions import ConfigError
from invarlock.core.files import private_folder

__all__ = ["Snapshot", "SnapshotPlan", "plan_snapshot", "take_snapshot"]

#: key of the context -> the variable that stands in for it
_ENVIRONMENT = {
    "mode": "INVARLOCK_SNAPSHOT_MODE",
    "ram_fraction": "INVARLOCK_SNAPSHOT_AUTO_RAM_FRACTION",
    "threshold_mb": "INVARLOCK_SNAPSHOT_THRESHOLD_MB",
}


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
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
    asked = {key: settings.get(name) for key, name in _ENVIRONMENT.items()} | dict(context.get("snapshot") or {})
    try:
        return SnapshotPlan(**{key: value for key, value in asked.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
    key, known = first["loc"][0], [f.name for f in fields(SnapshotPlan)]
    said = first["msg"].removeprefix("Input should be ") if key in known else f"one of the keys {', '.join(known)}"
    raise ConfigError(f"context.snapshot.{key} is {first['input']!r}; expected {said}")


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

    mode: Literal["bytes", "chunked"]
    size_bytes: int
    _objects: _Objects | None
    _restore: Callable[[Any], None] | None  # puts the values of the tensors back
    _files: ExitStack = field(default_factory=ExitStack)

    def restore(self, model: Any) -> None:
        """Bring `model` back, bit for bit; modules, hooks and settings that the edit put in place are taken out again."""
        if self._objects is not None and self._restore is not None:
            self._objects.restore()
            self._restore(model)

    def release(self) -> None:
        """Forget the state and remove its files."""
        self._restore = self._objects = None
        self._files.close()


def _state_bytes(model: Any) -> int:
    tensors = [*model.parameters(), *model.buffers()] if hasattr(model, "parameters") else []
    return sum(t.numel() * t.element_size() for t in tensors)


def _free_memory() -> int | None:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None  # macOS does not tell; the size threshold decides alone


def _choose(plan: SnapshotPlan, size: int) -> Literal["bytes", "chunked"]:
    if plan.mode != "auto":
        return plan.mode
    free, small = _free_memory(), size <= plan.threshold_mb * 2**20
    return "bytes" if small and (free is None or size <= plan.ram_fraction * free) else "chunked"


def take_snapshot(model: Any, adapter: Any, plan: SnapshotPlan) -> Snapshot:
    """Keep the state of `model`. Adapters that follow the protocol but not the base class keep bytes."""
    size = _state_bytes(model)
    if not hasattr(adapter, "snapshot_chunked") or _choose(plan, size) == "bytes":
        blob = adapter.snapshot(model)
        return Snapshot("bytes", size, _Objects(model), lambda model: adapter.restore(model, blob))
    with ExitStack() as files:
        folder = files.enter_context(private_folder(plan.temp_dir))
        free = shutil.disk_usage(folder).free
        if free < plan.disk_free_margin_ratio * size:
            room = f"{folder.parent} has {free >> 20} MB free for a snapshot of {size >> 20} MB"
            expected = f"expected {plan.disk_free_margin_ratio:g} times that"
            raise ConfigError(f"{room}; {expected}: set context.snapshot.temp_dir to a larger disk")
        path = adapter.snapshot_chunked(model, folder)
        objects, kept = _Objects(model), files.pop_all()
    return Snapshot("chunked", size, objects, lambda model: adapter.restore_chunked(model, path), kept)
