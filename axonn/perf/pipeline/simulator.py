"""Event-driven simulation of one pipeline: the schedules that the engine runs, with a modelled clock.

Each stage computes one task at a time, whichever its schedule hands out. What a task hands to another chunk of the same
stage is there at once. To another stage it goes as a message, in one of two ways:

- asynchronous: the stage goes on at once; the messages from one stage to another follow each other, each keeps the link
  busy for its transfer time and arrives a latency later;
- blocking: the message starts once its sender has finished the task and its receiver computes nothing (a rendezvous);
  neither begins a task until it has arrived. Messages of a stage with several neighbours run side by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple

from axonn.errors import ConfigError, DeadlockError
from axonn.perf.machine.network import MessageTime
from axonn.perf.timing.task_times import TaskTime
from axonn.schedules import ChunkLayout, Direction, Kind, StageSchedule, Task
from axonn.schedules.timeline import timeline
from axonn.spans import Span, SpanKind

_TaskRow = tuple[int, Task, float, float]


class TimedMessage(NamedTuple):
    """A message: its sender, its receiver with the chunk it is for, when it was posted and had arrived (seconds)."""

    stage: int
    receiver: int
    direction: Direction
    chunk: int
    microbatch: int
    sent: float
    arrived: float


@dataclass
class Simulation:
    """What a simulated batch took. Times are seconds, lists are per stage."""

    makespan: float
    busy: list[float]
    """Computing."""
    point_to_point: list[float]
    """Idle although the message that the next task needed was under way (as in `axonn.spans.breakdown`)."""
    bubble: list[float]
    """Idle otherwise: that message was not sent yet, the stage sends what blocks it, or it is done before others."""
    ends: list[float]
    """When its last task, and the message of it that blocks, is done."""
    most_held: list[int]
    """Most (chunk, microbatch) pairs that were between their forward and the end of their backward."""
    tasks: list[_TaskRow] = field(repr=False)
    """(stage, task, start, end), in order of their start."""
    messages: list[TimedMessage] = field(repr=False)
    """Only with `record`."""

    def orders(self) -> list[list[Task]]:
        """Tasks of each stage in the order they ran."""
        orders: list[list[Task]] = [[] for _ in self.busy]
        for stage, task, _, _ in self.tasks:
            orders[stage].append(task)
        return orders

    def spans(
        self,
        *,
        first_layers: Callable[[int, int], int] | None = None,
        inside: Callable[[int, Task], TaskTime] | None = None,
        only: int | None = None,
        step: int = 0,
    ) -> list[Span]:
        """Spans as a traced run writes them (needs `record`), or those of the stage `only`; the rank is the stage.

        `first_layers(stage, chunk)` is the number of the chunk's first layer; `inside(stage, task)` says when a task
        computes and when its collectives are under way (default: it computes all the time).
        """
        spans: list[Span] = []
        free = [0.0] * len(self.busy)
        for stage, task, start, end in self.tasks:
            if only not in (None, stage):
                continue
            kind, chunk, m = task
            layer = -1 if first_layers is None else first_layers(stage, chunk)
            direction = -1 if kind.sends is None else int(kind.sends)
            if start > free[stage]:
                wait = SpanKind.RECEIVE_WAIT
                spans.append(Span(stage, wait, step, m, layer, direction, free[stage], start, chunk))
            time = None if inside is None else inside(stage, task)
            if time is None or not time.collectives:
                spans.append(Span(stage, SpanKind(kind.label), step, m, layer, direction, start, end, chunk))
            else:
                scale = (end - start) / time.total
                for what, way, intervals, turns in (
                    (SpanKind(kind.label), direction, time.computing, time.computed_in),
                    (SpanKind.TENSOR, -1, time.collectives, time.issued_in),
                ):
                    for (begin, stop), turn in zip(intervals, turns, strict=True):
                        own = layer if layer < 0 else layer + time.layer(turn)
                        when = (start + scale * begin, start + scale * stop)
                        spans.append(Span(stage, what, step, m, own, way, *when, chunk, shard=time.shard(turn)))
            free[stage] = end
        for stage, receiver, way, chunk, m, sent, arrived in self.messages:
            if only in (None, stage):
                spans.append(Span(stage, SpanKind.SEND, step, m, -1, int(way), sent, arrived, chunk, receiver))
        for stage, end in enumerate(free):
            if end < self.makespan and only in (None, stage):
                spans.append(Span(stage, SpanKind.IDLE, step, -1, -1, -1, end, self.makespan))
        return spans


def simulate(
    schedules: Sequence[StageSchedule],
    *,
    seconds: Callable[[int, Task], float],
    message: Callable[[int, int], MessageTime] | None = None,
    blocking: bool = False,
    record: bool = False,
    noise: Callable[[], float] | None = None,
) -> Simulation:
    """Run one fresh schedule object per stage to the end.

    `seconds(stage, task)` is how long a task takes, asked once per task as it starts; `message(sender, receiver)` the
    time of a message from one stage to another, asked once per pair (None: no time). `record` keeps the messages.
    `noise()`: factors by which each task and each message takes longer, one for each.
    Raises `ConfigError` unless there is one schedule per stage in order, and `DeadlockError`, with the timeline, when
    stages wait for each other.
    """
    if not schedules or [(s.stage, s.layout) for s in schedules] != [
        (stage, schedules[0].layout) for stage in range(schedules[0].stages)
    ]:
        raise ConfigError("a simulation needs the schedules of all stages of one pipeline, in order")
    run = _Run(schedules, seconds, message, record, noise)
    makespan = run.blocking() if blocking else run.asynchronous()
    waiting = [s for s in schedules if not s.done]
    if waiting:
        raise DeadlockError(_deadlock(waiting, run.tasks, makespan))
    bubble = [makespan - b - w for b, w in zip(run.busy, run.waited, strict=True)]
    return Simulation(makespan, run.busy, run.waited, bubble, run.ends, run.most_held, run.tasks, run.messages)


def _deadlock(waiting: Sequence[StageSchedule], tasks: Sequence[_TaskRow], now: float) -> str:
    lines = [
        f"stage {s.stage} has finished {s.finished_pairs} of {s.pairs} backwards and waits for {s.waiting_for()}"
        for s in waiting
    ]
    slot = min((end - start for _, _, start, end in tasks if end > start), default=1.0)
    begin = max(0.0, now - 24 * slot)
    drawn = timeline((t for t in tasks if t[2] >= begin), slot=slot, begin=begin)
    return "the pipeline is deadlocked:\n" + "\n".join(lines) + f"\nlast tasks (slots of {slot:g} s):\n{drawn}"


class _Link:
    """From one stage to another."""

    def __init__(self, time: MessageTime) -> None:
        self.latency = time.latency
        self.transfer = time.transfer
        self.free = 0.0
        """When the last message put on it has left."""


@dataclass(slots=True, eq=False)
class _Way:
    """From a chunk to the next or the one before."""

    sender: int
    receiver: int
    direction: Direction
    chunk: int
    """The receiver's."""
    link: _Link
    sent: dict[int, float]
    """When the message of a microbatch was sent."""


