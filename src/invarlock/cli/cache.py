"""`invarlock cache`: the baselines that were measured before."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from typer import Option

from invarlock.cli.console import emit_json, say
from invarlock.cli.options import JsonOption, plain_typer
from invarlock.core.files import cache_folder
from invarlock.flow.cache import clear, entries
from invarlock.flow.run_folder import clear_runs

__all__ = ["app"]

app = plain_typer(no_args_is_help=True)


@app.callback()
def _cache() -> None:
    """List or remove the baselines that were measured before. INVARLOCK_CACHE names the folder; `off` switches it off."""


@app.command("list")
def list_entries(json: JsonOption = False) -> int:
    """Show what is in the cache, the entry used last first."""
    found, folder = list(entries()), cache_folder()
    if json:
        rows = [entry._asdict() for entry in found]
        emit_json(
            format_version="cache-v1", folder=folder and str(folder), entries=rows, removed=0, bytes=0, exit_code=0
        )
        return 0
    say(f"{folder or 'the cache is switched off (INVARLOCK_CACHE)'}: {len(found)} entries")
    for entry in found:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        what = f"{entry.model} on {entry.text}" if entry.model else "damaged; it is measured again where it is needed"
        say(f"  {entry.key[:16]}  {entry.size:>12,} bytes  {used}  {what}")
    return 0


@app.command("clear")
def clear_entries(
    runs: Annotated[Path | None, Option(help="Remove the stored runs below this folder instead.")] = None,
    json: JsonOption = False,
) -> int:
    """Remove all entries, or the stored runs below a folder. Certificates stay."""
    folder = cache_folder() if runs is None else runs
    count, size = clear() if runs is None else clear_runs(runs)
    if json:
        emit_json(
            format_version="cache-v1", folder=folder and str(folder), entries=[], removed=count, bytes=size, exit_code=0
        )
        return 0
    what, where = ("entries", folder or "no folder: the cache is switched off") if runs is None else ("runs", runs)
    say(f"removed {count} {what} ({size:,} bytes) from {where}")
    return 0
