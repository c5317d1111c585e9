"""The network is closed unless it is opened, in a process of its own so that this one keeps its sockets."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

PRELUDE = """
import os, socket
from invarlock.core.network import enforce_network_policy
from invarlock.core.exceptions import NetworkError
enforce_network_policy()
def refused(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except NetworkError as error:
        assert "INVARLOCK_ALLOW_NETWORK=1" in str(error), error
        return True
    except OSError:
        return False
    return False
"""


def _run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.endswith("OFFLINE")}
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    [
        'socket.create_connection, ("192.0.2.1", 80), timeout=1',
        'socket.create_connection, ("example.org", 80), timeout=1',
        'socket.socket().connect, ("192.0.2.1", 80)',
        'socket.socket().connect_ex, ("192.0.2.1", 80)',
        'socket.socket(socket.AF_INET6).connect, ("2001:db8::1", 80)',
        'socket.socket(type=socket.SOCK_DGRAM).sendto, b"x", ("192.0.2.1", 53)',
        'socket.socket(type=socket.SOCK_DGRAM).sendto, b"x", 0, ("192.0.2.1", 53)',
        'socket.socket(type=socket.SOCK_DGRAM).sendmsg, [b"x"], [], 0, ("192.0.2.1", 53)',
        'socket._socket.socket(socket.AF_INET, socket.SOCK_STREAM).connect, ("192.0.2.1", 80)',
        'socket.socket.__base__.connect_ex, socket.socket(), ("192.0.2.1", 80)',
        'socket._socket.getaddrinfo, "example.org", 80',
        'socket.getnameinfo, ("192.0.2.1", 80), 0',
        'socket.getaddrinfo, "example.org", 80',
        'socket.gethostbyname, "example.org"',
        'socket.gethostbyname_ex, "example.org"',
        'socket.gethostbyaddr, "192.0.2.1"',
    ],
)
def test_every_way_out_is_refused_by_name(call: str) -> None:
    done = _run(f"assert refused({call})")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_this_machine_stays_reachable() -> None:
    done = _run(
        """
        import tempfile
        for host in ("127.0.0.1", "localhost"):
            server = socket.socket(); server.bind(("127.0.0.1", 0)); server.listen()
            client = socket.create_connection((host, server.getsockname()[1]), timeout=5); client.close()
        with tempfile.TemporaryDirectory() as folder:
            server = socket.socket(socket.AF_UNIX); server.bind(folder + "/s"); server.listen()
            socket.socket(socket.AF_UNIX).connect(folder + "/s")
        a = socket.socket(type=socket.SOCK_DGRAM); a.bind(("127.0.0.1", 0))
        socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", a.getsockname())
        """
    )
    assert done.returncode == 0, done.stderr


def test_the_offline_switches_of_hugging_face_are_set() -> None:
    done = _run('assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"')
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import invarlock.core.network, socket; socket.socket().connect(('192.0.2.1', 80))",
        "import os; assert os.environ['HF_HUB_OFFLINE'] == os.environ['TRANSFORMERS_OFFLINE'] == '1'; raise SystemExit(3)",
    ],
    ids=["a worker that imports it", "another program"],
)
def test_child_processes_inherit_it(code: str) -> None:
    done = _run(
        f"""
        import subprocess, sys
        done = subprocess.run([sys.executable, "-c", {code!r}], capture_output=True, text=True)
        assert done.returncode == 3 or "INVARLOCK_ALLOW_NETWORK=1" in done.stderr, done.stderr
        """
    )
    assert done.returncode == 0, done.stderr


def test_permission_opens_it() -> None:
    code = """
    assert "HF_HUB_OFFLINE" not in os.environ
    assert not refused(socket.socket().connect_ex, ("127.0.0.1", 9))
    """
    done = _run(code, INVARLOCK_ALLOW_NETWORK="1")
    assert done.returncode == 0, done.stderr
