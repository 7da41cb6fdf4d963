"""Files of the run folder by which ranks and their supervisor know of each other; needs the standard library alone.

A rank writes `rank-K.json` (its state), `rank-K.alive` (its heartbeat, every second: how much it has finished, and how
long ago the last of that was), and rank 0 `batches.jsonl`, one line per finished batch. On the signal `DUMP` a rank
writes its stack into `rank-K.stack`. Ranks of every framework do so, also where this suite is not installed: those load
this file by its path.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HEARTBEAT_S = 1.0
_LOOK_S = 5.0
"""Longest time between two looks at the heartbeats that counts against the ranks; more is the observer's own delay."""
DUMP = signal.SIGUSR1
SUPERVISOR = "AXONN_SUPERVISOR"
"""Environment variable with the process id of the supervisor, on whose machine the ranks run."""
SESSION = "AXONN_SESSION"
"""Environment variable with the temporary folders of the run, which ranks remove when no other process is left to."""
SPEC = "spec.json"
"""The supervisor's request: framework, configuration and how to run it."""
STOP = "stop"
"""A file that makes stoppable ranks save their state and end."""
NEWEST = "newest"
"""Value of a spec's checkpoint: go on from the newest one of the run folder, if there is one."""
STOPPED = 75
"""Exit status of ranks that were stopped: the job is not finished (EX_TEMPFAIL of sysexits.h)."""
TRAIN, END = b"1", b"0"
"""Messages of a turn: train a batch, or come to the end."""


_STATE_BYTES = 4096
"""Bytes that a rank reserves for its state, so that it can report why it ends when the disk is full."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Progress:
    """Count of the things that a rank has finished: tasks, messages, collectives, files."""

    def __init__(self) -> None:
        self.count = 0
        self.at = time.monotonic()
        self.watched: tuple[Heartbeats, float] | None = None
        """Heartbeats that this rank watches, and the limit of a standstill, where there is no supervisor."""

    def note(self) -> None:
        """Count one more finished thing."""
        self.count += 1
        self.at = time.monotonic()


def set_state(folder: Path, rank: int, state: str, **details: Any) -> None:
    """Write `rank-K.json`: atomically, or over the old content if the disk is full."""
    text = json.dumps({"state": state, "pid": os.getpid(), "time": time.time(), **details})
    path, temporary = folder / f"rank-{rank}.json", folder / f".rank-{rank}.{os.getpid()}"
    try:
        temporary.write_text(text.ljust(_STATE_BYTES))
        temporary.replace(path)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        temporary.unlink(missing_ok=True)
        with open(path, "r+") as file:
            file.write(text[:_STATE_BYTES].ljust(_STATE_BYTES))


def run_with_heartbeat(
    folder: Path, rank: int, train: Callable[[], int | None], *, progress: Progress | None = None
) -> int:
    """Run `train` with a heartbeat, and write why the rank ends if it fails; return the exit status from `train`, 0 for
    None. `progress`: the things that `train` has finished, where it counts them."""
    set_state(folder, rank, "started")
    stack = open(folder / f"rank-{rank}.stack", "w")  # noqa: SIM115  (open as long as the process lives)
    faulthandler.register(DUMP, file=stack, all_threads=False)
    threading.Thread(target=_heartbeat, args=(folder, rank, progress), daemon=True).start()
    try:
        return train() or 0
    except BaseException as error:
        details = {"cause": _cause(error), "detail": f"{type(error).__name__}: {error}"}
        # The ranks where the failure began, if the error knows them.
        blamed = {"ranks": error.ranks} if getattr(error, "ranks", None) else {}  # type: ignore[attr-defined]
        set_state(folder, rank, "failed", **details, **blamed)
        traceback.print_exc()
        sys.stderr.flush()
        # Clean-up could wait forever for other ranks; the launcher ends those.
        os._exit(1)


def runs(process: int) -> bool:
    """Return whether a process with this id exists."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _heartbeat(folder: Path, rank: int, progress: Progress | None) -> None:
    path = folder / f"rank-{rank}.alive"
    launcher = os.getppid()
    supervisor = int(os.environ.get(SUPERVISOR, launcher))
    while True:
        if os.getppid() != launcher or not runs(supervisor):
            # No process is left that would end this rank and clean up.
            for left in filter(None, os.environ.get(SESSION, "").split(os.pathsep)):
                shutil.rmtree(left, ignore_errors=True)
            os._exit(1)
        _beat(path, progress)
        if progress is not None and progress.watched is not None:
            _end_a_standstill(folder, rank, *progress.watched)
        time.sleep(HEARTBEAT_S)


def _end_a_standstill(folder: Path, rank: int, beats: Heartbeats, limit_s: float) -> None:
    beats.look()
    if beats.standstill() > limit_s:
        set_state(folder, rank, "failed", cause="timeout", detail=beats.standstill_message())
        faulthandler.dump_traceback()
        os._exit(1)


