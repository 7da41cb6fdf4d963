"""Duration of a task of a stage: its kernels, its tensor-parallel collectives, and their overlap.

A task has one lane per sub-shard (overdecomposition, Singh & Bhatele, arXiv 2305.13525). A lane computes until it needs
the result of a collective, then yields to the next lane; turns are round-robin, as in `axonn.tensor.overdecomposition`.
The collectives of a rank are serialized, and computation is slower while one runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class TaskSegment(NamedTuple):
    """A turn of a lane: `compute` seconds of computation, then a collective of `exchange` seconds, and alongside it
    `beside` seconds of computation before its result is needed."""

    compute: float
    exchange: float = 0.0
    beside: float = 0.0


Interval = tuple[float, float]
"""Start and end, in seconds from the beginning of the task."""
Turn = tuple[int, int]
"""Lane, and number of the turn in it."""


class TaskTime(NamedTuple):
    """Seconds of a task and of its waits for collectives, and the intervals of computation and communication."""

    total: float
    waited: float
    computing: tuple[Interval, ...] = ()
    collectives: tuple[Interval, ...] = ()
    """Interval of each collective, from its issue to its result."""
    computed_in: tuple[Turn, ...] = ()
    """Turn of each interval in `computing`."""
    issued_in: tuple[Turn, ...] = ()
    """Turn of each interval in `collectives`."""
    lanes: int = 1
    layers: tuple[tuple[int, ...], ...] = ()
    """Per lane, the layer whose collective ends each turn, counted from the first of the chunk; empty if unknown."""

    def layer(self, turn: Turn) -> int:
        """Return the layer of a turn, or 0 if unknown."""
        return self.layers[turn[0]][turn[1]] if self.layers else 0

    def shard(self, turn: Turn) -> int:
        """Return the sub-shard of a turn, or -1 if there is only one."""
        return turn[0] if self.lanes > 1 else -1


def joined(segments: Iterable[TaskSegment]) -> list[TaskSegment]:
    """Merge segments until each has a collective, except possibly the last."""
    merged: list[TaskSegment] = []
    pending = 0.0
    for segment in segments:
        if segment.exchange > 0:
            merged.append(TaskSegment(pending + segment.compute, segment.exchange, segment.beside))
            pending = 0.0
        else:
            pending += segment.compute + segment.beside
    if pending > 0 or not merged:
        merged.append(TaskSegment(pending))
    return merged


def computed(now: float, seconds: float, link: float, slowdown: float) -> float:
    """Return the end of a computation of `seconds` that starts `now`, slowed down until the link is free at `link`."""
    link_busy = max(0.0, link - now)
    if seconds * slowdown <= link_busy:
        return now + seconds * slowdown
    return now + seconds + link_busy * (1 - 1 / slowdown)


def task_time(lanes: Sequence[Sequence[TaskSegment]], *, slowdown: float = 1.0) -> TaskTime:
    """Return the time of a task whose `lanes` (`joined` segments) take turns on one device and one link.

    `slowdown`: factor by which computation takes longer while a collective runs. The collectives pending when a
    computation starts run without a gap, so the link is busy until the end of the last one.
    """
    now = link = waited = 0.0
    ready = [0.0] * len(lanes)
    computing: list[Interval] = []
    collectives: list[Interval] = []
    computed_in: list[Turn] = []
    issued_in: list[Turn] = []
    turns = max(map(len, lanes), default=0)
    for turn in range(turns):
        for lane, segments in enumerate(lanes):
            if turn >= len(segments):
                continue
            if ready[lane] > now:
                waited += ready[lane] - now
                now = ready[lane]
            begun = now
            segment = segments[turn]
            now = computed(now, segment.compute, link, slowdown)
            if segment.exchange > 0:
                link = max(link, now) + segment.exchange
                collectives.append((now, link))
                issued_in.append((lane, turn))
                ready[lane] = link
            now = computed(now, segment.beside, link, slowdown)
            if now > begun:
                computing.append((begun, now))
                computed_in.append((lane, turn))
    end = max([now, *ready])
    return TaskTime(
        end,
        waited + end - now,
        tuple(computing),
        tuple(collectives),
        tuple(computed_in),
        tuple(issued_in),
        len(lanes),
    )
