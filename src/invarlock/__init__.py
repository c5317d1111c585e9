"""InvarLock: may this edited model ship?

Measure a model into a piece of evidence; compare two pieces of evidence into a verdict.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("invarlock")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
