"""`invarlock version`."""

from __future__ import annotations

import platform

import invarlock
from invarlock.cli.console import emit_json, say
from invarlock.cli.options import JsonOption

__all__ = ["version"]

_SCHEMA = "v1"  # of certificates; a test compares it with the certificate models


def version(json: JsonOption = False) -> None:
    """Show the version and the certificate schema."""
    if json:
        emit_json(version=invarlock.__version__, schema_version=_SCHEMA, python=platform.python_version())
    else:
        say(f"invarlock {invarlock.__version__} (certificate schema {_SCHEMA})")
