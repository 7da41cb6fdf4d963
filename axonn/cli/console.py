"""What the commands of `axonn` share: how they print, show progress, and refuse to be launched several times."""

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
"""Variables by which programs are told to colour what they print, whatever it goes to."""


class CommandConsole(Console):
    """A console that ends its command when nobody reads its output any more (`axonn ... | head -1`)."""

    def on_broken_pipe(self) -> None:
        """Raise `Interrupted`, once: what is printed afterwards goes nowhere."""
        self.quiet = True
        to_nowhere((sys.stderr if self.stderr else sys.stdout).fileno())
        raise Interrupted(signal.SIGPIPE)


def make_console(*, stderr: bool = False, width: int | None = None) -> Console:
    """Return a console that writes escape codes and lines that move on a real terminal alone, whatever `FORCING` says:
    in a file or a log they are rubbish. `width`: of what goes elsewhere."""
    stream = sys.stderr if stderr else sys.stdout
    if stream.isatty():
        return CommandConsole(stderr=stderr)
    return CommandConsole(stderr=stderr, width=width, force_terminal=False, force_interactive=False)


def unforced() -> None:
    """Forget `FORCING` where standard output is no terminal, for libraries that print by themselves."""
    if not sys.stdout.isatty():
        for name in FORCING:
            os.environ.pop(name, None)


console = make_console()
ExperimentFile = Annotated[Path, typer.Argument(help="Experiment file, for instance experiments/fig6.yaml")]


def command_line() -> str:
    """What the user typed."""
    return shlex.join(["axonn", *sys.argv[1:]])


def progress_bar(*, transient: bool = False) -> Progress:
    """Description, bar, count and time; `transient`: it goes away at its end."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=transient,
    )


def say_defaults(taken: Iterable[str]) -> None:
    """Print, in one line, what an answer hangs on that nobody said."""
    said = ", ".join(taken)
    if said:
        console.print(f"[dim]by default: {escape(said)}[/dim]", soft_wrap=True, highlight=False)


def options_left(context: typer.Context) -> set[str]:
    """Names of the parameters of a command that were not given."""
    source = context.get_parameter_source
    return {name for name in context.params if (found := source(name)) is not None and found.name == "DEFAULT"}


def warn(message: str) -> None:
    """Print a warning."""
    console.print(f"[yellow]warning: {escape(message)}[/yellow]", soft_wrap=True)


def launched_once() -> None:
    """Raise `LaunchError` when a launcher started this command several times: it starts the ranks itself."""
    from axonn.distributed.runtime import launched_as
    from axonn.errors import LaunchError

    # A batch script under Slurm has the variables of its whole job, and is run once all the same.
    copies = launched_as({k: v for k, v in os.environ.items() if not k.startswith("SLURM_")})[1]
    if copies > 1:
        raise LaunchError(
            f"the command was launched {copies} times, but starts the ranks of its grids itself; "
            "run it once, without mpiexec"
        )