def _beat(path: Path, progress: Progress | None) -> None:
    content = "" if progress is None else f"{progress.count} {time.monotonic() - progress.at:.3f}"
    try:
        # Overwrites the old content, which a full disk allows.
        with open(path, "r+" if path.exists() else "w") as file:
            file.write(content.ljust(64))
    except OSError:
        # An observer would take half a write for silence.
        with contextlib.suppress(OSError):
            os.utime(path)


class Heartbeats:
    """Heartbeats of a folder's ranks as an observer sees them, on the observer's monotonic clock."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self._folder = folder
        self._ranks = range(ranks)
        now = time.monotonic()
        self._beats: dict[int, tuple[int, float]] = {rank: (0, now) for rank in self._ranks}
        """Last beat seen of each rank, and when."""
        self._finished: dict[int, int] = {}
        self._changed = self._looked = now

    def look(self) -> None:
        """Take note of new heartbeats. Call it about every second: time in which it was not called, since the observer
        was stopped or had no core, counts against no rank."""
        now = time.monotonic()
        missed = now - self._looked - _LOOK_S
        self._looked = now
        if missed > 0:
            self._changed += missed
            self._beats = {rank: (beat, seen + missed) for rank, (beat, seen) in self._beats.items()}
        for rank in self._ranks:
            try:
                beat = self._path(rank).stat().st_mtime_ns
                if beat == self._beats[rank][0]:
                    continue
                count, _ = self._content(rank)
            except (OSError, ValueError):
                continue  # The rank has not begun, or is about to write.
            self._beats[rank] = (beat, now)
            if count > self._finished.get(rank, -1):
                self._finished[rank], self._changed = count, now

    def silence(self, rank: int) -> float:
        """Return the seconds since a rank's last heartbeat; 0 before its first."""
        beat, seen = self._beats[rank]
        return time.monotonic() - seen if beat else 0.0

    def standstill(self) -> float:
        """Return the seconds since any rank finished anything; 0 where ranks do not count what they finish."""
        return time.monotonic() - self._changed if self._finished else 0.0

    def first_to_stop(self) -> int:
        """Return the rank that has finished nothing for the longest time: the others wait for it."""
        ages = {}
        for rank in self._finished:
            with contextlib.suppress(OSError, ValueError):
                written = self._path(rank).stat().st_mtime
                ages[rank] = self._content(rank)[1] + time.time() - written
        return max(ages, key=lambda rank: ages[rank], default=min(self._finished))

    def standstill_message(self) -> str:
        """Return the detail of the failure that a standstill is."""
        return (
            f"no rank has finished anything for {self.standstill():.0f} s, rank {self.first_to_stop()} stopped first; "
            "raise stall_limit_s if its tasks take so long"
        )

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.alive"

    def _content(self, rank: int) -> tuple[int, float]:
        """Return a rank's count of finished things, -1 where it has none, and the seconds since the last of them."""
        count, _, age = self._path(rank).read_text().strip().partition(" ")
        return (int(count), float(age)) if count else (-1, 0.0)


def stack_of(folder: Path, rank: int, process: int) -> str | None:
    """Return the innermost calls of a rank's main thread, on this machine; None where the rank does not answer."""
    path = folder / f"rank-{rank}.stack"
    try:
        before = path.stat().st_size
        os.kill(process, DUMP)
        end = time.monotonic() + 2.0
        while path.stat().st_size == before and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.05)
        lines = path.read_text()[before:].splitlines()
    except OSError:
        return None
    calls = [line.strip().removeprefix("File ") for line in lines if line.lstrip().startswith("File ")]
    return " < ".join(calls[:3]) or None


def _cause(error: BaseException) -> str:
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "can't allocate" in str(error):
        return "out-of-memory"
    return "nan" if isinstance(error, FloatingPointError) else "error"


class Turns:
    """A rank's side of taking turns: of several jobs at once, one trains a batch while the others wait.

    The ends are named pipes in the run folder: `turn-K` lets rank K go on, and rank 0 writes into `finished` when the
    batch is done. Waiting in them costs no time of the cores.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._granted = os.open(folder / f"turn-{rank}", os.O_RDONLY)
        self._finished = os.open(folder / "finished", os.O_WRONLY) if rank == 0 else None

    def wait(self) -> bool:
        """Wait for this job's turn; return True to train another batch, False to come to the end.

        Raises `EOFError` when the process that grants turns has ended.
        """
        message = os.read(self._granted, 1)
        if not message:
            raise EOFError("the comparison that gave this job its turns has ended")
        return message == TRAIN

    def finish(self) -> None:
        """Report that the batch is done on every rank."""
        if self._finished is not None:
            os.write(self._finished, b"1")
