"""The command line: the only place that turns errors into messages and exit codes.

Exit codes: 0 everything done; 1 cases failed, each named, the others are written; 2 the run as a whole could not be
done or go on (arguments, input, weights, settings, disk); 3 a fault of the program; 4 the GPU no longer works for this
process; 130 and 143 stopped from outside. After 4, 130 and 143 run again to go on.
"""

import io
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from cwdm import __version__
from cwdm.errors import CwdmError, DeviceLostError
from cwdm.progress import make_logs_printable, print_error, print_line, print_notice
from cwdm.signals import handled

PANELS = {
    "Synthesise": ("infer", "scan", "translate", "sample", "demo"),
    "Look and score": ("report", "evaluate", "evaluate-samples"),
    "Train": ("train",),
    "Data": ("drop", "complete", "phantom", "prepare"),
    "Weights": ("weights", "self-test"),
}
"""Commands in the order of the help. Each is the function of its name in a module of its name, a family its `app`."""

PANEL = {name: panel for panel, names in PANELS.items() for name in names}

OLD_NAMES = {"cases": "num-cases", "count": "num-samples", "pairs": "num-pairs", "workers": "num-workers"}
"""Spellings of options that are understood and no longer shown."""


class Commands(TyperGroup):
    """Commands whose modules are imported when they are called, or listed."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(PANEL)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.commands and cmd_name in PANEL:
            self.commands[cmd_name] = _load(cmd_name)
        return self.commands.get(cmd_name)


def _load(name: str) -> Any:
    module = import_module(f"cwdm.cli.{name.replace('-', '_')}")
    family = getattr(module, "app", None)
    if family is None:
        family = typer.Typer(add_completion=False)
        family.command(cls=Command)(getattr(module, name.replace("-", "_")))
    command: Any = get_command(family)
    command.name, command.rich_help_panel = name, PANEL[name]
    return command


class Command(TyperCommand):
    """A command whose usage says nothing of what is hidden."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        shown = [param for param in self.get_params(ctx) if not getattr(param, "hidden", False)]
        return [self.options_metavar or "", *(piece for param in shown for piece in param.get_usage_pieces(ctx))]


def spelling(name: str) -> str:
    """The name of an option without its hyphens, as it is known: underscores may stand for hyphens inside."""
    name = name.replace("_", "-")
    return OLD_NAMES.get(name, name)


app = typer.Typer(
    name="cwdm",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": spelling},
    help="3D wavelet diffusion for medical images: synthesise the missing one of four MR modalities.",
)


def main() -> None:
    """Entry point of the `cwdm` command."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass  # else the first file takes the place of a stream that is closed (2>&-)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files can be any bytes
    make_logs_printable()
    try:
        with handled(_stopped):
            app()
    except DeviceLostError as error:
        _fail(4, f"{error}; run the same command again to go on, or with --devices, which replaces the process")
    except CwdmError as error:
        _fail(2, *error.args)
    except Exception:
        print_notice(*traceback.format_exc().splitlines())
        _fail(3, "a fault of the program, not of your data; please report it with the lines above")


def said(command: str, words: Sequence[str]) -> dict[str, Any]:
    """What a command line tells a command, by the names of its function's arguments; what is wrong in it is None."""
    root: Any = get_command(app)
    context = root.make_context("cwdm", [command, *words], resilient_parsing=True)
    called = root.get_command(context, command)
    told: dict[str, Any] = called.make_context(command, list(words), context, resilient_parsing=True).params
    return told


def _stopped(number: int, _: object) -> NoReturn:
    _fail(128 + number, "stopped from outside; what is finished is kept, run the same command again to go on")


def _fail(code: int, *lines: str) -> NoReturn:
    print_error(*lines)
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        print_line(f"cwdm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
