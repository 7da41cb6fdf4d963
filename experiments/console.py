"""What the commands of `axonn` share: how they print, show progress, and refuse to be launched several times."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.interruption import Interrupted, to_nowhere


class CommandConsole(Console):
    """A console that ends its command when nobody reads its output any more (`axonn ... | head -1`)."""

    def on_broken_pipe(self) -> None:
        """Raise `Interrupted`, once: what is printed afterwards goes nowhere."""
        self.quiet = True
        to_nowhere(sys.stdout.fileno())
        raise Interrupted(signal.SIGPIPE)


console = CommandConsole()
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


def warn(message: str) -> None:
    """Print a warning."""
    console.print(f"[yellow]warning: {escape(message)}[/yellow]", soft_wrap=True)


def launched_once() -> None:
    """Raise `LaunchError` when a launcher started this command several times: it starts the ranks itself."""
    from axonn.errors import LaunchError
    from axonn.runtime import launched_as

    # A batch script under Slurm has the variables of its whole job, and is run once all the same.
    copies = launched_as({k: v for k, v in os.environ.items() if not k.startswith("SLURM_")})[1]
    if copies > 1:
        raise LaunchError(
            f"the command was launched {copies} times, but starts the ranks of its grids itself; "
            "run it once, without mpiexec"
        )
