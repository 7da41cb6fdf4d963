"""Progress of jobs: batches that are done, a table of all, and waiting until none is left."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from axonn.errors import LaunchError
from axonn.training.framework import adapter_names, load_adapter
from jobscripts.attempts import newest_attempt, rows_of, steps_of
from jobscripts.generate import JobEntry
from jobscripts.submission import Standing, standings


def batches(folder: Path, entry: JobEntry) -> tuple[int, int | None]:
    """Return how many batches of a job are done, and of how many (None where its work cannot be read)."""
    job = folder / entry.name
    return _done(job, entry), steps_of(job)


def _done(job: Path, entry: JobEntry) -> int:
    if (rows := rows_of(job)) is not None:
        return len(rows)
    attempt = newest_attempt(job)
    if attempt is None or not (attempt / "output.txt").exists() or entry.adapter not in adapter_names():
        return 0
    printed = (attempt / "output.txt").read_text(encoding="utf-8", errors="replace")
    return len(load_adapter(entry.adapter).read(printed.splitlines()).seconds)


def state_text(standing: Standing) -> str:
    """Return the state of a job in a word or two."""
    if standing.id is None and standing.attempt is None:
        return "not submitted"
    return "finished" if standing.finished and not standing.live and not standing.unclear else standing.state


def reason_text(standing: Standing) -> str:
    """Return the scheduler's reason, or the job's own."""
    if standing.finished:
        return ""
    if standing.reason not in (None, "failed") and not standing.live:
        return str(standing.reason)
    return (standing.status.reason if standing.status is not None else None) or ""


def table(folder: Path, jobs: Sequence[Standing]) -> Table:
    """Return a table with a row for each job, and a column for whatever at least one of them reports."""
    rows = []
    for one in jobs:
        done, steps = batches(folder, one.entry)
        count = f"{done} of {steps}" if steps is not None else str(done)
        status = one.status
        since, left = (status.since, status.left) if status is not None else (None, None)
        rows.append(
            (one.entry.name, one.id or "", state_text(one), reason_text(one), count, _shortened(since), left or "")
        )
    jobs_table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    names = ("job", "id", "state", "reason", "batches", "since", "wall time left")
    shown = [i for i in range(len(names)) if any(row[i] for row in rows)]
    for i in shown:
        jobs_table.add_column(
            names[i], justify="right" if names[i] in ("batches", "wall time left") else "left", overflow="fold"
        )
    for row in rows:
        jobs_table.add_row(*(row[i] for i in shown))
    return jobs_table


def _shortened(moment: str | None) -> str:
    """Return month, day and minute of Slurm's times."""
    match = re.fullmatch(r"\d{4}-(\d\d-\d\d)T(\d\d:\d\d):\d\d", moment or "")
    return f"{match[1]} {match[2]}" if match else moment or ""


def changes(folder: Path, *, every: float) -> Iterator[tuple[list[Standing], list[str]]]:
    """Yield the standings, asked for again every so many seconds until no job waits or runs, and a line for what
    changed.

    Raises `LaunchError` when there is no scheduler to ask. One that does not answer for a while is asked again.
    """
    shown: dict[str, str] = {}
    while True:
        jobs = standings(folder)
        lines = []
        for one in jobs:
            line = f"{one.entry.name}: {state_text(one)}"
            line += f" ({reason_text(one)})" if reason_text(one) else ""
            if shown.get(one.entry.name) != line and not one.unclear:
                shown[one.entry.name] = line
                lines.append(f"{time.strftime('%H:%M:%S')} {line}, {batches(folder, one.entry)[0]} batches done")
        yield jobs, lines
        if not any(one.live or one.unclear for one in jobs):
            return
        absent = next((one.silence for one in jobs if one.unclear and "cannot be started" in (one.silence or "")), None)
        if absent is not None:
            raise LaunchError(f"{absent}; wait where jobs are submitted")
        time.sleep(every)
