"""Metrics of a run: files of one JSON object per line, written while it trains and read while they grow.

A run may have been started several times, each start going on from a checkpoint of the one before. The first row that
a start writes into `BATCHES` has `"first": true`: that batch includes the warm-up of a new process, so its time is not
one of a steady batch, wherever in the run it lies. No other row has the key.
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
    """A reader of a growing file of lines that goes on where it stopped. The file need not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""

    def new(self) -> list[Row]:
        """Return the complete lines since the last call. Raises `RecordError` for one that is not a row."""
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
    """Return all complete lines; half a line, as a rank leaves that died while writing, is left out."""
    return Tail(path).new()


def cut_rows(path: Path, keep: Callable[[Row], bool]) -> None:
    """Remove the rows for which `keep` is false, atomically."""
    if path.exists():
        replace_durably(path, "".join(json.dumps(row) + "\n" for row in read_rows(path) if keep(row)))
