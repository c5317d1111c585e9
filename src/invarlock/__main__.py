"""`python -m invarlock`."""

from __future__ import annotations

from invarlock.cli.app import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
