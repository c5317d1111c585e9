"""What is registered and whether it would work, told without importing any of it.

ready        its package and everything that it needs are there
missing      an extra must be installed first; `hint` is the command
broken       its package or module is not there, or (after `explain`) importing it raised
shadowed     two distributions claim the name, so asking for it raises
unsupported  it does not run on this platform
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import logging
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Literal

from invarlock.core import registry
from invarlock.core.exceptions import ConfigError, InvarlockError
from invarlock.core.registry import Entry, Registry, nearest

__all__ = ["CATEGORIES", "PluginStatus", "State", "explain", "inventory", "select"]

State = Literal["ready", "missing", "broken", "shadowed", "unsupported"]

_LOG = logging.getLogger(__name__)
#: what a category of the listing holds
_REGISTRIES: dict[str, Registry[Any]] = {
    "adapters": registry.adapters,
    "guards": registry.guards,
    "edits": registry.edits,
    "datasets": registry.providers,
}
CATEGORIES = (*_REGISTRIES, "plugins", "all")
_FILTERS = ("ready", "missing", "broken", "shadowed", "unsupported", "core", "plugin")
#: the package that does the work where it is named otherwise than its module
_PACKAGES = {"compressed_tensors": "compressed-tensors"}


@dataclass(frozen=True)
class PluginStatus:
    """One registered name and its state. `backend` is the (package, installed version) that it works with, if any."""

    entry: Entry
    state: State
    reason: str = ""
    hint: str = ""
    backend: tuple[str, str | None] | None = None
    parameters: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Return `name | origin | kind | backend | backend's version | status`."""
        package, version = self.backend or (None, None)
        cells = (
            self.entry.name,
            self.entry.origin,
            self.entry.kind.title(),
            package or "—",
            version or "—",
            self.summary(),
        )
        return " | ".join(cells)

    def summary(self) -> str:
        """Return the state as it is shown."""
        texts = {
            "ready": "✅ Ready",
            "missing": f"⬜ Missing: {self.hint}",
            "broken": f"❌ Broken: {self.reason}",
            "shadowed": f"❌ Name claimed twice: {self.reason}",
            "unsupported": f"⬜ Unsupported: {self.reason}",
        }
        return texts[self.state]

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON form, one item of the `plugins-v1` envelope."""
        module, _, attribute = self.entry.target.partition(":")
        package, version = self.backend or (None, None)
        return {
            "name": self.entry.name,
            "kind": self.entry.kind,
            "origin": self.entry.origin.lower(),
            "module": module,
            "attribute": attribute,
            "entry_point": f"{self.entry.group}: {self.entry.name} = {self.entry.target}",
            "distribution": self.entry.distribution,
            "version": self.entry.version,
            "backend": {"name": package, "version": version} if package else None,
            "status": self.state,
            "reason": self.reason or None,
            "hint": self.hint or None,
        }


def inventory(category: str = "all") -> list[PluginStatus]:
    """List what is registered in a category; `plugins` is everything that is not ours. Imports none of it."""
    if category not in CATEGORIES:
        raise ConfigError(
            f"unknown category {category!r}{nearest(category, CATEGORIES)}; expected one of: {', '.join(CATEGORIES)}"
        )
    found: list[PluginStatus] = []
    for name, kind in _REGISTRIES.items():
        if category in (name, "all", "plugins"):
            claims = kind.claims()
            times = Counter(entry.name for entry in claims)
            found += [_status(entry, claims if times[entry.name] > 1 else ()) for entry in sorted(claims, key=_by_name)]
    for status in found:
        _LOG.debug(
            "%s %s = %s (%s): %s",
            status.entry.group,
            status.entry.name,
            status.entry.target,
            status.entry.distribution,
            status.state,
        )
    return [status for status in found if category != "plugins" or status.entry.origin == "Plugin"]


def select(statuses: Iterable[PluginStatus], only: str | None, *, show_unsupported: bool) -> list[PluginStatus]:
    """Keep one state or origin; what this platform does not support is kept only when asked for."""
    if only is not None and only not in _FILTERS:
        raise ConfigError(f"unknown filter {only!r}{nearest(only, _FILTERS)}; expected one of: {', '.join(_FILTERS)}")
    show_unsupported = show_unsupported or only == "unsupported"
    return [
        status
        for status in statuses
        if (only is None or only in (status.state, status.entry.origin.lower()))
        and (show_unsupported or status.state != "unsupported")
    ]


def explain(name: str, category: str = "all") -> list[PluginStatus]:
    """Return everything about one name, in whichever kinds it is registered, importing it for its constructor.

    An unknown name raises ConfigError with the nearest. An import that raises makes the entry `broken`, with the error.
    """
    known = inventory(category)
    names = sorted({status.entry.name for status in known})
    wanted = name if name in names else registry.adapters.aliases.get(name, name)
    found = [status for status in known if status.entry.name == wanted]
    if not found:
        what = "plugin" if category == "all" else category.rstrip("s")
        raise ConfigError(f"unknown {what} {name!r}{nearest(name, names)}; expected one of: {', '.join(names)}")
    return [_imported(status) if status.state == "ready" else status for status in found]


def _by_name(entry: Entry) -> tuple[str, str]:
    return entry.name, entry.distribution


def _status(entry: Entry, rivals: Iterable[Entry]) -> PluginStatus:
    backend = _backend(entry)
    others = [
        f"{rival.distribution} ({rival.target})" for rival in rivals if rival.name == entry.name and rival != entry
    ]
    if others:
        reason = f"{entry.distribution} ({entry.target}) and {', '.join(others)}"
        return PluginStatus(entry, "shadowed", reason, "uninstall one of them", backend)
    if entry.platforms and sys.platform not in entry.platforms:
        return PluginStatus(
            entry, "unsupported", f"runs on {', '.join(entry.platforms)}, this is {sys.platform}", "", backend
        )
    extra = entry.missing_extra()
    if extra is not None:
        return PluginStatus(
            entry, "missing", f"the extra {extra!r} is not installed", f'pip install "invarlock[{extra}]"', backend
        )
    problem = _absence(entry.target.partition(":")[0])
    if problem:
        return PluginStatus(entry, "broken", problem, f"reinstall {entry.distribution}", backend)
    return PluginStatus(entry, "ready", backend=backend)


def _backend(entry: Entry) -> tuple[str, str | None] | None:
    if not entry.needs:
        return None
    package = _PACKAGES.get(entry.needs[0][0], entry.needs[0][0])
    try:
        return package, metadata.version(package)
    except metadata.PackageNotFoundError:
        return package, None


def _absence(module: str) -> str | None:
    """Say which part of a dotted module is not there, without running any of its packages' code."""
    parts = module.split(".")
    try:
        spec = importlib.util.find_spec(parts[0])  # a top-level name is found without importing anything
        for end in range(2, len(parts) + 1):
            if spec is None:
                break
            where = spec.submodule_search_locations
            spec = importlib.machinery.PathFinder.find_spec(".".join(parts[:end]), list(where)) if where else None
    except (ImportError, ValueError) as error:  # a finder that fails, or a half-removed package
        return f"module {module} cannot be found: {error}"
    return None if spec is not None else f"module {module} is not there"


def _imported(status: PluginStatus) -> PluginStatus:
    entry = status.entry
    kind = next(kind for kind in _REGISTRIES.values() if kind.group == entry.group)
    try:
        target = kind.load(entry.name)
    except InvarlockError as error:
        return PluginStatus(entry, "broken", str(error), f"reinstall {entry.distribution}", status.backend)
    parameters = [
        str(parameter.replace(annotation=parameter.empty))
        for parameter in inspect.signature(target).parameters.values()
    ]
    if parameters == ["**overrides"]:  # a built-in guard: any key of its policy
        parameters = [f"{key}={value!r}" for key, value in getattr(target, "defaults", {}).items()]
    return PluginStatus(entry, "ready", backend=status.backend, parameters=parameters)
