"""No network unless `INVARLOCK_ALLOW_NETWORK=1`.

Enforced twice: by the Hugging Face offline switches, set before those libraries are imported, and by an audit hook that
the interpreter calls before any socket of this process connects, sends or looks up a name, from whichever module. Addresses
on this machine (loopback, Unix sockets) stay open, and so does a host that the request itself names (a served engine).

Not enforced: code that is not Python's (a native library that opens sockets of its own) and other programs. Child processes
inherit the switches; those of Python that import InvarLock (workers of `multiprocessing`) close their sockets too.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import sys
from typing import Any

from invarlock.core import settings
from invarlock.core.exceptions import NetworkError

__all__ = ["allow_host", "enforce_network_policy", "network_allowed"]

_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_INHERITED = "_INVARLOCK_NETWORK_CLOSED_BY"  # set for child processes: the id of the process that closed it
#: events of the interpreter, and which of their arguments is the address
_EVENTS = {
    "socket.connect": 1, "socket.sendto": 1, "socket.sendmsg": 1, "socket.getaddrinfo": 0, "socket.gethostbyname": 0,
    "socket.gethostbyaddr": 0, "socket.getnameinfo": 0,
}  # fmt: skip
_closed = False  # whether this process's sockets are; an audit hook cannot be taken out again
_hooked = False
_named: set[str] = set()  # hosts that the request itself names, and their addresses


def network_allowed() -> bool:
    """Return whether `INVARLOCK_ALLOW_NETWORK` is on."""
    return settings.flag("INVARLOCK_ALLOW_NETWORK")


def allow_host(host: str) -> None:
    """Open the way to one host that the request names, such as a served engine's; all others stay closed."""
    _named.add(host)
    if not _is_local(host):
        with contextlib.suppress(OSError):  # whoever connects says so
            _named.update(str(found[4][0]) for found in socket.getaddrinfo(host, None))


def _is_local(host: object) -> bool:
    if host is None or host in {"localhost", "localhost.", b"localhost", ""}:
        return True
    text = host.decode() if isinstance(host, bytes) else str(host)
    try:
        return ipaddress.ip_address(text.split("%")[0]).is_loopback
    except ValueError:
        return False


def _refuse(host: object) -> None:
    named = (host.decode() if isinstance(host, bytes) else str(host)) in _named
    if not network_allowed() and not named and not _is_local(host):
        raise NetworkError(
            f"a connection to {host!r} was refused: the network is off; set INVARLOCK_ALLOW_NETWORK=1 to allow it"
        )


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    place = _EVENTS.get(event)
    if place is None or not _closed:
        return
    address = arguments[place]
    if isinstance(address, tuple):  # (host, port, ...); that of a Unix socket is text
        _refuse(next((part for part in address[:1] if isinstance(part, (str, bytes))), None))
    elif place == 0:
        _refuse(address)


def enforce_network_policy() -> None:
    """Close the network for this process unless it is allowed. Called once, by the command line, before heavy imports.

    A library user who imports InvarLock keeps their process as it is; they call this function to get the same policy.
    """
    global _closed, _hooked
    if network_allowed():
        return
    for switch in _SWITCHES:
        os.environ[switch] = "1"  # also over a "0": the variable of ours alone opens the network
    os.environ[_INHERITED] = str(os.getpid())
    _closed = True
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked = True


if os.environ.get(_INHERITED, str(os.getpid())) != str(os.getpid()):
    enforce_network_policy()  # a child of a process that closed it
