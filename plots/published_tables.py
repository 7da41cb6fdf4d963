"""Published numbers other than batch times: the tables that an experiment names in `readings`."""

from __future__ import annotations

import csv
import io

from axonn.durable_files import read_text, reason_of
from axonn.errors import RecordError
from axonn.training.places import ROOT
from experiments.definition import Experiment


def read_reading(experiment: Experiment, name: str) -> list[dict[str, str]]:
    """Return the rows of a table, by column. Raises `RecordError` naming the file where it cannot be read."""
    path = ROOT / experiment.readings[name].file
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RecordError(f"{path}: cannot be read: {reason_of(error)}; check it out again") from error
    if not rows or any(value is None for row in rows for value in row.values()):
        raise RecordError(f"{path}: is no table with a value in each column; check it out again")
    return rows


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    """Return the numbers of a column."""
    return [float(row[name]) for row in rows]
