"""`invarlock plugins`: what is registered, whether it would work, and how to install what is missing."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from invarlock.cli.console import emit_json, is_terminal, note, say
from invarlock.cli.options import JsonOption, plain_typer
from invarlock.core import inventory, settings
from invarlock.core.exceptions import NetworkError
from invarlock.core.inventory import PluginStatus
from invarlock.core.network import network_allowed
from invarlock.plugins.packages import install_command, uninstall_command

__all__ = ["app"]

Category = Literal["adapters", "guards", "edits", "datasets", "plugins", "all"]

VerboseOption = Annotated[bool, Option("--verbose", "-v", help="Show module, entry point and distribution.")]
ExplainOption = Annotated[str | None, Option(metavar="NAME", help="Show everything about one name.")]
_STATES = "ready, missing, broken, shadowed, unsupported, core or plugin"
OnlyOption = Annotated[str | None, Option("--only", metavar="STATE|ORIGIN", help=f"Keep one: {_STATES}.")]
UnsupportedOption = Annotated[bool, Option("--show-unsupported", help="List also what this platform does not support.")]
NameArgument = Annotated[str, Argument(metavar="NAME", help="An extra, a registered name, or a distribution.")]
ApplyOption = Annotated[bool, Option("--apply", help="Run the command; without it, it is only printed.")]

_HEADER = "name | origin | kind | backend | version | status"

_HELP = "List adapters, guards, edits and data providers, and install what they need."
#: categories that are commands too; the bare `plugins` lists everything
_COMMANDS: tuple[Category, ...] = ("adapters", "guards", "edits")

app = plain_typer()


@app.command("list")
def list_(
    category: Annotated[Category, Argument(help="What to list.")] = "all",
    json: JsonOption = False,
    verbose: VerboseOption = False,
    explain: ExplainOption = None,
    only: OnlyOption = None,
    show_unsupported: UnsupportedOption = False,
) -> int:
    """List one category, or all."""
    if explain is not None:
        found = inventory.explain(explain, category)
    else:
        found = inventory.select(inventory.inventory(category), only, show_unsupported=show_unsupported)
    if json:
        emit_json(
            format_version="plugins-v1",
            component="plugins",
            category=category,
            discovery=not settings.flag("INVARLOCK_DISABLE_PLUGIN_DISCOVERY"),
            items=[item.as_dict() | ({"parameters": item.parameters} if explain else {}) for item in found],
            ts=time.time(),
        )
    elif explain is not None:
        for item in found:
            _explain(item)
    else:
        _table(found, verbose)
    return 1 if explain is not None and any(item.state in ("broken", "shadowed") for item in found) else 0


def _listing(
    context: typer.Context,
    json: JsonOption = False,
    verbose: VerboseOption = False,
    explain: ExplainOption = None,
    only: OnlyOption = None,
    show_unsupported: UnsupportedOption = False,
) -> int:
    if context.invoked_subcommand is not None:
        return 0
    category: Category = next((name for name in _COMMANDS if name == context.info_name), "all")
    return list_(category, json, verbose, explain, only, show_unsupported)


app.callback(invoke_without_command=True, help=_HELP)(_listing)
for _category in _COMMANDS:
    app.command(_category, help=f"List {_category}.")(_listing)


@app.command()
def install(name: NameArgument, apply: ApplyOption = False) -> int:
    """Install the extra that a name needs (a dry run unless --apply)."""
    return _pip(install_command(name), apply, needs_network=True)


@app.command()
def uninstall(name: NameArgument, apply: ApplyOption = False) -> int:
    """Uninstall a plugin, or what an extra alone brought (a dry run unless --apply)."""
    return _pip(uninstall_command(name), apply, needs_network=False)


def _table(found: Sequence[PluginStatus], verbose: bool) -> None:
    if is_terminal(sys.stdout):
        note(_HEADER)
    for item in found:
        say(item.line())
        if verbose:
            entry = item.entry
            say(f"    {entry.target}  [{entry.group}]  {entry.distribution} {entry.version}")
            if item.hint:
                say(f"    to do: {item.hint}")
    if not found:
        note("nothing to list")


def _explain(item: PluginStatus) -> None:
    entry = item.entry
    module, _, attribute = entry.target.partition(":")
    package, version = item.backend or ("none", None)
    rows = {
        "name": entry.name,
        "kind": entry.kind,
        "origin": entry.origin,
        "module": module,
        "class": attribute,
        "entry point": f"{entry.group}: {entry.name} = {entry.target}",
        "distribution": entry.distribution,
        "version": entry.version,
        "backend": f"{package} {version or ''}".rstrip(),
        "constructor": ", ".join(item.parameters) or ("no parameters" if item.state == "ready" else "not imported"),
        "status": item.summary(),
    }
    if item.hint:
        rows["to do"] = item.hint
    for label, value in rows.items():
        say(f"{label + ':':<14}{value}")


def _pip(command: list[str], apply: bool, *, needs_network: bool) -> int:
    shown = " ".join(f'"{part}"' if "[" in part else part for part in command)
    if not apply or settings.flag("INVARLOCK_PLUGINS_DRY_RUN"):
        say(f"dry run: {shown}")
        return 0
    if needs_network and not network_allowed():
        raise NetworkError(f"the network is off; set INVARLOCK_ALLOW_NETWORK=1 to run: {shown}")
    note(shown)
    return subprocess.run([sys.executable, "-m", *command], check=False).returncode
