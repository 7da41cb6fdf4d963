"""Signals that end a command: raised as `Interrupted`, or noted while some work must first come to its end.

A signal from a scheduler, a shell or a terminal is an interruption like Control-C: the handlers of `KeyboardInterrupt`
keep what is done, and the command ends with 128 + the number of the signal. A signal that was ignored when the command
started stays ignored (`nohup`).
"""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], None]
ENDING = (
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
"""Signals that end a command besides SIGINT, whose `KeyboardInterrupt` is Python's own: cancelled by a scheduler or an
operator, terminal closed, Control-\\, and the warnings that schedulers send before a limit."""
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""Signals of `ENDING` that come some time before the end."""
SIGNAL_MESSAGES: Mapping[int, str] = {
    signal.SIGINT: "interrupted from the keyboard",
    signal.SIGTERM: "told to end (SIGTERM)",
    signal.SIGHUP: "the terminal was closed (SIGHUP)",
    signal.SIGQUIT: "told to end at once (SIGQUIT)",
    signal.SIGPIPE: "nobody reads the output any more (SIGPIPE)",
    signal.SIGUSR1: "warned of a limit (SIGUSR1)",
    signal.SIGUSR2: "warned of a limit (SIGUSR2)",
    signal.SIGXCPU: "the limit of processor time is reached (SIGXCPU)",
}


class Interrupted(KeyboardInterrupt):
    """Request to end the command, by the signal `number`."""

    def __init__(self, number: int) -> None:
        super().__init__(_message_of(number))
        self.number = number


def _message_of(number: int) -> str:
    return SIGNAL_MESSAGES.get(number, f"signal {number}")


def number_of(interruption: KeyboardInterrupt) -> int:
    """Return the number of the signal behind an interruption."""
    return interruption.number if isinstance(interruption, Interrupted) else signal.SIGINT


def exit_status(interruption: KeyboardInterrupt) -> int:
    """Return the exit status by which shells report that a signal ended a command."""
    return 128 + number_of(interruption)


@contextmanager
def raised() -> Iterator[None]:
    """Raise `Interrupted` inside of the block for every signal of `ENDING` that would otherwise end this process."""

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            quiet_if_closed()
        raise Interrupted(number)

    with _handled({number: handle for number in ENDING if signal.getsignal(number) is signal.SIG_DFL}):
        yield


class PendingSignals:
    """Signals that arrived while they were noted instead of raised.

    `first`: the one that counts; `since`: its time by `time.monotonic`; `another`: whether a later one asked for more
    haste. Shells repeat the SIGHUP of a terminal, which does not count, and after a warning the end itself is the first
    that counts.
    """

    def __init__(self) -> None:
        self.first: int | None = None
        self.since = 0.0
        self.another = False

    def note(self, number: int) -> None:
        """Note a signal."""
        if self.first is None or (self.first in WARNINGS and number not in WARNINGS):
            self.first, self.since = number, time.monotonic()
        elif number == signal.SIGQUIT or (number != signal.SIGHUP and number not in WARNINGS):
            self.another = True

    def settle(self) -> None:
        """Forget the signals: the work came to its end in spite of them."""
        self.first = None

    @property
    def message(self) -> str:
        """Text of the first signal; empty if none arrived."""
        return "" if self.first is None else _message_of(self.first)


@contextmanager
def noted() -> Iterator[PendingSignals]:
    """Note signals inside of the block instead of raising them, and raise the first one at its end.

    Outside of the main thread, the only one that receives signals, none is ever noted.
    """
    pending = PendingSignals()

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            quiet_if_closed()
        pending.note(number)

    ignored = (signal.SIG_IGN, None)
    with _handled({n: handle for n in (signal.SIGINT, *ENDING) if signal.getsignal(n) not in ignored}):
        yield pending
    if pending.first is not None:
        raise Interrupted(pending.first)


@contextmanager
def _handled(handlers: Mapping[int, Handler]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def quiet_if_closed() -> None:
    """Discard standard output and error if they were a terminal that has been closed."""
    for handle in (1, 2):
        try:
            if stat.S_ISCHR(os.fstat(handle).st_mode) and not os.isatty(handle):
                to_nowhere(handle)
        except OSError:
            continue  # It was closed before.


def to_nowhere(handle: int) -> None:
    """Discard what is written to an open file from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, handle)
    os.close(nowhere)
