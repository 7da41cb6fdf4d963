"""How long a task of a stage takes: its kernels, its tensor-parallel collectives, and what runs beside what.

A task is cut into one lane per sub-shard (overdecomposition, Singh & Bhatele, arXiv 2305.13525). A lane computes until
it needs the result of a collective, then gives its turn to the next lane; turns go round in a fixed order, as in
`axonn.tensor.overdecomposition`. The collectives of a rank follow each other, and computing is slower while one is under way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class TaskSegment(NamedTuple):
    """Computes for `compute` seconds, starts a collective of `exchange` seconds, and computes for `beside` seconds more
    before it needs the result."""

    compute: float
    exchange: float = 0.0
    beside: float = 0.0


Interval = tuple[float, float]
"""Start and end, in seconds from the beginning of the task."""
Turn = tuple[int, int]
"""Lane, and which of its turns."""


class TaskTime(NamedTuple):
    """Seconds of a task, how many of them it waits for collectives, and when it computes and communicates."""

    total: float
    waited: float
    computing: tuple[Interval, ...] = ()
    collectives: tuple[Interval, ...] = ()
    """From the issue of each to its result."""
    computed_in: tuple[Turn, ...] = ()
    """Turn of each of `computing`."""
    issued_in: tuple[Turn, ...] = ()
    """Turn of each of `collectives`."""
    lanes: int = 1
    layers: tuple[tuple[int, ...], ...] = ()
    """By lane the layer whose collective ends each turn, counted from the first of the chunk, where it is known."""

    def layer(self, turn: Turn) -> int:
        """That of a turn; 0 where it is not known."""
        return self.layers[turn[0]][turn[1]] if self.layers else 0

    def shard(self, turn: Turn) -> int:
        """The sub-shard of a turn, -1 where there is only one."""
        return turn[0] if self.lanes > 1 else -1


def joined(segments: Iterable[TaskSegment]) -> list[TaskSegment]:
    """The same with as few segments as possible: only the last may be without a collective."""
    found: list[TaskSegment] = []
    before = 0.0
    for compute, exchange, beside in segments:
        if exchange > 0:
            found.append(TaskSegment(before + compute, exchange, beside))
            before = 0.0
        else:
            before += compute + beside
    if before > 0 or not found:
        found.append(TaskSegment(before))
    return found


def computed(now: float, seconds: float, link: float, slowdown: float) -> float:
    """When what takes `seconds` and is begun `now` is done, computing being slower while the link is busy."""
    beside = max(0.0, link - now)
    if seconds * slowdown <= beside:
        return now + seconds * slowdown
    return now + seconds + beside * (1 - 1 / slowdown)


def task_time(lanes: Sequence[Sequence[TaskSegment]], *, slowdown: float = 1.0) -> TaskTime:
    """Seconds of the lanes' (`joined`) segments in turns, on one device and one link.

    `slowdown`: how much longer computing takes while a collective is under way. What is under way when a computation
    begins follows each other without a gap, so the link is busy up to the end of the last.
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
            compute, exchange, beside = segments[turn]
            now = computed(now, compute, link, slowdown)
            if exchange > 0:
                link = max(link, now) + exchange
                collectives.append((now, link))
                issued_in.append((lane, turn))
                ready[lane] = link
            now = computed(now, beside, link, slowdown)
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
