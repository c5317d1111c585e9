"""InvarLock: may this edited model ship?

Measure a model into a piece of evidence; compare two pieces of evidence into a verdict.

>>> import invarlock
>>> result = invarlock.certify(baseline="./original", subject="./edited")  # doctest: +SKIP
>>> result.status  # doctest: +SKIP
'PASS'
"""

from __future__ import annotations

__all__ = ["__version__", "certify"]
__version__: str


def __getattr__(name: str) -> object:
    """Fetch what takes time to import when it is asked for: the command line must answer at once. See `__init__.pyi`."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("invarlock")
        except PackageNotFoundError:  # a source tree that was never installed
            return "0+unknown"
    if name == "certify":
        from invarlock.assurance.certification import certify

        return certify
    raise AttributeError(f"module 'invarlock' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
