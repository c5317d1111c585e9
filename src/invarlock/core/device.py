"""Device, seeds and determinism: resolved once, at the start of a run."""

from __future__ import annotations

import importlib.util
import os
import platform
import random
import sys
from importlib import metadata

import numpy as np

from invarlock.core import settings
from invarlock.core.exceptions import ConfigError, DependencyError

__all__ = ["library_versions", "make_deterministic", "require_extra", "resolve_device", "thread_count"]

_RECORDED = (
    *("invarlock", "numpy", "safetensors", "scipy", "tokenizers", "torch", "transformers"),
    *("bitsandbytes", "compressed-tensors", "torchao"),  # run packed models where they are installed
)


def require_extra(what: str, extra: str, *modules: str) -> None:
    """Raise DependencyError where one of `modules`, which `extra` brings, is not installed. Imports nothing."""
    for module in modules:
        if module not in sys.modules and importlib.util.find_spec(module) is None:
            raise DependencyError(what, extra)


def resolve_device(device: str) -> str:
    """Return the device to use: `auto` is CUDA, else MPS, else CPU. Raises ConfigError where the one named is absent."""
    import torch

    device = str(settings.get("INVARLOCK_EVAL_DEVICE") or device)
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        return "cuda" if has_cuda else "mps" if has_mps else "cpu"
    kind = device.split(":")[0]
    if kind not in {"cpu", "cuda", "mps"}:
        raise ConfigError(f"device is {device!r}; expected auto, cpu, cuda, cuda:N or mps")
    if (kind == "cuda" and not has_cuda) or (kind == "mps" and not has_mps):
        raise ConfigError(f"device is {device!r}, which this machine does not have; use auto or cpu")
    return device


def make_deterministic(seed: int) -> None:
    """Seed every generator, prefer deterministic algorithms, turn TF32 off, and apply INVARLOCK_OMP_THREADS."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_deterministic_debug_mode("warn")  # as use_deterministic_algorithms, which loads torch's compiler for it
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    threads = settings.get("INVARLOCK_OMP_THREADS")
    if threads is not None:
        torch.set_num_threads(int(threads))


def thread_count() -> int:
    """Return how many CPU threads torch computes with."""
    import torch

    return int(torch.get_num_threads())


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _RECORDED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
