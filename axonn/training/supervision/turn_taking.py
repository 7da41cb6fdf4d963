"""Turns between several jobs that train batches one after the other; `axonn.training.run_folder.Turns` has the ranks'
side."""

from __future__ import annotations

import os
import select
from pathlib import Path
from types import TracebackType

from axonn.training.run_folder import END, TRAIN


class TurnTaking:
    """The turns of one run folder's job. Create it before the ranks start; closing it ends ranks that wait."""

    def __init__(self, folder: Path, ranks: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        names = [*(f"turn-{rank}" for rank in range(ranks)), "finished"]
        self._paths = [folder / name for name in names]
        for path in self._paths:
            path.unlink(missing_ok=True)
            os.mkfifo(path)
        # Opened for reading and writing, so that neither side waits for the other to open.
        *self._turns, self._finished = [os.open(path, os.O_RDWR | os.O_NONBLOCK) for path in self._paths]

    def grant(self) -> None:
        """Let the job's ranks train one batch, or come to their end after the last."""
        self._send(TRAIN)

    def end(self) -> None:
        """Let the job's ranks come to their end without further batches."""
        self._send(END)

    def _send(self, message: bytes) -> None:
        for turn in self._turns:
            os.write(turn, message)

    def finished(self, timeout_s: float) -> bool:
        """Wait for the end of the batch; return False if it has not come within `timeout_s` seconds."""
        ready, _, _ = select.select([self._finished], [], [], timeout_s)
        return bool(ready) and bool(os.read(self._finished, 1))

    def close(self) -> None:
        """Close and remove the pipes."""
        for end in (*self._turns, self._finished):
            os.close(end)
        self._turns = []
        for path in self._paths:
            path.unlink(missing_ok=True)

    def __enter__(self) -> TurnTaking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()
