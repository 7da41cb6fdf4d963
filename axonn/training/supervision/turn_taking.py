"""The other side of `axonn.training.run_folder.Turns`: several jobs are there at once and train batches one after the other."""

from __future__ import annotations

import os
import select
from pathlib import Path
from types import TracebackType

from axonn.training.run_folder import END, TRAIN


class TurnTaking:
    """Gives the job of one run folder its turns. Make it before the ranks start; closing ends ranks that wait."""

    def __init__(self, folder: Path, ranks: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        names = [*(f"turn-{rank}" for rank in range(ranks)), "finished"]
        self._paths = [folder / name for name in names]
        for path in self._paths:
            path.unlink(missing_ok=True)
            os.mkfifo(path)
        # Opened for both, so that neither side waits for the other to open.
        *self._turns, self._finished = [os.open(path, os.O_RDWR | os.O_NONBLOCK) for path in self._paths]

    def grant(self) -> None:
        """The job's ranks may train one batch (or go on to their end after the last)."""
        self._say(TRAIN)

    def end(self) -> None:
        """No more batches: the job's ranks come to their end, as after the last."""
        self._say(END)

    def _say(self, what: bytes) -> None:
        for turn in self._turns:
            os.write(turn, what)

    def finished(self, timeout_s: float) -> bool:
        """Wait for the end of the batch; False when it has not come in that time."""
        ready, _, _ = select.select([self._finished], [], [], timeout_s)
        return bool(ready) and bool(os.read(self._finished, 1))

    def close(self) -> None:
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
