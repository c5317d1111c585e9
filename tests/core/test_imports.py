"""The lower rooms import without torch; what cannot work without it says what to install."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

_WITHOUT = """
import importlib, pkgutil, sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in {"torch", "transformers", "datasets", "huggingface_hub"}
        return None if hidden else PathFinder.find_spec(name, path, target)

sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
"""


def _run(code: str) -> None:
    script = _WITHOUT + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("room", ["core", "checkpoints", "adapters", "edits"])
def test_every_module_imports_without_torch(room: str) -> None:
    _run(
        f"""
        room = importlib.import_module("invarlock.{room}")
        for found in pkgutil.walk_packages(room.__path__, room.__name__ + "."):
            if found.name != "invarlock.core.runner":
                importlib.import_module(found.name)
        """
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("room", "name", "extra"), [("adapters", "HF_Auto_Adapter", "adapters"), ("edits", "RTNQuantEdit", "edits")]
)
def test_what_needs_torch_names_the_extra(room: str, name: str, extra: str) -> None:
    _run(
        f"""
        from invarlock.core.exceptions import DependencyError
        from invarlock.{room} import {name}
        try:
            {name}()
        except DependencyError as error:
            assert str(error).endswith('pip install "invarlock[{extra}]"'), error
        else:
            raise AssertionError("it was made")
        """
    )
