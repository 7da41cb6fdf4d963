"""Sessions of a run folder: the configuration and grid with which each of its batches was trained, and their logs.

`run.json` has one entry for each start of `axonn train` in the folder. Batches of a session begin with its
`first_batch` and end where a later session began; batches that a later session trained again replace the earlier ones.
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
    """One start of a run. `end`: the batch before which its batches end, None for the newest session.

    `config` is None in folders of versions that kept the grid alone, `log` where the session left none.
    """

    first_batch: int
    end: int | None
    grid: ProcessGrid
    config: TrainConfig | None
    log: str | None

    def has(self, batch: int) -> bool:
        """Return whether the batch with this number was trained in this session."""
        return self.first_batch <= batch and (self.end is None or batch < self.end)


def sessions_of(folder: Path) -> list[PastSession]:
    """Return the sessions of a run folder that left batches, oldest first; one, from `spec.json`, if there is no
    `run.json`.

    Empty for a folder that has neither file. Raises `RecordError` for a damaged `run.json`.
    """
    path = folder / RUN_FILE
    if not path.exists():
        return _of_spec(folder / SPEC)
    entries = entries_of(folder)
    sessions: list[PastSession] = []
    end: int | None = None
    for entry in reversed(entries):
        first = entry["first_batch"]
        if end is None or first < end:
            sessions.append(_session(entry, end, path))
            end = first
    return sessions[::-1]


def session_of(sessions: Sequence[PastSession], batch: int) -> PastSession | None:
    """Return the session in which a batch was trained, or None."""
    return next((session for session in sessions if session.has(batch)), None)


def entries_of(folder: Path) -> list[dict[str, Any]]:
    """Return the entry of `run.json` for each session that was started; empty where there is no such file."""
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
    """Return the entries with the newest log renamed to `kept`, None if there was no log."""
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
        # Written by another version; the grid is known all the same.
        config = None
    return [PastSession(first_batch=0, end=None, grid=grid, config=config, log=NEWEST_LOG)]
