"""Event-driven simulation of one pipeline: the engine's own schedules, with a modelled clock.

Each stage computes one task at a time, chosen by its schedule. The output of a task reaches another chunk of the same
stage immediately, and another stage as a message, in one of two modes:

- asynchronous: the stage continues at once. The messages from one stage to another are serialized; each occupies the
  link for its transfer time and arrives one latency later;
- blocking: the message starts when its sender has finished the task and its receiver computes nothing (a rendezvous);
  neither begins a task until it has arrived. A stage exchanges messages with several neighbours concurrently.
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
    """A message: sender, receiver and the receiver's chunk, and the times of sending and arrival in seconds."""

    stage: int
    receiver: int
    direction: Direction
    chunk: int
    microbatch: int
    sent: float
    arrived: float


@dataclass
class Simulation:
    """Result of the simulation of one batch. Times are in seconds, lists are per stage."""

    makespan: float
    busy: list[float]
    """Time spent computing."""
    point_to_point: list[float]
    """Idle time while the message that the next task needed was in flight (as in `axonn.spans.breakdown`)."""
    bubble: list[float]
    """Other idle time: that message was not yet sent, a blocking send of the stage's own, or the end of the batch."""
    ends: list[float]
    """End of the last task, and of its message if that blocks."""
    most_held: list[int]
    """Largest number of (chunk, microbatch) pairs between their forward and the end of their backward."""
    tasks: list[_TaskRow] = field(repr=False)
    """(stage, task, start, end), in order of start."""
    messages: list[TimedMessage] = field(repr=False)
    """Messages, if `record` was set."""

    def orders(self) -> list[list[Task]]:
        """Return the tasks of each stage in execution order."""
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
        """Return spans like those of a traced run (needs `record`), or those of stage `only`; the rank is the stage.

        `first_layers(stage, chunk)`: number of the chunk's first layer. `inside(stage, task)`: the intervals in which a
        task computes, and in which its collectives run (default: it computes all the time).
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
                for span_kind, span_direction, intervals, turns in (
                    (SpanKind(kind.label), direction, time.computing, time.computed_in),
                    (SpanKind.TENSOR, -1, time.collectives, time.issued_in),
                ):
                    for (begin, stop), turn in zip(intervals, turns, strict=True):
                        spans.append(
                            Span(
                                stage,
                                span_kind,
                                step,
                                m,
                                layer if layer < 0 else layer + time.layer(turn),
                                span_direction,
                                start + scale * begin,
                                start + scale * stop,
                                chunk,
                                shard=time.shard(turn),
                            )
                        )
            free[stage] = end
        for stage, receiver, sent_in, chunk, m, sent, arrived in self.messages:
            if only in (None, stage):
                spans.append(Span(stage, SpanKind.SEND, step, m, -1, int(sent_in), sent, arrived, chunk, receiver))
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
    """Run one new schedule object per stage to the end.

    `seconds(stage, task)`: duration of a task, called once per task as it starts. `message(sender, receiver)`: time of
    a message from one stage to another, called once per pair (None: messages take no time). `record`: keep messages.
    `noise()`: factor on the duration of each task and each message, called once for each.
    Raises `ConfigError` unless there is one schedule per stage, in order, and `DeadlockError`, with the timeline, when
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
    """The link from one stage to another."""

    def __init__(self, time: MessageTime) -> None:
        self.latency = time.latency
        self.transfer = time.transfer
        self.free = 0.0
        """Time at which its last message has left."""


@dataclass(slots=True, eq=False)
class _Route:
    """The route of messages from a chunk to the next or the previous one."""

    sender: int
    receiver: int
    direction: Direction
    chunk: int
    """Chunk of the receiver."""
    link: _Link
    sent: dict[int, float]
    """Send time of the message of each microbatch."""


_RouteTable = list[list[list[_Route | None]]]
"""Routes by stage, kind of the task, and chunk."""


