"""Which pip command installs or removes what a plugin needs. Nothing is run here."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from invarlock.core.exceptions import ConfigError
from invarlock.core.inventory import inventory
from invarlock.core.registry import Entry, nearest

__all__ = ["install_command", "uninstall_command"]

_OWN = "invarlock"


def install_command(name: str) -> list[str]:
    """Return the pip command that brings what `name` needs: an extra, or a registered name of ours."""
    if name in _extras():
        return _install(name)
    for entry in _entries(name):
        if entry.origin == "Plugin":
            raise ConfigError(f"{name!r} is installed already, by {entry.distribution} {entry.version}")
        extras = list(dict.fromkeys(extra for _, extra in entry.needs))
        if not extras:
            raise ConfigError(f"{name!r} comes with invarlock and needs no extra; there is nothing to install")
        return _install(",".join(extras))
    raise _unknown(name)


def uninstall_command(name: str) -> list[str]:
    """Return the pip command that removes a plugin's distribution, or the packages that one extra alone brings."""
    plugins = {entry.distribution for entry in _entries(name) if entry.origin == "Plugin"}
    everyone = {status.entry.distribution for status in inventory("plugins")}
    found = sorted(plugins or ({name} & everyone))
    if found:
        return ["pip", "uninstall", "-y", *found]
    extras = {name} & _extras() or {extra for entry in _entries(name) for _, extra in entry.needs[:1]}
    if not extras:
        raise _unknown(name)
    packages = sorted(_brought(extras.pop()))
    if not packages:
        raise ConfigError(
            f"{name!r} brings no package that nothing else of invarlock needs; there is nothing to uninstall"
        )
    return ["pip", "uninstall", "-y", *packages]


def _install(extras: str) -> list[str]:
    return ["pip", "install", f"{_OWN}[{extras}]"]


def _entries(name: str) -> list[Entry]:
    return [status.entry for status in inventory() if status.entry.name == name]


def _extras() -> set[str]:
    return set(metadata.metadata(_OWN).get_all("Provides-Extra") or [])


def _required(extra: str | None) -> set[str]:
    """Return the packages that an extra asks for itself, or the core for None; those of other extras are not followed."""
    found: set[str] = set()
    for text in metadata.requires(_OWN) or []:
        requirement = Requirement(text)
        always = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        wanted = always if extra is None else not always and requirement.marker.evaluate({"extra": extra})  # type: ignore[union-attr]
        if wanted and canonicalize_name(requirement.name) != _OWN:
            found.add(canonicalize_name(requirement.name))
    return found


def _brought(extra: str) -> set[str]:
    others: set[str] = set()
    for other in _extras() - {extra}:
        others |= _required(other)
    return _required(extra) - others - _required(None)


def _unknown(name: str) -> ConfigError:
    known = sorted(_extras() | {status.entry.name for status in inventory()})
    return ConfigError(f"unknown plugin or extra {name!r}{nearest(name, known)}; expected one of: {', '.join(known)}")
