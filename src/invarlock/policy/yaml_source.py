"""Reading YAML strictly: no duplicate keys, `!include` kept inside one folder, and the line where each key stands.

Aliases, merges (`<<`) and `!include` are resolved here; nothing is constructed but plain data.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from invarlock.core import settings
from invarlock.core.exceptions import ConfigError
from invarlock.core.reading import check_size, read_regular

__all__ = ["Document", "KeyPath", "read_yaml"]

KeyPath = tuple[str | int, ...]

_MAX_DEPTH = 8
_MAX_NODES = 100_000  # a file that aliases itself over and over grows without bound
_LARGEST = 10**18
_PLAIN = "tag:yaml.org,2002:"
_SCALARS = {_PLAIN + kind for kind in ("str", "int", "float", "bool", "null")}
_FLOAT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but `1e-3` is a number (YAML 1.1 takes it for text) and a date is text (JSON has no dates)."""


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


@dataclass(frozen=True)
class Document:
    """A mapping read from `path`; `lines` says at which `file:line` each key stands."""

    path: Path
    data: dict[str, Any]
    lines: dict[KeyPath, str] = field(default_factory=dict)

    def where(self, key: KeyPath) -> str:
        """Return `file:line` of the key or, where it is not written out, of the nearest key above it."""
        for end in range(len(key), 0, -1):
            if key[:end] in self.lines:
                return self.lines[key[:end]]
        return self.path.name

    def error(self, key: KeyPath, message: str) -> ConfigError:
        """Return the error about a key: where it stands, and what is wrong."""
        return ConfigError(f"{self.where(key)}: {message}")


def read_yaml(path: Path | str, *, what: str = "configuration") -> Document:
    """Read one file, its includes resolved. Raises ConfigError: missing, empty, malformed, or not a mapping."""
    path = Path(path)
    whole = _Whole(_real(path).parent)
    data = whole.read(path, (), (), what)
    if not isinstance(data, dict):
        kinds = {list: "holds a list", str: "holds text", bool: "holds true or false", type(None): "is empty"}
        held = kinds.get(type(data), "holds a number")
        raise ConfigError(f"{what} {path} {held}; expected a mapping such as `model: {{id: ...}}`")
    return Document(path, data, whole.lines)


def _real(path: Path) -> Path:
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError):  # no name of a file, as reading it says
        return path


class _Whole:
    """A file with all that it includes: where each key stands, and how many values there are."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lines: dict[KeyPath, str] = {}
        self.values = self.size = 0

    def read(self, path: Path, above: tuple[Path, ...], key: KeyPath, what: str) -> Any:
        """Return what stands in a file, which files `above` include at `key`."""
        data = read_regular(path, "settings", f"a YAML file, the {what}")
        self.size += len(data)
        check_size("settings", f"{what} {path} with what it includes", ConfigError, size=self.size)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{what} {path} cannot be read: {error}; expected a YAML file in UTF-8") from None
        return self.parse(text, path, above, key)

    def parse(self, text: str, path: Path, above: tuple[Path, ...], key: KeyPath) -> Any:
        """Return the plain data of a file's text."""
        try:
            loader = _Loader(text)
        except yaml.YAMLError as error:  # a character that YAML does not allow
            raise ConfigError(f"{path.name}: not valid YAML: {' '.join(str(error).split())}") from None
        try:
            node = loader.get_single_node()
            file = _File(self, loader, path, (*above, _real(path)))
            return None if node is None else file.build(node, key, ())
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark is not None else ""
            problem = getattr(error, "problem", None) or " ".join(str(error).split())
            raise ConfigError(f"{path.name}{line}: not valid YAML: {problem}") from None
        except RecursionError:
            raise ConfigError(f"{path.name}: nests deeper than any configuration; write it flat") from None
        finally:
            loader.dispose()


@dataclass(frozen=True)
class _File:
    """One file at work; `files` are those above it and itself."""

    whole: _Whole
    loader: _Loader
    path: Path
    files: tuple[Path, ...]

    def place(self, node: yaml.Node) -> str:
        return f"{self.path.name}:{node.start_mark.line + 1}"

    def build(self, node: yaml.Node, key: KeyPath, active: tuple[int, ...]) -> Any:
        """Return the plain data of a node, which stands at `key` within the nodes `active`."""
        self.whole.values += 1
        if id(node) in active or self.whole.values > _MAX_NODES:
            raise ConfigError(f"{self.place(node)}: aliases nest without end or make more than {_MAX_NODES} values")
        active = (*active, id(node))
        if node.tag == "!include":
            return self.include(node, key)
        if isinstance(node, yaml.SequenceNode) and node.tag == _PLAIN + "seq":
            self.whole.lines |= {(*key, index): self.place(item) for index, item in enumerate(node.value)}
            return [self.build(item, (*key, index), active) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag == _PLAIN + "map":
            return self.mapping(node, key, active)
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _SCALARS:
            raise ConfigError(
                f"{self.place(node)}: tag {node.tag} is not supported; expected plain values, or !include"
            )
        return self.scalar(node)

    def scalar(self, node: yaml.Node) -> Any:
        try:
            value = self.loader.construct_object(node)
        except ValueError as error:
            raise ConfigError(f"{self.place(node)}: not a value: {error}") from None
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise ConfigError(f"{self.place(node)}: a number of more than 18 digits; put it in quotes if it is text")
        return value

    def mapping(self, node: yaml.MappingNode, key: KeyPath, active: tuple[int, ...]) -> dict[str, Any]:
        written: set[Hashable] = set()
        for name, _ in node.value:  # before merging: a key beside `<<` may well repeat one of the merged mapping
            if not isinstance(name, yaml.ScalarNode):
                raise ConfigError(f"{self.place(name)}: a key is not text; expected `name: value`")
            if name.value in written:
                raise ConfigError(f"{self.place(name)}: key {name.value!r} stands there twice; remove one of them")
            written.add(name.value)
        self.loader.flatten_mapping(node)
        out: dict[str, Any] = {}
        for name, value in node.value:
            label = self.scalar(name)
            if not isinstance(label, str):
                raise ConfigError(f"{self.place(name)}: key {label!r} is not text; put it in quotes")
            self.whole.lines[(*key, label)] = self.place(name)
            out[label] = self.build(value, (*key, label), active)
        return out

    def include(self, node: yaml.Node, key: KeyPath) -> Any:
        place, root = self.place(node), self.whole.root
        if not isinstance(node, yaml.ScalarNode) or not node.value:
            raise ConfigError(f"{place}: !include takes a file name")
        target = _real(self.path.parent / node.value)
        if not target.is_relative_to(root) and not settings.flag("INVARLOCK_ALLOW_CONFIG_INCLUDE_OUTSIDE"):
            raise ConfigError(
                f"{place}: !include {node.value} leads outside the configuration's folder {root}; "
                "set INVARLOCK_ALLOW_CONFIG_INCLUDE_OUTSIDE=1 to allow it"
            )
        if target in self.files:
            circle = " -> ".join(file.name for file in (*self.files[self.files.index(target) :], target))
            raise ConfigError(f"{place}: !include {node.value} includes itself: {circle}")
        if len(self.files) > _MAX_DEPTH:
            raise ConfigError(f"{place}: !include {node.value} is nested deeper than {_MAX_DEPTH} files")
        return self.whole.read(target, self.files, key, f"{place}: included file")