class _Run:
    """State of one simulation; lists are per stage.

    Events are (time, number, stage, route, task): the end of a task (route None), or the arrival at a stage of the
    message that a task sent. All simultaneous events are handled before stages choose their next task.
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
        self.out, self.into = _routes(schedules[0].layout, message)
        self.record = record
        self.noise = noise
        self.heap: list[tuple[float, int, int, _Route | None, Task]] = []
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
        """Start the next task of a free stage, if its schedule has one ready."""
        schedule = self.schedules[stage]
        task = schedule.next_task()
        if task is None:
            return
        begun = self.idle_since[stage]
        if now > begun:
            kind, chunk, microbatch = task
            route = self.into[stage][kind][chunk]
            since = now if route is None else route.sent.get(microbatch, now)
            self.waited[stage] += now - (since if since > begun else begun)
        taken = self.seconds(stage, task)
        end = now + (taken if self.noise is None else taken * self.noise())
        self.computing[stage] = True
        self.busy[stage] += end - now
        self.most_held[stage] = max(self.most_held[stage], schedule.held)
        self.number += 1
        heappush(self.heap, (end, self.number, stage, None, task))
        self.tasks.append((stage, task, now, end))

    def finish_task(self, stage: int, task: Task, now: float) -> _Route | None:
        """End the task of a stage and return the route of its message, or None if it sends none."""
        self.computing[stage] = False
        self.idle_since[stage] = self.ends[stage] = now
        schedule = self.schedules[stage]
        schedule.finished(task)
        kind, chunk, microbatch = task
        route = self.out[stage][kind][chunk]
        if route is None:
            return None
        if route.receiver == stage:
            schedule.arrived(route.direction, route.chunk, microbatch)
            return None
        route.sent[microbatch] = now
        return route

    def send(self, route: _Route, task: Task, sent: float, arrival: float) -> None:
        """Schedule the arrival of a message."""
        self.number += 1
        heappush(self.heap, (arrival, self.number, route.receiver, route, task))
        if self.record:
            microbatch = task[2]
            self.messages.append(
                TimedMessage(route.sender, route.receiver, route.direction, route.chunk, microbatch, sent, arrival)
            )

    def asynchronous(self) -> float:
        """Run with messages that overlap computation; return the time of the last event."""
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
                _, _, stage, route, task = heappop(heap)
                touched.add(stage)
                if route is not None:
                    schedules[stage].arrived(route.direction, route.chunk, task[2])
                    continue
                route = self.finish_task(stage, task, now)
                if route is not None:
                    link = route.link
                    factor = 1.0 if self.noise is None else self.noise()
                    link.free = (now if now > link.free else link.free) + factor * link.transfer
                    self.send(route, task, now, link.free + factor * link.latency)

    def blocking(self) -> float:
        """Run with messages that occupy sender and receiver; return the time of the last event."""
        heap, computing, schedules = self.heap, self.computing, self.schedules
        n = len(schedules)
        engaged = [0] * n
        posted: list[tuple[_Route, Task, float] | None] = [None] * n
        senders = [{route.sender for routes in kinds for route in routes if route is not None} for kinds in self.into]
        now = 0.0
        touched = set(range(n))
        while True:
            # A stage that stopped computing can now receive what its neighbours have posted, and send its own message.
            for sender in touched.union(*(senders[stage] for stage in touched)):
                message = posted[sender]
                if message is None or computing[message[0].receiver]:
                    continue
                route, task, since = message
                posted[sender] = None
                engaged[sender] += 1
                engaged[route.receiver] += 1
                factor = 1.0 if self.noise is None else self.noise()
                self.send(route, task, since, now + factor * (route.link.latency + route.link.transfer))
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
                    route_out = self.finish_task(stage, task, now)
                    posted[stage] = None if route_out is None else (route_out, task, now)
                else:
                    touched.add(arrived.sender)
                    self.ends[arrived.sender] = now
                    engaged[stage] -= 1
                    engaged[arrived.sender] -= 1
                    schedules[stage].arrived(arrived.direction, arrived.chunk, task[2])


def _routes(layout: ChunkLayout, message: Callable[[int, int], MessageTime] | None) -> tuple[_RouteTable, _RouteTable]:
    """Return the routes of the outputs and of the inputs of tasks; None past the ends of the network."""
    links: dict[tuple[int, int], _Link] = {}

    def link(sender: int, receiver: int) -> _Link:
        if (sender, receiver) not in links:
            instant = MessageTime(0.0, 0.0)
            time = instant if message is None or sender == receiver else message(sender, receiver)
            links[sender, receiver] = _Link(time)
        return links[sender, receiver]

    stages, chunks = range(layout.stages), range(layout.chunks)
    out: _RouteTable = [[[None for _ in chunks] for _ in Kind] for _ in stages]
    into: _RouteTable = [[[None for _ in chunks] for _ in Kind] for _ in stages]
    for stage, chunk, direction in itertools.product(stages, chunks, Direction):
        target = layout.target(stage, chunk, direction)
        if target is None:
            continue
        route = _Route(stage, target[0], direction, target[1], link(stage, target[0]), {})
        for kind in Kind:
            if kind.sends == direction:
                out[stage][kind][chunk] = route
                into[target[0]][kind][target[1]] = route
    return out, into
