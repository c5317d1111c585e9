"""`__all__` says what is public: every name that a module defines without an underscore, and what it re-exports on purpose.

The command line has no names for others: its modules list what the table of commands asks for.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "invarlock").rglob("*.py"))
    if path.stem != "__main__" and path.parent.name != "cli"
}


def defined(body: list[ast.stmt]) -> Iterator[str]:
    """Names that the top of a module gives a value: classes, functions, constants."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from defined(node.body)


def own_names(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    type_variables = {
        name
        for node in tree.body
        if isinstance(node, ast.Assign) and "TypeVar" in ast.dump(node.value)
        for name in defined([node])
    }
    return {name for name in defined(tree.body) if not name.startswith("_")} - type_variables


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_what_is_public_is_what_all_says(name: str) -> None:
    module = importlib.import_module(name)
    public = list(getattr(module, "__all__", ()))
    assert len(set(public)) == len(public)
    assert not own_names(MODULES[name]) - set(public), (
        "public names that __all__ leaves out: add them, or an underscore"
    )
    assert not [missing for missing in public if not hasattr(module, missing)], "__all__ names what is not there"


def test_private_names_are_not_public() -> None:
    listed = [(name, key) for name in MODULES for key in getattr(importlib.import_module(name), "__all__", ())]
    assert not [(name, key) for name, key in listed if key.startswith("_") and key != "__version__"]
