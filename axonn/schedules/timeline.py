"""Schedules as text: a timeline of the tasks of all stages, and CSV of each stage's task order."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from axonn.schedules.base import Task

_IDLE, _GOES_ON = ".", "="


def timeline(
    tasks: Iterable[tuple[int, Task, float, float]],
    *,
    slot: float = 1.0,
    begin: float = 0.0,
    columns: int | None = None,
) -> str:
    """Rows are stages, columns are time slots of `slot` seconds from `begin` on.

    `tasks` are (stage, task, start, end). A task stands in the slot in which it starts, `=` in the further slots it
    covers, `.` where a stage is idle; a slot in which several tasks start shows the last one.
    """
    shown = [(stage, task, (start - begin) / slot, (end - begin) / slot) for stage, task, start, end in tasks]
    if not shown:
        return ""
    stages = 1 + max(stage for stage, *_ in shown)
    width = max(round(end) for *_, end in shown)
    width = width if columns is None else min(width, columns)
    cells = [[_IDLE] * width for _ in range(stages)]
    for stage, task, start, end in sorted(shown, key=lambda t: t[2]):
        for column in range(max(0, int(start + 1e-9) + 1), min(width, round(end))):
            cells[stage][column] = _GOES_ON
        if 0 <= int(start + 1e-9) < width and start > -1e-9:
            cells[stage][int(start + 1e-9)] = str(task)
    size = max(len(cell) for row in cells for cell in row)
    label = len(f"stage {stages - 1}")
    lines = [
        f"{f'stage {stage}':<{label}}  " + " ".join(f"{cell:<{size}}" for cell in row)
        for stage, row in enumerate(cells)
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def write_orders(orders: Sequence[Sequence[Task]]) -> str:
    """CSV with one line per stage: its number and its tasks in order (`0F3` = chunk 0, forward, microbatch 3)."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for stage, order in enumerate(orders):
        writer.writerow([stage, *(str(task) for task in order)])
    return out.getvalue()
