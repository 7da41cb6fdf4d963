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

from axonn.files import replace_durably

BATCHES = "batches.jsonl"
EVALUATIONS = "evaluations.jsonl"
Row = dict[str, Any]


class Tail:
    """Reads a file of lines from where it stopped the last time. The file need not be there yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""

    def new(self) -> list[Row]:
        """The complete lines that came since the last call."""
        if not self._path.exists():
            return []
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            text = file.read()
        self._offset += len(text)
        *lines, self._rest = (self._rest + text).split(b"\n")
        return [json.loads(line) for line in lines]


def read_rows(path: Path) -> list[Row]:
    """All complete lines; a rank that died while it wrote leaves half a line, which is left out."""
    return Tail(path).new()


def cut_rows(path: Path, keep: Callable[[Row], bool]) -> None:
    """Remove the lines that are not to be kept, atomically."""
    if path.exists():
        replace_durably(path, "".join(json.dumps(row) + "\n" for row in read_rows(path) if keep(row)))
