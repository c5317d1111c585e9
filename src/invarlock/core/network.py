"""No network unless `INVARLOCK_ALLOW_NETWORK=1`.

Enforced twice: by the Hugging Face offline switches, set before those libraries are imported, and where sockets are
opened. Addresses on this machine (loopback, Unix sockets) stay open; name look-ups are refused too.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable
from typing import TypeVar

from invarlock.core import settings
from invarlock.core.exceptions import NetworkError

__all__ = ["enforce_network_policy", "network_allowed"]

_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_METHODS = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex", "sendto")}
_LOOK_UPS = {
    name: getattr(socket, name) for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "gethostbyaddr")
}

T = TypeVar("T")


def network_allowed() -> bool:
    """Return whether `INVARLOCK_ALLOW_NETWORK` is on."""
    return settings.flag("INVARLOCK_ALLOW_NETWORK")


def _is_local(host: object) -> bool:
    if host is None or host in {"localhost", "localhost.", b"localhost", ""}:
        return True
    text = host.decode() if isinstance(host, bytes) else str(host)
    try:
        return ipaddress.ip_address(text.split("%")[0]).is_loopback
    except ValueError:
        return False


def _refuse(host: object) -> None:
    if not network_allowed() and not _is_local(host):
        raise NetworkError(
            f"a connection to {host!r} was refused: the network is off; set INVARLOCK_ALLOW_NETWORK=1 to allow it"
        )


def _guarded(original: Callable[..., T]) -> Callable[..., T]:
    """Wrap a method of sockets whose last argument is the address."""

    def connect(self: socket.socket, *arguments: object) -> T:
        address = arguments[-1]
        if self.family in (socket.AF_INET, socket.AF_INET6) and isinstance(address, tuple):
            _refuse(address[0])
        return original(self, *arguments)

    return connect


def _guarded_look_up(original: Callable[..., T]) -> Callable[..., T]:
    def look_up(host: object, *arguments: object, **options: object) -> T:
        _refuse(host)
        return original(host, *arguments, **options)

    return look_up


def enforce_network_policy() -> None:
    """Close the network for this process unless it is allowed. Called once, by the command line, before heavy imports.

    A library user who imports InvarLock keeps their process as it is; they call this function to get the same policy.
    """
    if network_allowed():
        return
    for switch in _SWITCHES:
        os.environ[switch] = "1"  # also over a "0": the variable of ours alone opens the network
    for name, method in _METHODS.items():
        setattr(socket.socket, name, _guarded(method))
    for name, function in _LOOK_UPS.items():
        setattr(socket, name, _guarded_look_up(function))
