"""What a benchmark leaves: a table to look at, and results/bench/NAME.json with where its numbers come from."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from axonn.cli import console
from axonn.observability.busy_watch import BusyWatch
from axonn.training.provenance import this_machine
from tests.bench.workloads import ROOT

RESULTS = ROOT / "results" / "bench"
Row = Mapping[str, Any]


_WATCH = BusyWatch()
"""Since the benchmark was started."""


def make_console() -> Console:
    """Into a file or a pipe, tables are as wide as they need to be."""
    return console.make_console(width=180)


def show(title: str, rows: Sequence[Row], console: Console) -> None:
    """Print rows as a table; a column that only some rows have stays empty in the others."""
    table = Table(title=title)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numbers = {c for c in columns if any(isinstance(row.get(c), int | float) for row in rows)}
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right" if column in numbers else "left")
    for row in rows:
        table.add_row(*(_text(row.get(column)) for column in columns))
    console.print(table)


def save(name: str, rows: Sequence[Row], *, quick: bool, folder: Path = RESULTS, **about: Any) -> Path:
    """Write rows with their kind, command and machine; `about` says what they are."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{'-quick' if quick else ''}.json"
    content = {
        "kind": "measured",
        "quick": quick,
        "command": command(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": this_machine().model_dump(exclude_none=True),
        "others_share": _WATCH.share(),
        "busy": _WATCH.warning() is not None,
        **about,
        "rows": list(rows),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    if warning := _WATCH.warning():
        make_console().print(f"[yellow]{warning}[/yellow]", soft_wrap=True)
    return path


def command() -> str:
    """How this process was started, as one types it."""
    main = sys.modules["__main__"].__spec__
    program = ["python", "-m", main.name] if main is not None else [Path(sys.argv[0]).name]
    return shlex.join([*program, *sys.argv[1:]])


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
