"""What a rank leaves in the run folder, from which the supervisor outside knows how it is; the standard library alone.

`rank-K.json` (its state), `rank-K.alive` (written every second: how much it has finished, and how long ago the last of
that was), and from rank 0 `batches.jsonl`, one line per finished batch. On a signal `DUMP` a rank writes into
`rank-K.stack` where it stands. Ranks of any framework leave it, also where this suite is not installed: those load this
file by its path.
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
"""More than that between two looks at the heartbeats is not the ranks' fault."""
DUMP = signal.SIGUSR1
SUPERVISOR = "AXONN_SUPERVISOR"
"""Variable with the process id of the supervisor, on whose machine the ranks run."""
SESSION = "AXONN_SESSION"
"""Variable with the temporary folders of the run, which ranks remove when nobody else is left to do it."""
SPEC = "spec.json"
"""What the supervisor asks for: framework, configuration and how to run it."""
STOP = "stop"
"""A file by which ranks that may be stopped are told to save what they have and to end."""
NEWEST = "newest"
"""As the checkpoint of a spec: go on from the newest of the run folder, if there is one."""
STOPPED = 75
"""Exit status of ranks that ended because they were told to: the job is not finished (EX_TEMPFAIL of sysexits.h)."""
TRAIN, END = b"1", b"0"
"""What a turn says: train a batch, or come to the end."""


_STATE_BYTES = 4096
"""What a rank reserves for its state, so that it can say why it ends where no disk is left."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Progress:
    """How much a rank has finished: tasks, messages, collectives, files, whatever shows that it goes on."""

    def __init__(self) -> None:
        self.count = 0
        self.at = time.monotonic()
        self.watched: tuple[Heartbeats, float] | None = None
        """Whose progress this rank watches, and the limit of a standstill, where no supervisor does."""

    def note(self) -> None:
        """Something is finished."""
        self.count += 1
        self.at = time.monotonic()


def set_state(folder: Path, rank: int, state: str, **details: Any) -> None:
    """Write `rank-K.json`: atomically, or over what is there where the disk is full."""
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


def leave_trail(folder: Path, rank: int, train: Callable[[], int | None], *, progress: Progress | None = None) -> int:
    """Run `train`, saying from the start that this rank lives, and why it ends if it fails; the exit status that it
    returns, 0 for None. `progress`: what `train` notes of its own, where it does."""
    set_state(folder, rank, "started")
    stack = open(folder / f"rank-{rank}.stack", "w")  # noqa: SIM115  (open as long as the process lives)
    faulthandler.register(DUMP, file=stack, all_threads=False)
    threading.Thread(target=_heartbeat, args=(folder, rank, progress), daemon=True).start()
    try:
        return train() or 0
    except BaseException as error:
        said = {"cause": _cause(error), "detail": f"{type(error).__name__}: {error}"}
        # Which ranks began it, where the error knows that.
        blamed = {"ranks": error.ranks} if getattr(error, "ranks", None) else {}  # type: ignore[attr-defined]
        set_state(folder, rank, "failed", **said, **blamed)
        traceback.print_exc()
        sys.stderr.flush()
        # No clean-up that could wait for ranks which will never come; the launcher ends the others.
        os._exit(1)


def runs(process: int) -> bool:
    """Return whether there is a process of this id."""
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
            # Nobody is left who would end this rank, and clean up.
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
        set_state(folder, rank, "failed", cause="timeout", detail=beats.said_of_standstill())
        faulthandler.dump_traceback()
        os._exit(1)


def _beat(path: Path, progress: Progress | None) -> None:
    said = "" if progress is None else f"{progress.count} {time.monotonic() - progress.at:.3f}"
    try:
        # Over what is there, which a full disk allows.
        with open(path, "r+" if path.exists() else "w") as file:
            file.write(said.ljust(64))
    except OSError:
        # Whoever looks takes what this leaves for silence.
        with contextlib.suppress(OSError):
            os.utime(path)


class Heartbeats:
    """The ranks of a folder as seen from outside, on the clock of who looks, which no change of the date disturbs."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self._folder = folder
        self._ranks = range(ranks)
        now = time.monotonic()
        self._beats: dict[int, tuple[int, float]] = {rank: (0, now) for rank in self._ranks}
        """The last beat that was seen of each rank, and when."""
        self._finished: dict[int, int] = {}
        self._changed = self._looked = now

    def look(self) -> None:
        """Take note of what is new. Call it every second or so: time in which nobody looked, because who looks was
        stopped or had no core, is held against no rank."""
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
                count, _ = self._said(rank)
            except (OSError, ValueError):
                continue  # It has not begun, or is about to write.
            self._beats[rank] = (beat, now)
            if count > self._finished.get(rank, -1):
                self._finished[rank], self._changed = count, now

    def silence(self, rank: int) -> float:
        """Seconds since a rank gave a sign of life; 0 before its first."""
        beat, seen = self._beats[rank]
        return time.monotonic() - seen if beat else 0.0

    def standstill(self) -> float:
        """Seconds since any rank finished anything; 0 where they do not say what they finish."""
        return time.monotonic() - self._changed if self._finished else 0.0

    def first_to_stop(self) -> int:
        """The rank that has finished nothing for the longest: the others wait for it."""
        ages = {}
        for rank in self._finished:
            with contextlib.suppress(OSError, ValueError):
                written = self._path(rank).stat().st_mtime
                ages[rank] = self._said(rank)[1] + time.time() - written
        return max(ages, key=lambda rank: ages[rank], default=min(self._finished))

    def said_of_standstill(self) -> str:
        """In words."""
        return (
            f"no rank has finished anything for {self.standstill():.0f} s, rank {self.first_to_stop()} stopped first; "
            "raise stall_limit_s if its tasks take so long"
        )

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.alive"

    def _said(self, rank: int) -> tuple[int, float]:
        """What a rank has finished, -1 where it does not say, and seconds since the last of it."""
        count, _, age = self._path(rank).read_text().strip().partition(" ")
        return (int(count), float(age)) if count else (-1, 0.0)


def stack_of(folder: Path, rank: int, process: int) -> str | None:
    """Where a rank of this machine stands, as its main thread's innermost calls; None where it does not say."""
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
    """A rank's side of taking turns: several jobs are there at once, and one trains a batch while the others wait.

    The ends are named pipes of the run folder: `turn-K` says to rank K that it may go on, `finished` is where rank 0
    says that the batch is done. Waiting in them costs no time of the cores.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._granted = os.open(folder / f"turn-{rank}", os.O_RDONLY)
        self._finished = os.open(folder / "finished", os.O_WRONLY) if rank == 0 else None

    def wait(self) -> bool:
        """Until it is this job's turn; whether to train another batch.

        Raises `EOFError` when nobody is left who would say so.
        """
        said = os.read(self._granted, 1)
        if not said:
            raise EOFError("the comparison that gave this job its turns has ended")
        return said == TRAIN

    def finish(self) -> None:
        """The batch is done on every rank."""
        if self._finished is not None:
            os.write(self._finished, b"1")
