"""Presets: YAML files with data, metric and guards. Some are packaged, and go by their name."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from invarlock.core.exceptions import ConfigError
from invarlock.core.registry import nearest

__all__ = ["PRESETS", "is_packaged", "preset_path", "preset_text"]

_FOLDER = Path(str(resources.files("invarlock.data"))) / "presets"
#: packaged preset -> what it is for
PRESETS = {
    "causal": "causal language models (GPT-2, Llama and relatives)",
    "masked": "masked language models (BERT and relatives)",
    "seq2seq": "sequence-to-sequence models (T5, BART and relatives)",
}


def preset_path(given: str | os.PathLike[str]) -> Path:
    """Return the file that `given` names: a path, or a packaged preset. Raises ConfigError where it is neither."""
    path = Path(given)
    if os.path.exists(path) or path.suffix or path.parent != Path():
        return path
    if path.name not in PRESETS:
        known = ", ".join(PRESETS)
        raise ConfigError(
            f"preset {path.name!r} is neither a file nor packaged{nearest(path.name, PRESETS)}; packaged: {known}"
        )
    return _FOLDER / f"{path.name}.yaml"


def preset_text(name: str) -> str:
    """Return the text of a packaged preset."""
    return preset_path(name).read_text(encoding="utf-8")


def is_packaged(path: Path) -> bool:
    """Return whether a file is one of the packaged presets, whose data stand in the current folder."""
    return path.parent == _FOLDER
