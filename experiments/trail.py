"""What a rank leaves in the run folder, from which the supervisor outside knows how it is; the standard library alone.

`rank-K.json` (its state), `rank-K.alive` (touched every second), and from rank 0 `batches.jsonl`, one line per finished
batch. Ranks of any framework leave it, also where this suite is not installed: those load this file by its path.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HEARTBEAT_S = 1.0
SUPERVISOR = "AXONN_SUPERVISOR"
"""Variable with the process id of the supervisor, on whose machine the ranks run."""
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


def set_state(folder: Path, rank: int, state: str, **details: Any) -> None:
    """Write `rank-K.json`, atomically."""
    temporary = folder / f".rank-{rank}.{os.getpid()}"
    temporary.write_text(json.dumps({"state": state, "pid": os.getpid(), "time": time.time(), **details}))
    temporary.replace(folder / f"rank-{rank}.json")


def leave_trail(folder: Path, rank: int, train: Callable[[], int | None]) -> int:
    """Run `train`, saying from the start that this rank lives, and why it ends if it fails; the exit status that it
    returns, 0 for None."""
    set_state(folder, rank, "started")
    threading.Thread(target=_heartbeat, args=(folder, rank), daemon=True).start()
    try:
        return train() or 0
    except BaseException as error:
        set_state(folder, rank, "failed", cause=_cause(error), detail=f"{type(error).__name__}: {error}")
        traceback.print_exc()
        sys.stderr.flush()
        # No clean-up that could wait for ranks which will never come; the launcher ends the others.
        os._exit(1)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _heartbeat(folder: Path, rank: int) -> None:
    path = folder / f"rank-{rank}.alive"
    launcher = os.getppid()
    supervisor = int(os.environ.get(SUPERVISOR, launcher))
    while True:
        if os.getppid() != launcher or not _runs(supervisor):
            # Nobody is left who would end this rank.
            os._exit(1)
        path.touch()
        time.sleep(HEARTBEAT_S)


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