_WayTable = list[list[list[_Way | None]]]
"""By stage, kind of the task, and chunk."""


class _Run:
    """State of one simulation; lists are by stage.

    Events are (time, number, stage, way, task): the end of a task (way None), or the arrival at a stage of the message
    that a task sent. All events of one instant are handled before stages are asked for their next task.
    """

    def __init__(
        self,
        schedules: Sequence[StageSchedule],
        seconds: Callable[[int, Task], float],
        message: Callable[[int, int], MessageTime] | None,
        record: bool,
        noise: Callable[[], float] | None,
    ) -> None:
        n = len(schedules)
        self.schedules = schedules
        self.seconds = seconds
        self.out, self.into = _ways(schedules[0].layout, message)
        self.record = record
        self.noise = noise
        self.heap: list[tuple[float, int, int, _Way | None, Task]] = []
        self.number = 0
        self.computing = [False] * n
        self.idle_since = [0.0] * n
        self.busy = [0.0] * n
        self.waited = [0.0] * n
        self.ends = [0.0] * n
        self.most_held = [0] * n
        self.tasks: list[_TaskRow] = []
        self.messages: list[TimedMessage] = []

    def start_task(self, stage: int, now: float) -> None:
        """Ask the schedule of a free stage for its next task and start it, if there is one."""
        schedule = self.schedules[stage]
        task = schedule.next_task()
        if task is None:
            return
        begun = self.idle_since[stage]
        if now > begun:
            kind, chunk, microbatch = task
            way = self.into[stage][kind][chunk]
            since = now if way is None else way.sent.get(microbatch, now)
            self.waited[stage] += now - (since if since > begun else begun)
        taken = self.seconds(stage, task)
        end = now + (taken if self.noise is None else taken * self.noise())
        self.computing[stage] = True
        self.busy[stage] += end - now
        self.most_held[stage] = max(self.most_held[stage], schedule.held)
        self.number += 1
        heappush(self.heap, (end, self.number, stage, None, task))
        self.tasks.append((stage, task, now, end))

    def finish_task(self, stage: int, task: Task, now: float) -> _Way | None:
        """The stage's task has ended. Returns the way that its message takes, or None without one."""
        self.computing[stage] = False
        self.idle_since[stage] = self.ends[stage] = now
        schedule = self.schedules[stage]
        schedule.finished(task)
        kind, chunk, microbatch = task
        way = self.out[stage][kind][chunk]
        if way is None:
            return None
        if way.receiver == stage:
            schedule.arrived(way.direction, way.chunk, microbatch)
            return None
        way.sent[microbatch] = now
        return way

    def put_under_way(self, way: _Way, task: Task, posted: float, arrival: float) -> None:
        """Let a message arrive."""
        self.number += 1
        heappush(self.heap, (arrival, self.number, way.receiver, way, task))
        if self.record:
            microbatch = task[2]
            self.messages.append(
                TimedMessage(way.sender, way.receiver, way.direction, way.chunk, microbatch, posted, arrival)
            )

    def asynchronous(self) -> float:
        """Messages beside computation. Returns the time of the last event."""
        heap, computing, schedules = self.heap, self.computing, self.schedules
        now = 0.0
        touched = set(range(len(schedules)))
        while True:
            for stage in touched:
                if not computing[stage]:
                    self.start_task(stage, now)
            if not heap:
                return now
            touched.clear()
            now = heap[0][0]
            while heap and heap[0][0] == now:
                _, _, stage, way, task = heappop(heap)
                touched.add(stage)
                if way is not None:
                    schedules[stage].arrived(way.direction, way.chunk, task[2])
                    continue
                way = self.finish_task(stage, task, now)
                if way is not None:
                    link = way.link
                    factor = 1.0 if self.noise is None else self.noise()
                    link.free = (now if now > link.free else link.free) + factor * link.transfer
                    self.put_under_way(way, task, now, link.free + factor * link.latency)

    def blocking(self) -> float:
        """Messages that occupy both ends. Returns the time of the last event."""
        heap, computing, schedules = self.heap, self.computing, self.schedules
        n = len(schedules)
        engaged = [0] * n
        posted: list[tuple[_Way, Task, float] | None] = [None] * n
        senders = [{way.sender for ways in kinds for way in ways if way is not None} for kinds in self.into]
        now = 0.0
        touched = set(range(n))
        while True:
            # A stage that stopped computing can now receive what its neighbours have posted, and send its own.
            for sender in touched.union(*(senders[stage] for stage in touched)):
                message = posted[sender]
                if message is None or computing[message[0].receiver]:
                    continue
                way, task, since = message
                posted[sender] = None
                engaged[sender] += 1
                engaged[way.receiver] += 1
                factor = 1.0 if self.noise is None else self.noise()
                self.put_under_way(way, task, since, now + factor * (way.link.latency + way.link.transfer))
            for stage in touched:
                if not computing[stage] and not engaged[stage] and posted[stage] is None:
                    self.start_task(stage, now)
            if not heap:
                return now
            touched.clear()
            now = heap[0][0]
            while heap and heap[0][0] == now:
                _, _, stage, arrived, task = heappop(heap)
                touched.add(stage)
                if arrived is None:
                    way_out = self.finish_task(stage, task, now)
                    posted[stage] = None if way_out is None else (way_out, task, now)
                else:
                    touched.add(arrived.sender)
                    self.ends[arrived.sender] = now
                    engaged[stage] -= 1
                    engaged[arrived.sender] -= 1
                    schedules[stage].arrived(arrived.direction, arrived.chunk, task[2])


def _ways(layout: ChunkLayout, message: Callable[[int, int], MessageTime] | None) -> tuple[_WayTable, _WayTable]:
    """The ways that results of tasks take, and the ways on which their inputs come; none past the network's ends."""
    links: dict[tuple[int, int], _Link] = {}

    def link(sender: int, receiver: int) -> _Link:
        if (sender, receiver) not in links:
            none = message is None or sender == receiver
            links[sender, receiver] = _Link(
                MessageTime(0.0, 0.0) if none or message is None else message(sender, receiver)
            )
        return links[sender, receiver]

    stages, chunks = range(layout.stages), range(layout.chunks)
    out: _WayTable = [[[None for _ in chunks] for _ in Kind] for _ in stages]
    into: _WayTable = [[[None for _ in chunks] for _ in Kind] for _ in stages]
    for stage, chunk, direction in itertools.product(stages, chunks, Direction):
        target = layout.target(stage, chunk, direction)
        if target is None:
            continue
        way = _Way(stage, target[0], direction, target[1], link(stage, target[0]), {})
        for kind in Kind:
            if kind.sends == direction:
                out[stage][kind][chunk] = way
                into[target[0]][kind][target[1]] = way
    return out, into
