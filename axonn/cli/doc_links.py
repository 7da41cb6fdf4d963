"""Which page of `docs/` explains a command or an error; how errors of the suite reach the person at the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.markup import escape

from axonn.cli.console import make_console
from axonn.errors import AxonnError, CheckpointError, MachineError, RunFailed
from axonn.training.places import ROOT, from_here
from axonn.training.supervision.interruption import SAID, Interrupted, exit_status, raised, to_nowhere

ERRORS = "docs/errors.md"
_OF_ERRORS: dict[type[AxonnError], str] = {
    MachineError: "docs/own-machine.md",
    CheckpointError: "docs/resume.md",
    RunFailed: ERRORS,
}
"""Whatever the command."""
C = TypeVar("C", bound=Callable[..., object])


def documented(page: str) -> Callable[[C], C]:
    """Decorates a command: its help and its errors name this page."""

    def mark(command: C) -> C:
        command.page = page  # type: ignore[attr-defined]
        return command

    return mark


def page_of(command: object) -> str:
    """The page that a command is documented with."""
    return str(getattr(command, "page", ERRORS))


@contextmanager
def explained(page: str = ERRORS) -> Iterator[None]:
    """Errors of the suite, and of files and disks, become one message with its page and exit status 2; an interruption,
    by whatever signal, 128 + its number."""
    try:
        with raised():
            yield
    except AxonnError as error:
        _tell(str(error), next((found for kind, found in _OF_ERRORS.items() if isinstance(error, kind)), page))
    except BrokenPipeError:
        # Of standard output or error: other pipes are handled where they are used.
        for handle in (1, 2):
            to_nowhere(handle)
        sys.exit(exit_status(Interrupted(signal.SIGPIPE)))
    except OSError as error:
        # A full disk, a folder of somebody else's: nothing that a traceback explains better.
        what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        _tell(what, ERRORS)
    except KeyboardInterrupt as interruption:
        said = str(interruption) or SAID[signal.SIGINT]
        make_console(stderr=True).print(f"{said}; what is done is kept, run again to go on", soft_wrap=True)
        sys.exit(exit_status(interruption))


def _tell(message: str, page: str) -> None:
    console = make_console(stderr=True)
    console.print(f"[red]error:[/red] {escape(message)}", soft_wrap=True)
    console.print(f"see {from_here(ROOT / page) if (ROOT / page).is_file() else page}", soft_wrap=True)
    sys.exit(2)
