"""Shared parts of the commands: printing, progress, defaults, and the refusal to be launched several times."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from axonn.training.supervision.interruption import Interrupted, to_nowhere

FORCING = ("FORCE_COLOR", "CLICOLOR_FORCE", "PY_COLORS", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
"""Environment variables that make programs colour their output even where it is not a terminal."""


class CommandConsole(Console):
    """A console that ends its command once nobody reads its output any more (`axonn ... | head -1`)."""

    def on_broken_pipe(self) -> None:
        """Raise `Interrupted`, once; later output is discarded."""
        self.quiet = True
        to_nowhere((sys.stderr if self.stderr else sys.stdout).fileno())
        raise Interrupted(signal.SIGPIPE)


def make_console(*, stderr: bool = False, width: int | None = None) -> Console:
    """Return a console that writes escape codes and moving lines only to a real terminal, whatever `FORCING` says: in a
    file or a log they are unreadable. `width`: columns of output that does not go to a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    if stream.isatty():
        return CommandConsole(stderr=stderr)
    return CommandConsole(stderr=stderr, width=width, force_terminal=False, force_interactive=False)


def unforced() -> None:
    """Unset `FORCING` where standard output is not a terminal, for libraries that print by themselves."""
    if not sys.stdout.isatty():
        for name in FORCING:
            os.environ.pop(name, None)


console = make_console()
ExperimentFile = Annotated[Path, typer.Argument(help="Experiment file, for instance experiments/fig6.yaml")]


def command_line() -> str:
    """Return the command as the user typed it."""
    return shlex.join(["axonn", *sys.argv[1:]])


def progress_bar(*, transient: bool = False) -> Progress:
    """Return a progress bar with description, count and time; a `transient` one disappears at its end."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=transient,
    )


def say_defaults(taken: Iterable[str]) -> None:
    """Print, in one line, the defaults that an answer depends on."""
    defaults = ", ".join(taken)
    if defaults:
        console.print(f"[dim]by default: {escape(defaults)}[/dim]", soft_wrap=True, highlight=False)


def options_left(context: typer.Context) -> set[str]:
    """Return the names of the command's parameters that were not given."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "DEFAULT"}


def warn(message: str) -> None:
    """Print a warning."""
    console.print(f"[yellow]warning: {escape(message)}[/yellow]", soft_wrap=True)


def launched_once() -> None:
    """Raise `LaunchError` when a launcher started this command several times; the command starts its ranks itself."""
    from axonn.distributed.runtime import launched_as
    from axonn.errors import LaunchError

    # A batch script under Slurm sees the variables of its whole job, yet runs once.
    copies = launched_as({k: v for k, v in os.environ.items() if not k.startswith("SLURM_")})[1]
    if copies > 1:
        raise LaunchError(
            f"the command was launched {copies} times, but starts the ranks of its grids itself; "
            "run it once, without mpiexec"
        )
