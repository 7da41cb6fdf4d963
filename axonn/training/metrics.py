"""The metrics of a run: files of one JSON object a line, written while it trains and read while they grow.

A run may have been started several times, each start going on from a checkpoint of the one before. The first row that
a start writes into `BATCHES` has `"first": true`: that batch also warmed up what a new process warms up, so its time is
none of the steady batches, wherever in the run it lies. No other row has the key.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from axonn.durable_files import opened, parse_json, reason_of, replace_durably
from axonn.errors import RecordError

BATCHES = "batches.jsonl"
EVALUATIONS = "evaluations.jsonl"
Row = dict[str, Any]
_COLUMNS = {BATCHES: ("step", "seconds", "loss"), EVALUATIONS: ("batches", "loss")}


class Tail:
    """Reads a file of lines from where it stopped the last time. The file need not be there yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""

    def new(self) -> list[Row]:
        """The complete lines that came since the last call. Raises `RecordError` for one that is no row."""
        if not self._path.exists():
            return []
        try:
            with opened(self._path) as file:
                file.seek(self._offset)
                text = file.read()
        except OSError as error:
            raise RecordError(f"{self._path}: cannot be read: {reason_of(error)}") from error
        self._offset += len(text)
        *lines, self._rest = (self._rest + text).split(b"\n")
        return [self._row(line) for line in lines]

    def _row(self, line: bytes) -> Row:
        try:
            row = parse_json(line)
        except ValueError as error:
            raise RecordError(f"{self._path}: {_shown(line)} is no line of it: {error}; remove that line") from error
        wanted = _COLUMNS.get(self._path.name, ())
        if not isinstance(row, dict) or not all(_is_number(row.get(key)) for key in wanted):
            keys = ", ".join(wanted)
            raise RecordError(
                f"{self._path}: {_shown(line)} is no row with a number for each of {keys}; remove that line"
            )
        return row


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(line: bytes) -> str:
    return ascii(line[:60].decode("utf-8", "replace"))


def read_rows(path: Path) -> list[Row]:
    """All complete lines; a rank that died while it wrote leaves half a line, which is left out."""
    return Tail(path).new()


def cut_rows(path: Path, keep: Callable[[Row], bool]) -> None:
    """Remove the lines that are not to be kept, atomically."""
    if path.exists():
        replace_durably(path, "".join(json.dumps(row) + "\n" for row in read_rows(path) if keep(row)))
