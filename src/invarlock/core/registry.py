"""One registry for everything that has a name: adapters, edits, guards (entry points) and data providers (a table).

Listing imports nothing. A name that two distributions claim raises; an unknown one suggests the nearest.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any, Generic, TypeVar

from invarlock.core import settings
from invarlock.core.exceptions import ConfigError, DependencyError, InvarlockError

__all__ = ["Entry", "Registry", "adapters", "edits", "guards", "nearest", "providers"]

T = TypeVar("T")

_OWN = "invarlock"
#: what an entry of ours needs beyond the core: the module to look for and the extra that brings it
_NEEDS = {
    "invarlock.adapters": (("transformers", "adapters"), ("torch", "adapters")),
    "invarlock.edits": (("torch", "edits"),),
    "invarlock.guards": (("torch", "guards"),),
}
_NAMED_NEEDS = {
    "hf_causal_onnx": (("onnxruntime", "onnx"),),
    "hf_bnb": (("bitsandbytes", "gpu"),),
    "hf_gptq": (("gptqmodel", "gptq"),),
    "hf_awq": (("compressed_tensors", "awq"),),
}
_TORCH_FREE = {"hello_guard"}
_LINUX_ONLY = {"hf_bnb", "hf_gptq"}
_DATA_NEEDS = (("datasets", "eval"),)
_HUB_PROVIDERS = {"wikitext2", "hf_text", "hf_seq2seq"}


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)`, or an empty string where nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


@dataclass(frozen=True)
class Entry:
    """One registered name; `target` is `module:attribute`.

    `needs` are the (module, extra) pairs that it cannot do without, the most specific first; `platforms` the values of
    `sys.platform` that it runs on, empty for all.
    """

    name: str
    target: str
    group: str
    distribution: str
    version: str
    needs: tuple[tuple[str, str], ...] = ()
    platforms: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """`adapter`, `guard`, `edit` or `provider`."""
        return self.group.rpartition(".")[2].rstrip("s")

    @property
    def origin(self) -> str:
        """`Core` for ours, `Plugin` for everybody else's."""
        return "Core" if self.distribution == _OWN else "Plugin"

    def missing_extra(self) -> str | None:
        """Return the extra that must be installed first, without importing anything."""
        for module, extra in self.needs:
            if sys.modules.get(module) is None and importlib.util.find_spec(module) is None:
                return extra
        return None

    def load(self) -> Any:
        """Import and return the target. Raises DependencyError or ConfigError, which carry the whole reason."""
        extra = self.missing_extra()
        if extra is not None:
            raise DependencyError(f"{self.kind} {self.name!r}", extra)
        module, _, attribute = self.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except InvarlockError:
            raise
        except Exception as error:  # the plugin boundary: whatever its import raised is the plugin's error, shown whole
            raise ConfigError(
                f"plugin {self.name!r} ({self.target}, from {self.distribution} {self.version}) cannot be loaded: "
                f"{type(error).__name__}: {error}"
            ) from error


class Registry(Generic[T]):
    """The names of one kind of thing (`kind`, singular) and how to load them."""

    def __init__(
        self, kind: str, group: str, table: dict[str, str] | None = None, aliases: dict[str, str] | None = None
    ):
        self.kind = kind
        self.group = group
        self._table = table or {}
        self._aliases = aliases or {}

    def entries(self) -> dict[str, Entry]:
        """Return every entry by name, sorted. Raises ConfigError where two distributions claim one name."""
        found: dict[str, Entry] = {}
        for entry in self.claims():
            other = found.get(entry.name)
            if other is not None:
                raise ConfigError(
                    f"{self.kind} name {entry.name!r} is claimed twice: by {other.distribution} ({other.target}) and "
                    f"{entry.distribution} ({entry.target}); uninstall one of them"
                )
            found[entry.name] = entry
        return dict(sorted(found.items()))

    def claims(self) -> tuple[Entry, ...]:
        """Return every entry, also where several distributions claim one name: for listings, which must not fail."""
        if settings.flag("INVARLOCK_DISABLE_PLUGIN_DISCOVERY"):
            return tuple(entry for entry in (*self._own_table(), *_installed(self.group)) if entry.origin == "Core")
        return (*self._own_table(), *_installed(self.group))

    def _own_table(self) -> Iterator[Entry]:
        from invarlock import __version__

        for name, target in self._table.items():
            needs = _DATA_NEEDS if name in _HUB_PROVIDERS else ()
            yield Entry(name, target, self.group, _OWN, __version__, needs)

    def entry(self, name: str) -> Entry:
        """Return one entry; an unknown name raises ConfigError with the nearest."""
        entries = self.entries()
        name = self._aliases.get(name, name)
        if name not in entries:
            raise ConfigError(
                f"unknown {self.kind} {name!r}{nearest(name, entries)}; expected one of: {', '.join(entries)}"
            )
        return entries[name]

    def load(self, name: str) -> type[T]:
        """Import the class behind `name`."""
        loaded: type[T] = self.entry(name).load()
        return loaded

    def create(self, name: str, **arguments: Any) -> T:
        """Import the class behind `name` and construct it; arguments that it does not take raise ConfigError."""
        factory = self.load(name)
        taken = inspect.signature(factory).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
            for argument in arguments:
                if argument not in taken:
                    expected = f"expected one of: {', '.join(taken)}" if taken else "it takes none"
                    raise ConfigError(
                        f"{self.kind} {name!r} takes no argument {argument!r}{nearest(argument, taken)}; {expected}"
                    )
        return factory(**arguments)


@cache
def _installed(group: str) -> tuple[Entry, ...]:
    entries = []
    for point in metadata.entry_points(group=group):
        distribution = point.dist.name if point.dist else "unknown"
        version = point.dist.version if point.dist else "unknown"
        needs: tuple[tuple[str, str], ...] = ()
        platforms: tuple[str, ...] = ()
        if distribution == _OWN:
            needs = () if point.name in _TORCH_FREE else (*_NAMED_NEEDS.get(point.name, ()), *_NEEDS[group])
            platforms = ("linux",) if point.name in _LINUX_ONLY else ()
        entries.append(Entry(point.name, point.value, group, distribution, version, needs, platforms))
    return tuple(dict.fromkeys(entries))


def _provider_table() -> dict[str, str]:
    from invarlock.eval.data import PROVIDERS

    return PROVIDERS


adapters: Registry[Any] = Registry("adapter", "invarlock.adapters", aliases={"auto": "hf_auto"})
edits: Registry[Any] = Registry("edit", "invarlock.edits")
guards: Registry[Any] = Registry("guard", "invarlock.guards")


def providers() -> Registry[Any]:
    """Return the registry of data providers (a table of ours; there is no entry-point group for them)."""
    return Registry("data provider", "invarlock.providers", table=_provider_table())
