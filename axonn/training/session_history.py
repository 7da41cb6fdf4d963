"""Sessions of a run folder: with which configuration, on which grid each of its batches was trained, and their logs.

`run.json` has one entry for each start of `axonn train` that went on with the folder. Batches of a session begin with
its `first_batch` and end where a later session began; what a later one trained again took the place of the earlier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axonn.config.train_config import TrainConfig, validate
from axonn.durable_files import read_json, reason_of
from axonn.errors import ConfigError, RecordError
from axonn.grid import ProcessGrid
from axonn.training.run_folder import SPEC

RUN_FILE = "run.json"
NEWEST_LOG = "log.txt"


@dataclass(frozen=True, kw_only=True)
class PastSession:
    """One start. `end`: the batch before which its batches end, None for the newest session.

    `config` is None in folders of versions that kept the grid alone, `log` where it left none.
    """

    first_batch: int
    end: int | None
    grid: ProcessGrid
    config: TrainConfig | None
    log: str | None

    def has(self, batch: int) -> bool:
        """Whether the batch with this number was trained in it."""
        return self.first_batch <= batch and (self.end is None or batch < self.end)


def sessions_of(folder: Path) -> list[PastSession]:
    """Those of a run folder that left batches, the oldest first; one where it was started once, by its `spec.json`.

    Empty for a folder that says neither. Raises `RecordError` for a `run.json` that is no such file.
    """
    path = folder / RUN_FILE
    if not path.exists():
        return _of_spec(folder / SPEC)
    entries = entries_of(folder)
    found: list[PastSession] = []
    end: int | None = None
    for entry in reversed(entries):
        first = entry["first_batch"]
        if end is None or first < end:
            found.append(_session(entry, end, path))
            end = first
    return found[::-1]


def session_of(sessions: Sequence[PastSession], batch: int) -> PastSession | None:
    """The session in which a batch was trained."""
    return next((session for session in sessions if session.has(batch)), None)


def entries_of(folder: Path) -> list[dict[str, Any]]:
    """What `run.json` has of each session, all that were started; none where there is no such file."""
    path = folder / RUN_FILE
    if not path.exists():
        return []
    try:
        entries = read_json(path)["sessions"]
        if all(isinstance(entry["first_batch"], int) and isinstance(entry["grid"], dict) for entry in entries):
            return list(entries)
        problem = "its sessions lack first_batch or grid"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = reason_of(error)
    raise RecordError(f"{path}: does not say what the folder holds ({problem}); put it back, or start with --fresh")


def with_logs(entries: Sequence[dict[str, Any]], kept: str | None) -> list[dict[str, Any]]:
    """The entries of earlier sessions when the newest log is kept as `kept`, or there is none (None)."""
    return [entry | {"log": kept} if entry.get("log") == NEWEST_LOG else entry for entry in entries]


def _session(entry: dict[str, Any], end: int | None, path: Path) -> PastSession:
    try:
        config = None if entry.get("config") is None else validate(entry["config"], TrainConfig, where=str(path))
        grid = ProcessGrid.of(entry["grid"], where=f"{path}: grid")
    except ConfigError as error:
        raise RecordError(str(error)) from error
    return PastSession(first_batch=entry["first_batch"], end=end, grid=grid, config=config, log=entry.get("log"))


def _of_spec(path: Path) -> list[PastSession]:
    try:
        plain = read_json(path)["config"]
        grid = ProcessGrid.of(plain["grid"], where=str(path))
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return []
    try:
        config = validate(plain, TrainConfig, where=str(path))
    except ConfigError:
        # Of another version, whose grid is known all the same.
        config = None
    return [PastSession(first_batch=0, end=None, grid=grid, config=config, log=NEWEST_LOG)]
