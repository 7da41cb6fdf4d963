"""Starts of a job: their folders in order of their beginning, how each ended, and whether all batches are done."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from axonn.durable_files import parse_json, read_bytes, read_json
from axonn.training.metrics import BATCHES

ENDED = "ended.json"
STARTED = "started.txt"


def attempts(job: Path) -> list[Path]:
    """Return the folders of the starts of a job, the newest last."""
    return in_order(job.glob("run/attempt-*"))


def in_order(starts: Iterable[Path]) -> list[Path]:
    """Sort attempts by the times of their starts, as they note them themselves: copied files have other times.

    An attempt that had no time to note it is sorted by the time of its folder.
    """

    def started(path: Path) -> tuple[float, float, str]:
        changed = path.stat().st_mtime
        try:
            text = read_bytes(path / STARTED).decode("utf-8", "replace").strip()
            # Times are in full seconds: the folders' times order two starts within the same one.
            seconds = datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
        except (OSError, ValueError):
            seconds = float(int(changed))
        return seconds, changed, path.name

    return sorted(starts, key=started)


def newest_attempt(job: Path) -> Path | None:
    """Return the folder of the last start of a job."""
    return next(reversed(attempts(job)), None)


def id_of(attempt: Path) -> str:
    """Return the id of the job; a second start of the same job has a number behind it."""
    return attempt.name.removeprefix("attempt-").partition("-")[0]


def attempt_of(job: str, attempt: Path | None) -> bool:
    """Return whether this attempt is that of the job with this id."""
    return attempt is not None and id_of(attempt) == job


def reason_of(attempt: Path | None) -> str | None:
    """Return how an attempt ended, in its own words; None where it did not note it."""
    if attempt is None or not (attempt / ENDED).exists():
        return None
    try:
        return str(read_json(attempt / ENDED)["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def steps_of(job: Path) -> int | None:
    """Return how many batches a job is to do; None where its work cannot be read."""
    try:
        content = read_json(job / "work.json")
        return int(content["small"]["config"]["steps"] if "small" in content else content["work"]["steps"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


def rows_of(job: Path) -> list[bytes] | None:
    """Return the rows of the batches that our own ranks did; None for other frameworks.

    A row that is being written does not count yet.
    """
    path = job / "run" / BATCHES
    try:
        return read_bytes(path).split(b"\n")[:-1] if path.exists() else None
    except OSError:
        return []


def all_done(job: Path) -> bool:
    """Return whether our own ranks did every batch of a job, whatever happened when it ended; False where the last loss
    is not a number."""
    rows, steps = rows_of(job), steps_of(job)
    if not rows or steps is None or len(rows) < steps:
        return False
    try:
        loss = float(parse_json(rows[-1])["loss"])
    except (ValueError, KeyError, TypeError):
        return False
    return not math.isnan(loss)
