"""One registry for everything that has a name: adapters, edits, guards and data providers, ours and everybody else's.

All are entry points: ours stand in this project's pyproject.toml, a plugin's in its own. Listing imports nothing. A name
that two distributions claim raises; an unknown one suggests the nearest.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any, Generic, NamedTuple, TypeVar

from invarlock.core import settings
from invarlock.core.exceptions import ConfigError, DependencyError, InvarlockError

__all__ = ["Entry", "Registry", "adapters", "edits", "guards", "nearest", "no_argument", "providers"]

T = TypeVar("T")

_OWN = "invarlock"


class _Facts(NamedTuple):
    """What a name of ours needs beyond the core, and where it runs; see `Entry`."""

    needs: tuple[tuple[str, str], ...] = ()
    platforms: tuple[str, ...] = ()


_HF = (("transformers", "adapters"), ("torch", "adapters"))
_DATASETS = _Facts((("datasets", "eval"),))
#: by group and name; "" stands for every other name of the group
_FACTS: dict[str, dict[str, _Facts]] = {
    "invarlock.adapters": {
        "": _Facts(_HF),
        "hf_causal_onnx": _Facts((("onnxruntime", "onnx"), ("onnx", "onnx"), *_HF)),
    },
    "invarlock.edits": {"": _Facts((("torch", "edits"),))},
    "invarlock.guards": {"": _Facts((("torch", "guards"),)), "hello_guard": _Facts()},
    "invarlock.providers": {"": _Facts(), "wikitext2": _DATASETS, "hf_text": _DATASETS, "hf_seq2seq": _DATASETS},
}


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)`, or an empty string where nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def no_argument(what: str, name: str, known: Collection[str]) -> ConfigError:
    """Return the error for an argument that `what` does not have."""
    return ConfigError(f"{what} has no argument {name!r}{nearest(name, known)}; expected one of: {', '.join(known)}")


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

    def require(self) -> None:
        """Raise DependencyError where an extra must be installed first."""
        extra = self.missing_extra()
        if extra is not None:
            raise DependencyError(f"{self.kind} {self.name!r}", extra)

    def load(self) -> Any:
        """Import and return the target. Raises DependencyError or ConfigError, which carry the whole reason."""
        self.require()
        return self.resolve()

    def resolve(self) -> Any:
        """Import and return the target, whatever extra is missing."""
        module, _, attribute = self.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except InvarlockError:
            raise
        except Exception as error:  # the plugin boundary: whatever its import raised is the plugin's error, shown whole
            raise self.broken(f"cannot be loaded: {type(error).__name__}: {error}") from error

    def broken(self, what: str) -> ConfigError:
        """Return the error that says what is wrong with this plugin, and whose it is."""
        return ConfigError(f"plugin {self.name!r} ({self.target}, from {self.distribution} {self.version}) {what}")


class Registry(Generic[T]):
    """The names of one kind of thing (`kind`, singular) and how to load them; `offers` are the methods that it needs."""

    def __init__(self, kind: str, group: str, offers: tuple[str, ...], aliases: dict[str, str] | None = None) -> None:
        self.kind = kind
        self.group = group
        self.offers = offers
        self.aliases = aliases or {}

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
        found = _installed(self.group)
        if settings.flag("INVARLOCK_DISABLE_PLUGIN_DISCOVERY"):
            return tuple(entry for entry in found if entry.origin == "Core")
        return found

    def entry(self, name: str) -> Entry:
        """Return one entry; an unknown name raises ConfigError with the nearest."""
        entries = self.entries()
        name = self.aliases.get(name, name)
        if name not in entries:
            raise ConfigError(
                f"unknown {self.kind} {name!r}{nearest(name, entries)}; expected one of: {', '.join(entries)}"
            )
        return entries[name]

    def load(self, name: str) -> type[T]:
        """Import the class behind `name`. Raises DependencyError where an extra is missing, else as `resolve` does."""
        self.entry(name).require()
        return self.resolve(name)

    def resolve(self, name: str) -> type[T]:
        """Import the class behind `name`, also where an extra is missing: its options can be read without it.

        Raises ConfigError where it cannot be imported or lacks a method of its kind.
        """
        entry = self.entry(name)
        loaded: type[T] = entry.resolve()
        if not isinstance(loaded, type) or any(not callable(getattr(loaded, method, None)) for method in self.offers):
            raise entry.broken(f"is no {self.kind}; expected a class with {', '.join(self.offers)}")
        return loaded

    def create(self, name: str, **arguments: object) -> T:
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
    own = _FACTS[group]
    entries = []
    for point in metadata.entry_points(group=group):
        distribution, version = (point.dist.name, point.dist.version) if point.dist else ("unknown", "unknown")
        facts = own.get(point.name, own[""]) if distribution == _OWN else _Facts()
        entries.append(Entry(point.name, point.value, group, distribution, version, *facts))
    return tuple(dict.fromkeys(entries))


adapters: Registry[Any] = Registry(
    "adapter", "invarlock.adapters", ("load_model", "describe", "snapshot", "restore"), {"auto": "hf_auto"}
)
edits: Registry[Any] = Registry("edit", "invarlock.edits", ("apply",))
guards: Registry[Any] = Registry("guard", "invarlock.guards", ("validate",))
providers: Registry[Any] = Registry("data provider", "invarlock.providers", ("options", "windows"))
