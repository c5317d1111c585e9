"""Measured baselines, found again: what one model showed on one text, under a key of all that its figures depend on.

An entry is a pack (`evidence.pack`) that appears under its name whole or not at all; its digests are checked whenever it
is read, and one that is damaged is as one that is not there. Two writers of one key write the same figures, and the
last one stays. Nothing here is ever asked what it was measured from: a key that differs in any part is another entry.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import sys
import time
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from invarlock.checkpoints.side import Side
from invarlock.core import registry, settings
from invarlock.core.device import library_versions, thread_count
from invarlock.core.exceptions import ModelLoadError
from invarlock.core.files import cache_folder
from invarlock.eval.data.python_docs import TEXTS
from invarlock.evidence.model import Evidence
from invarlock.evidence.pack import read_pack, write_pack
from invarlock.evidence.plain import canonical, canonical_digest
from invarlock.flow.job import Job
from invarlock.flow.measure import Measurement
from invarlock.flow.steps import measured_members, members_measured

__all__ = ["Entry", "clear", "entries", "find", "key_of", "keep"]

_SUFFIX = ".pack"
_LARGEST = 4 * 1024**3  # bytes of all entries; the ones used least recently give way
_STALE = 24 * 3600  # seconds after which a file that was never finished is removed
_SMALL = 16 * 1024**2  # files beside the weights that are digested whole; the weights are by their tensors
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
#: variables that change nothing that is measured
_SHOW = ("INVARLOCK_CACHE", "INVARLOCK_MINIMAL", "INVARLOCK_TELEMETRY", "INVARLOCK_DEBUG_TRACE", "HF_HOME")


def key_of(job: Job, side: Side) -> str | None:
    """Return the key of a baseline's measurement, None where not all that it depends on can be digested: a model that is
    no folder of files, a guard or an adapter of somebody else."""
    core = all(_is_core(registry.guards, guard.name) for guard in job.guards if guard not in job.plugins)
    if job.windows is None or side.folder is None or side.structure.source != "file":
        return None
    if not core or not _is_core(registry.adapters, job.adapter.name):
        return None
    limits = job.policy.limits
    return canonical_digest(
        canonical(
            {
                "software": [_sources(), library_versions(), sys.version, platform.platform(), platform.processor()],
                "device": [job.device, thread_count(), job.native],
                "model": side.structure.model_dump(mode="json"),
                "behaviour": [side.behaviour, side.usage, list(side.tokenizer_facts)],
                "files": _files(side.folder),
                "loading": [job.adapter.name, *(repr(value) for value in vars(job.loading).values())],
                "windows": job.windows.facts().model_dump(mode="json"),
                "metric": [job.metric.kind, job.metric.task],
                "guards": [limits.guards, [guard.name for guard in job.guards if guard not in job.plugins]],
                "limits": [limits.divergence.mode, limits.sample.model_dump(mode="json"), limits.bootstrap.seed],
                "environment": {k: v for k, v in settings.environment_flags().items() if k not in _SHOW},
            }
        )
    )


def _is_core(names: registry.Registry[Any], name: str) -> bool:
    entry = names.entries().get(name)
    return entry is not None and entry.origin == "Core"


@cache
def _sources() -> str:
    """Digest the software itself, so that no other state of it finds what this one measured."""
    sha = hashlib.sha256()
    with resources.as_file(resources.files("invarlock")) as folder:
        for path in sorted(folder.rglob("*.py")):
            sha.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()


def _files(folder: Path) -> dict[str, str]:
    """Digest what lies beside the weights: configurations, tokenizers, code."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix not in _WEIGHTS and path.stat().st_size <= _SMALL:
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def find(key: str | None, side: Side) -> Measurement | None:
    """Return what was measured under a key; None where nothing was, or its file is damaged."""
    folder = cache_folder()
    if key is None or folder is None:
        return None
    path = folder / f"{key}{_SUFFIX}"
    with contextlib.suppress(ModelLoadError, OSError, ValueError):
        pack = read_pack(path)
        if pack.about.get("key") != key:
            return None
        os.utime(path)
        return _under_its_name(members_measured(pack, path), side)
    return None


def _under_its_name(found: Measurement, side: Side) -> Measurement:
    """The same files may lie somewhere else by now."""
    model = found.evidence.model.model_copy(update={"id": side.id})
    return Measurement(found.evidence.model_copy(update={"model": model}), found.reference)


def keep(key: str | None, measured: Measurement) -> None:
    """Store a measurement under its key. A cache that cannot be written is no error: the next run measures again."""
    folder = cache_folder()
    if key is None or folder is None:
        return
    evidence: Evidence = measured.evidence
    about = {"key": key, "model": evidence.model.id, "text": evidence.data.provider, "metric": evidence.metric_kind}
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_pack(folder / f"{key}{_SUFFIX}", about, measured_members(measured), compress=False)
        _make_room(folder)


def _make_room(folder: Path) -> None:
    now, kept = time.time(), 0
    for path in folder.glob(f".*{_SUFFIX}.*.part"):
        if now - path.stat().st_mtime > _STALE:
            path.unlink(missing_ok=True)
    for path in sorted(folder.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime, reverse=True):
        kept += path.stat().st_size
        if kept > _LARGEST:
            path.unlink(missing_ok=True)


class Entry(NamedTuple):
    """One entry as `cache list` shows it; `model` is None where its file is damaged."""

    key: str
    size: int
    used: float
    model: str | None
    text: str | None


def entries() -> Iterator[Entry]:
    """Yield the entries, the one used last first."""
    folder = cache_folder()
    paths = [] if folder is None or not folder.is_dir() else list(folder.glob(f"*{_SUFFIX}"))
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        about: dict[str, Any] = {}
        with contextlib.suppress(ModelLoadError, OSError):
            about = read_pack(path).about
        stat = path.stat()
        yield Entry(path.stem, stat.st_size, stat.st_mtime, about.get("model"), about.get("text"))


def clear() -> tuple[int, int]:
    """Remove all entries, and what was never finished; return how many and their bytes."""
    folder, count, size = cache_folder(), 0, 0
    paths = [] if folder is None or not folder.is_dir() else list(folder.iterdir())
    for path in paths:
        if path.is_file() and (path.suffix == _SUFFIX or path.name.endswith((".part", TEXTS))):
            count, size = count + (path.suffix == _SUFFIX), size + path.stat().st_size
            path.unlink(missing_ok=True)
    return count, size
