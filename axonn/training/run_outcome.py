"""Outcome of a run of this suite's own ranks, read from its folder (`axonn.training.run_folder`).

A run that was ended by force may have left half a line or half a file: unreadable content counts as absent.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from axonn.durable_files import parse_json, read_bytes
from axonn.observability.batch_usage import batch_usage
from axonn.observability.machine_usage import BatchUsage
from axonn.observability.records import Failure
from axonn.training.metrics import BATCHES, Row


@dataclass
class Outcome:
    """Outcome of a run: its finished batches, and the failure if it ended early."""

    batch_times_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    memory_bytes: int | None = None
    memory_parts: dict[str, int] = field(default_factory=dict)
    memory_of_all: dict[str, int] = field(default_factory=dict)
    bytes_per_batch: dict[str, int] = field(default_factory=dict)
    """Bytes by axis. This and both fields before: see `axonn.observability.records.Record`."""
    usage: list[BatchUsage] = field(default_factory=list)
    """Usage in the batches from `first` of `outcome_of` on, as far as all ranks reported it."""
    failure: Failure | None = None
    new_starts: list[int] = field(default_factory=list)
    """First batch of each start that resumed the run."""


def outcome_of(folder: Path, ranks: int, failure: Failure | None = None, *, first: int = 0) -> Outcome:
    """Return the outcome of the run in a folder, as far as it got. `first`: first batch of its newest start."""
    batches = batches_of(folder)
    states = [rank_state(folder, rank) for rank in range(ranks)]
    most_sent: dict[str, int] = {}
    for state in states:
        for axis, size in _sizes(state, "bytes_per_batch").items():
            most_sent[axis] = max(size, most_sent.get(axis, 0))
    kept = [sizes for state in states if (sizes := _sizes(state, "memory"))]
    parts = [part for part in (kept[0] if kept else {}) if all(part in one for one in kept)]
    peaks = [state.get("memory_bytes") for state in states]
    return Outcome(
        batch_times_s=[b["seconds"] for b in batches],
        losses=[b["loss"] for b in batches],
        memory_bytes=max((int(size) for size in peaks if size is not None and _is_size(size)), default=None),
        memory_parts={part: max(one[part] for one in kept) for part in parts},
        memory_of_all={part: sum(one[part] for one in kept) for part in parts},
        bytes_per_batch=most_sent,
        usage=batch_usage(folder, ranks, len(batches), first=first),
        failure=failure,
        new_starts=[b["step"] for b in batches if b.get("first") and b["step"] > 0],
    )


def batches_of(folder: Path) -> list[Row]:
    """Return the row of each batch, in order, up to the first batch that is missing."""
    path = folder / BATCHES
    lines = _content(path).split(b"\n")[:-1]
    rows: dict[int, Row] = {}
    for line in lines:
        row = _object(line)
        if _is_size(row.get("step")) and _is_time(row.get("seconds")) and _is_number(row.get("loss")):
            rows[row["step"]] = row
    return [rows[step] for step in takewhile(rows.__contains__, count())]


def rank_state(folder: Path, rank: int) -> dict[str, Any]:
    """Return the last state that a rank wrote; empty where it wrote none."""
    path = folder / f"rank-{rank}.json"
    return _object(_content(path))


def _content(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except OSError:
        return b""


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_time(value: Any) -> bool:
    return _is_number(value) and 0 <= value < math.inf


def _sizes(state: dict[str, Any], name: str) -> dict[str, int]:
    """Return bytes by name; empty where one of the values is not a size."""
    sizes = state.get(name)
    return sizes if isinstance(sizes, dict) and all(map(_is_size, sizes.values())) else {}


def _object(text: bytes) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def steady(batches: int, warmup: int, new_starts: Collection[int]) -> list[int]:
    """Return the batches whose times count: those after the first `warmup`, without the first of each new start."""
    return [i for i in range(warmup, batches) if i not in new_starts]
