"""What came of a run of this suite's own ranks, from the trail in its folder (`experiments.trail`).

A run that was ended by force may have left half a line or half a file: what cannot be read is as if it was not there.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from axonn.records import Failure
from experiments.metrics import BATCHES, Row

_COLUMNS = {"step": int, "seconds": (int, float), "loss": (int, float)}


@dataclass
class Outcome:
    """What came of a run: the finished batches in any case, and why it ended early if it did."""

    batch_times_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    memory_bytes: int | None = None
    memory_parts: dict[str, int] = field(default_factory=dict)
    memory_of_all: dict[str, int] = field(default_factory=dict)
    bytes_per_batch: dict[str, int] = field(default_factory=dict)
    """This and the two before: see `axonn.records.Record`."""
    failure: Failure | None = None
    new_starts: list[int] = field(default_factory=list)
    """Batches with which the run went on after it had been stopped."""


def outcome_of(folder: Path, ranks: int, failure: Failure | None = None) -> Outcome:
    """Of the run in a folder, as far as it came."""
    batches = batches_of(folder)
    states = [rank_state(folder, rank) for rank in range(ranks)]
    most_sent: dict[str, int] = {}
    for state in states:
        for axis, size in state.get("bytes_per_batch", {}).items():
            most_sent[axis] = max(size, most_sent.get(axis, 0))
    kept: list[dict[str, int]] = [state["memory"] for state in states if state.get("memory")]
    return Outcome(
        batch_times_s=[b["seconds"] for b in batches],
        losses=[b["loss"] for b in batches],
        memory_bytes=max((state["memory_bytes"] for state in states if "memory_bytes" in state), default=None),
        memory_parts={part: max(parts[part] for parts in kept) for part in (kept[0] if kept else {})},
        memory_of_all={part: sum(parts[part] for parts in kept) for part in (kept[0] if kept else {})},
        bytes_per_batch=most_sent,
        failure=failure,
        new_starts=[b["step"] for b in batches if b.get("first") and b["step"] > 0],
    )


def batches_of(folder: Path) -> list[Row]:
    """A row of each batch, in their order, up to the first that is missing."""
    path = folder / BATCHES
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    found: dict[int, Row] = {}
    for line in lines:
        row = _object(line)
        if all(isinstance(row.get(key), kind) for key, kind in _COLUMNS.items()):
            found[row["step"]] = row
    return [found[step] for step in takewhile(found.__contains__, count())]


def rank_state(folder: Path, rank: int) -> dict[str, Any]:
    """What a rank said last; nothing where it said nothing."""
    path = folder / f"rank-{rank}.json"
    return _object(path.read_bytes()) if path.exists() else {}


def _object(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text.decode())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def steady(batches: int, warmup: int, new_starts: Collection[int]) -> list[int]:
    """Numbers of the batches whose times count: those after the first `warmup`, without the first after a new start."""
    return [i for i in range(warmup, batches) if i not in new_starts]
