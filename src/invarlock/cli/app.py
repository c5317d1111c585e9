"""The `invarlock` command: a table of commands, each imported when it is used."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

import invarlock
from invarlock.cli.console import mend_streams, quiet_pipe, say, setup_logging
from invarlock.cli.errors import INTERRUPTED, report_error
from invarlock.cli.options import plain_typer, remembered_profile
from invarlock.core import settings
from invarlock.core.network import enforce_network_policy
from invarlock.core.ranks import under_torchrun
from invarlock.core.registry import nearest

if TYPE_CHECKING:
    from typer._click import Context, HelpFormatter  # typer's own, which is not public

__all__ = ["COMMANDS", "Command", "app", "main"]


class Command(NamedTuple):
    """Where a command lives (`module:attribute`, a function or a `typer.Typer`) and its line in `invarlock --help`."""

    target: str
    help: str


COMMANDS: dict[str, Command] = {
    "certify": Command("invarlock.cli.certify:certify", "Certify an edited checkpoint against its baseline."),
    "init": Command("invarlock.cli.init:init", "Write a commented preset to start from."),
    "run": Command("invarlock.cli.run:run", "Apply an edit under guards, as a configuration says."),
    "verify": Command("invarlock.cli.verify:verify", "Re-check certificates offline, without the models."),
    "report": Command("invarlock.cli.report:app", "Show certificates and runs in other forms."),
    "diff": Command("invarlock.cli.diff:diff", "Say what was done to a checkpoint, tensor by tensor."),
    "bisect": Command("invarlock.cli.bisect:bisect", "Find the tensors that carry a subject's damage, and mend it."),
    "sensitivity": Command("invarlock.cli.bisect:sensitivity", "Rank the tensors that an edit would hurt most."),
    "demo": Command("invarlock.cli.demo:demo", "Certify a good and a bad edit of a small model, offline."),
    "plugins": Command("invarlock.cli.plugins:app", "List adapters, guards, edits and data providers."),
    "calibrate": Command("invarlock.cli.calibrate:app", "Derive guards' thresholds from harmless edits of a model."),
    "baseline": Command("invarlock.cli.baseline:app", "Measure a baseline once, into one file that stands for it."),
    "cache": Command("invarlock.cli.cache:app", "List or remove the baselines that were measured before."),
    "doctor": Command("invarlock.cli.doctor:doctor", "Check the environment, a configuration and stored reports."),
    "version": Command("invarlock.cli.version:version", "Show the version and the certificate schema."),
}


class _LazyGroup(TyperGroup):
    """Lists commands from `COMMANDS` without importing them, and is the boundary where errors become exit codes."""

    json = False  # whether the arguments ask for it: errors are objects on stdout then, also those in the arguments
    told = False  # whether the error that ended the command was reported

    def list_commands(self, ctx: Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Context, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        if cmd_name not in self.commands:
            module, _, attribute = COMMANDS[cmd_name].target.partition(":")
            target = getattr(importlib.import_module(module), attribute)
            if not isinstance(target, typer.Typer):
                function, target = target, plain_typer()
                target.command(cmd_name)(function)
            self.commands[cmd_name] = typer.main.get_command(target)
        return self.commands[cmd_name]

    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.help) for name, command in COMMANDS.items()])

    def resolve_command(self, ctx: Context, args: list[str]) -> Any:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no such command {args[0]!r}{nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Context) -> Any:
        """Prepare the process and run the command; an exception ends as one line on stderr and `typer.Exit`."""
        try:
            _start()
            value = super().invoke(ctx)
            with quiet_pipe():
                sys.stdout.flush()
        except (typer.Exit, typer.Abort, SystemExit):
            raise
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the outermost boundary: reported, never lost
            self.told = True
            raise typer.Exit(report_error(error, remembered_profile(ctx.meta), json=self.json)) from None
        return value

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: object,
    ) -> Any:
        """As in typer, but errors in the arguments are one line too, and a command may return its exit code."""
        self.json = "--json" in (sys.argv[1:] if args is None else args)
        try:
            value = super().main(args, prog_name or "invarlock", complete_var, False, windows_expand_args, **extra)
            code = value if isinstance(value, int) else 0
            if code == INTERRUPTED and not self.told:  # before the command had begun
                code = report_error(KeyboardInterrupt(), json=self.json)
        except typer.Abort:
            code = report_error(KeyboardInterrupt(), json=self.json)
        except Exception as error:  # noqa: BLE001 - see `invoke`; here it is the parsing of the first arguments
            code = _show_help(error) or report_error(error, json=self.json)
        if standalone_mode:
            sys.exit(code)
        return code


def _show_help(error: Exception) -> int:
    """Print the help that a bare command asks for and return its exit code; 0 where `error` is something else."""
    if type(error).__name__ != "NoArgsIsHelpError":
        return 0
    say(error.format_message())  # type: ignore[attr-defined]  # typer's own click is not public
    return 2


def _start() -> None:
    """What every command needs first: the network closed, the log on stderr, torch refused where that was asked for."""
    setup_logging()
    enforce_network_policy()
    if settings.flag("INVARLOCK_LIGHT_IMPORT"):
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # None makes an import raise


app = plain_typer(cls=_LazyGroup, no_args_is_help=True, completion=True)


def _show_version(asked: bool) -> None:
    if asked:
        say(f"invarlock {invarlock.__version__}")
        raise typer.Exit


@app.callback()
def _invarlock(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """May this edited model ship? Measure it against its baseline and get a verdict.

    The network is off unless INVARLOCK_ALLOW_NETWORK=1.

    Exit codes: 0 PASS, 1 FAIL, 2 wrong usage or configuration, 3 the sides cannot be compared, 4 INCONCLUSIVE,
    5 anything else that could not be read or run.
    """


_RANK_GONE = (
    "ERROR [RANK-LOST] told to end while other ranks measure: one of them is gone; start again with the same --out"
)


class _Interruption:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt, again where it was lost.

    A callback of C code, a `__del__` or a broad `except` within a library swallows an exception; while libraries are
    imported that is common. So an alarm looks every half second whether one is on its way up, and raises it again if not.
    """

    def __init__(self) -> None:
        self.why: tuple[str, ...] = ()

    def raise_it(self, number: int, frame: FrameType | None) -> None:
        ended = _RANK_GONE if under_torchrun() else "terminated; no certificate was written"
        self.why = (ended,) if number == signal.SIGTERM else ()
        signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
        raise KeyboardInterrupt(*self.why)

    def raise_again(self, number: int, frame: FrameType | None) -> None:
        error = sys.exception()
        while error is not None and not isinstance(error, KeyboardInterrupt):
            error = error.__context__
        if error is None:
            raise KeyboardInterrupt(*self.why)

    def __enter__(self) -> None:
        signal.signal(signal.SIGALRM, self.raise_again)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.raise_it)

    def __exit__(self, *error: object) -> None:
        """From here on only the interpreter's own end is left: nothing is raised in it any more."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)


def main() -> None:
    """Run the command line and exit the process."""
    mend_streams()
    with _Interruption():
        code = app(standalone_mode=False)
    sys.exit(code)
