"""Reading YAML strictly: no duplicate keys, `!include` kept inside one folder, and the line where each key stands.

Aliases, merges (`<<`) and `!include` are resolved here; nothing is constructed but plain data.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from invarlock.core import settings
from invarlock.core.exceptions import ConfigError

__all__ = ["Document", "KeyPath", "read_yaml"]

KeyPath = tuple[str | int, ...]

_MAX_DEPTH = 8
_MAX_NODES = 100_000  # a file that aliases itself over and over grows without bound
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
    reader = _Reader(path.resolve().parent)
    data = reader.read(path, (), (), what)
    if data is None:
        raise ConfigError(f"{what} {path} is empty; expected a mapping such as `model: {{id: ...}}`")
    if not isinstance(data, dict):
        raise ConfigError(f"{what} {path} holds {_kind(data)}; expected a mapping such as `model: {{id: ...}}`")
    return Document(path, data, reader.lines)


def _kind(value: object) -> str:
    return {list: "a list", str: "text", bool: "true or false"}.get(type(value), "a number")


class _Reader:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.lines: dict[KeyPath, str] = {}
        self._nodes = 0

    def read(self, path: Path, above: tuple[Path, ...], key: KeyPath, what: str) -> Any:
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(f"{what} {path} does not exist; expected a YAML file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{what} {path} cannot be read: {error}; expected a YAML file in UTF-8") from None
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else self._build(loader, node, path, (*above, path.resolve()), key, ())
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark is not None else ""
            problem = getattr(error, "problem", None) or " ".join(str(error).split())
            raise ConfigError(f"{path.name}{line}: not valid YAML: {problem}") from None
        finally:
            loader.dispose()

    def _build(
        self, loader: _Loader, node: Any, path: Path, files: tuple[Path, ...], key: KeyPath, active: tuple[int, ...]
    ) -> Any:
        self._nodes += 1
        place = f"{path.name}:{node.start_mark.line + 1}"
        if id(node) in active or self._nodes > _MAX_NODES:
            raise ConfigError(f"{place}: aliases nest without end or make more than {_MAX_NODES} values")
        active = (*active, id(node))
        if node.tag == "!include":
            return self._include(node, path, files, key, place)
        if isinstance(node, yaml.SequenceNode) and node.tag == _PLAIN + "seq":
            for index, item in enumerate(node.value):
                self.lines[(*key, index)] = f"{path.name}:{item.start_mark.line + 1}"
            return [self._build(loader, item, path, files, (*key, i), active) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag == _PLAIN + "map":
            return self._mapping(loader, node, path, files, key, active)
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _SCALARS:
            raise ConfigError(f"{place}: tag {node.tag} is not supported; expected plain values, or !include")
        value: Any = loader.construct_object(node)
        return value

    def _mapping(
        self, loader: _Loader, node: Any, path: Path, files: tuple[Path, ...], key: KeyPath, active: tuple[int, ...]
    ) -> dict[str, Any]:
        written: set[Hashable] = set()
        for name, _ in node.value:  # before merging: a key beside `<<` may well repeat one of the merged mapping
            place = f"{path.name}:{name.start_mark.line + 1}"
            if not isinstance(name, yaml.ScalarNode):
                raise ConfigError(f"{place}: a key is not text; expected `name: value`")
            if name.value in written:
                raise ConfigError(f"{place}: key {name.value!r} stands there twice; remove one of them")
            written.add(name.value)
        loader.flatten_mapping(node)
        out: dict[str, Any] = {}
        for name, value in node.value:
            label = loader.construct_object(name)
            place = f"{path.name}:{name.start_mark.line + 1}"
            if not isinstance(label, str):
                raise ConfigError(f"{place}: key {label!r} is not text; put it in quotes")
            self.lines[(*key, label)] = place
            out[label] = self._build(loader, value, path, files, (*key, label), active)
        return out

    def _include(self, node: Any, path: Path, files: tuple[Path, ...], key: KeyPath, place: str) -> Any:
        if not isinstance(node, yaml.ScalarNode) or not node.value:
            raise ConfigError(f"{place}: !include takes a file name")
        target = (path.parent / node.value).resolve()
        if not target.is_relative_to(self.root) and not settings.flag("INVARLOCK_ALLOW_CONFIG_INCLUDE_OUTSIDE"):
            raise ConfigError(
                f"{place}: !include {node.value} leads outside the configuration's folder {self.root}; "
                "set INVARLOCK_ALLOW_CONFIG_INCLUDE_OUTSIDE=1 to allow it"
            )
        if target in files:
            raise ConfigError(f"{place}: !include {node.value} includes itself: {_cycle(files, target)}")
        if len(files) > _MAX_DEPTH:
            raise ConfigError(f"{place}: !include {node.value} is nested deeper than {_MAX_DEPTH} files")
        return self.read(target, files, key, f"{place}: included file")


def _cycle(files: tuple[Path, ...], target: Path) -> str:
    return " -> ".join(file.name for file in (*files[files.index(target) :], target))
