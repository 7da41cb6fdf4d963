"""The `axonn` command."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib.metadata import entry_points

import typer

from axonn.cli.console import unforced
from axonn.cli.doc_links import explained, page_of
from axonn.cli.doctor_command import doctor
from axonn.cli.train_command import export, train

_PAGES = "A page for each thing to do, with commands to copy: docs/index.md"
app = typer.Typer(
    help="AxoNN reproduction suite: run, predict and compare asynchronous hybrid-parallel training.",
    epilog=_PAGES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def commands() -> dict[str, Callable[..., None]]:
    """Return all commands by name: those of the engine, and those that the packages above it register."""
    engine_commands = {command.__name__: command for command in (train, export, doctor)}
    registered = sorted(entry_points(group="axonn.commands"), key=lambda entry: entry.name)
    return engine_commands | {entry.name: entry.load() for entry in registered}


def _explained(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap `command` so that errors and interruptions are explained: typer would end every interruption with 130."""

    @wraps(command)
    def run(*arguments: object, **options: object) -> None:
        with explained(page_of(command)):
            command(*arguments, **options)

    return run


for name, command in commands().items():
    app.command(name, epilog=f"More in {page_of(command)}")(_explained(command))


def main() -> None:
    """Run the command: an error of the suite becomes one message with its page and exit status 2, an interruption
    128 + the number of its signal."""
    unforced()
    with explained():
        app()


if __name__ == "__main__":
    main()
