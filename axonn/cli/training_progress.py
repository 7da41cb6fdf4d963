"""Progress of a long training run: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections import deque
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from axonn.training.metrics import BATCHES, EVALUATIONS, Row, Tail

_LINE_EVERY_S = 10.0
_SPEED_OVER = 20
"""Last batches over which speed is averaged."""


class TrainingProgress:
    """Display of loss, `unit`s per second, TFLOP/s per device, time left and last evaluation of the run in `folder`.

    A context manager; call it with the number of finished batches.
    """

    def __init__(self, console: Console, folder: Path, *, first: int, steps: int, unit: str = "tokens") -> None:
        self._console = console
        self._batches = Tail(folder / BATCHES)
        self._evaluations = Tail(folder / EVALUATIONS)
        self._first = first
        self._steps = steps
        self._unit = unit
        self._last: deque[Row] = deque(maxlen=_SPEED_OVER)
        self._evaluation: Row | None = None
        self._printed_at = 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if console.is_interactive:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=console,
            )
            self._task = self._bar.add_task("starting the ranks", total=steps, completed=first)

    def __enter__(self) -> TrainingProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int) -> None:
        self._last.extend(row for row in self._batches.new() if row["step"] >= self._first)
        for evaluation in self._evaluations.new():
            self._evaluation = evaluation
        if not self._last:
            return
        text = self._text(done)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, description=text)
        elif time.monotonic() - self._printed_at >= _LINE_EVERY_S or done == self._steps:
            self._printed_at = time.monotonic()
            self._console.print(f"batch {done}/{self._steps}: {text}", soft_wrap=True, highlight=False)

    def _text(self, done: int) -> str:
        # A session's first batch is slow: it counts only while there is no other.
        timed = list(self._last)[1:] or list(self._last)
        seconds = sum(row["seconds"] for row in timed) / len(timed)
        newest = self._last[-1]
        left = timedelta(seconds=round(seconds * (self._steps - done)))
        parts = [
            f"loss {newest['loss']:.4f}",
            f"{newest[f'{self._unit}_per_s'] * newest['seconds'] / seconds:,.0f} {self._unit}/s",
            f"{newest['tflops_per_gpu'] * newest['seconds'] / seconds:.3g} TFLOP/s per device",
            f"{left} left",
        ]
        if self._evaluation is not None:
            parts.append(f"held out {self._evaluation['loss']:.4f} after {self._evaluation['batches']}")
        return ", ".join(parts)
