"""The steps, written once: certify, run, execute, calibrate, doctor; run folders and snapshots."""

from __future__ import annotations

__all__: list[str] = []
