"""Links from commands and errors to the page of `docs/` that explains them, and the printing of errors."""

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
from axonn.training.supervision.interruption import SIGNAL_MESSAGES, Interrupted, exit_status, raised, to_nowhere

ERRORS = "docs/errors.md"
_PAGES_OF_ERRORS: dict[type[AxonnError], str] = {
    MachineError: "docs/own-machine.md",
    CheckpointError: "docs/resume.md",
    RunFailed: ERRORS,
}
"""Pages of kinds of errors that are explained apart from the command in which they occur."""
C = TypeVar("C", bound=Callable[..., object])


def documented(page: str) -> Callable[[C], C]:
    """Decorate a command so that its help and its errors name this page."""

    def mark(command: C) -> C:
        command.page = page  # type: ignore[attr-defined]
        return command

    return mark


def page_of(command: object) -> str:
    """Return the page that documents a command."""
    return str(getattr(command, "page", ERRORS))


@contextmanager
def explained(page: str = ERRORS) -> Iterator[None]:
    """Turn errors inside of the block into a message and an exit status.

    Errors of the suite, and of files and disks, become one message with its page and status 2; an interruption, by any
    signal, becomes 128 + the number of the signal.
    """
    try:
        with raised():
            yield
    except AxonnError as error:
        own_pages = (error_page for kind, error_page in _PAGES_OF_ERRORS.items() if isinstance(error, kind))
        _exit_with_error(str(error), next(own_pages, page))
    except BrokenPipeError:
        # A pipe of standard output or error: others are handled where they are used.
        for handle in (1, 2):
            to_nowhere(handle)
        sys.exit(exit_status(Interrupted(signal.SIGPIPE)))
    except OSError as error:
        # A full disk, or a folder that belongs to another user: a traceback would explain nothing more.
        message = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        _exit_with_error(message, ERRORS)
    except KeyboardInterrupt as interruption:
        message = str(interruption) or SIGNAL_MESSAGES[signal.SIGINT]
        make_console(stderr=True).print(f"{message}; what is done is kept, run again to go on", soft_wrap=True)
        sys.exit(exit_status(interruption))


def _exit_with_error(message: str, page: str) -> None:
    console = make_console(stderr=True)
    console.print(f"[red]error:[/red] {escape(message)}", soft_wrap=True)
    console.print(f"see {from_here(ROOT / page) if (ROOT / page).is_file() else page}", soft_wrap=True)
    sys.exit(2)
