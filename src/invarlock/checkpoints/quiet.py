"""Keeping the library's own words off the terminal."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

__all__ = ["quiet_transformers"]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the library's notices and progress bars off the terminal; what matters of them we check ourselves."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    accelerate, before = logging.getLogger("accelerate"), logging.getLogger("accelerate").level
    accelerate.setLevel(logging.ERROR)
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        accelerate.setLevel(before)
        if bars:
            hf_logging.enable_progress_bar()
