"""Event-driven simulation of one pipeline: the schedules that the engine runs, with a modelled clock.

Each stage computes one task at a time, whichever its schedule hands out. A finished forward sends a message to the next
stage, a finished backward to the previous one, in one of two ways:

- asynchronous: the stage goes on at once; the messages of an edge and direction follow each other, each keeps the link
  busy for its transfer time and arrives a latency later;
- blocking: the message starts once its sender has finished the task and its receiver computes nothing (a rendezvous);
  neither begins a task until it has arrived. Messages of a stage with both neighbours run side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple

from axonn.errors import ConfigError, DeadlockError
from axonn.perf.network import MessageTime
from axonn.schedules import Direction, Kind, StageSchedule, Task
from axonn.schedules.timeline import timeline
from axonn.trace import Span, SpanKind

_TaskRow = tuple[int, Task, float, float]


class TimedMessage(NamedTuple):
    """A message: its sender, when it was posted and when it had arrived (seconds)."""

    stage: int
    direction: Direction
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
    """Idle although the message that the next task needed was under way (as in `axonn.trace.breakdown`)."""
    bubble: list[float]
    """Idle otherwise: that message was not sent yet, the stage sends what blocks it, or it is done before others."""
    most_held: list[int]
    """Most microbatches that were between their forward and the end of their backward."""
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

    def spans(self, *, first_layers: Sequence[int] | None = None, step: int = 0) -> list[Span]:
        """Spans as a traced run writes them (needs `record`); the rank is the stage."""
        spans: list[Span] = []
        free = [0.0] * len(self.busy)
        for stage, task, start, end in self.tasks:
            layer, way = (-1 if first_layers is None else first_layers[stage]), int(task.kind)
            if start > free[stage]:
                wait = SpanKind.RECEIVE_WAIT
                spans.append(Span(stage, wait, step, task.microbatch, layer, way, free[stage], start))
            kind = SpanKind.FORWARD if task.kind == Kind.FORWARD else SpanKind.BACKWARD
            spans.append(Span(stage, kind, step, task.microbatch, layer, way, start, end))
            free[stage] = end
        for m in self.messages:
            spans.append(Span(m.stage, SpanKind.SEND, step, m.microbatch, -1, int(m.direction), m.sent, m.arrived))
        for stage, end in enumerate(free):
            if end < self.makespan:
                spans.append(Span(stage, SpanKind.IDLE, step, -1, -1, -1, end, self.makespan))
        return spans

    def peers(self) -> dict[tuple[int, int], int]:
        """`peer_of` for `axonn.trace.breakdown`: who sends to (stage, direction)."""
        stages = range(len(self.busy))
        forward = {(s, int(Direction.FORWARD)): s - 1 for s in stages[1:]}
        return forward | {(s, int(Direction.BACKWARD)): s + 1 for s in stages[:-1]}


def simulate(
    schedules: Sequence[StageSchedule],
    *,
    forward: Sequence[float],
    backward: Sequence[float],
    messages_forward: Sequence[MessageTime] | None = None,
    messages_backward: Sequence[MessageTime] | None = None,
    blocking: bool = False,
    record: bool = False,
) -> Simulation:
    """Run one fresh schedule object per stage to the end.

    `forward` and `backward` are seconds per task of each stage. `messages_forward[i]` is the message from stage i to
    i + 1, `messages_backward[i]` the one from i + 1 to i; without them messages take no time. Raises `ConfigError` for
    lists of wrong lengths and `DeadlockError`, with the timeline, when stages wait for each other.
    """
    n = len(schedules)
    instant = [MessageTime(0.0, 0.0)] * (n - 1)
    down = instant if messages_forward is None else list(messages_forward)
    up = instant if messages_backward is None else list(messages_backward)
    if n == 0 or len(forward) != n or len(backward) != n or len(down) != n - 1 or len(up) != n - 1:
        raise ConfigError(
            f"{n} stages need {n} forward and backward times and {n - 1} message times per direction, not "
            f"{len(forward)}, {len(backward)}, {len(down)}, {len(up)}"
        )
    run = _Run(schedules, (list(forward), list(backward)), ([*down, None], [None, *up]), record)
    makespan = run.blocking() if blocking else run.asynchronous()
    waiting = [s for s in schedules if not s.done]
    if waiting:
        raise DeadlockError(_deadlock(waiting, run.tasks, makespan))
    bubble = [makespan - b - w for b, w in zip(run.busy, run.waited, strict=True)]
    return Simulation(makespan, run.busy, run.waited, bubble, run.most_held, run.tasks, run.messages)


def _deadlock(waiting: Sequence[StageSchedule], tasks: Sequence[_TaskRow], now: float) -> str:
    lines = [
        f"stage {s.stage} has finished {s.backwards_finished} of {s.microbatches} microbatches and waits for "
        f"{s.waiting_for()}"
        for s in waiting
    ]
    slot = min((end - start for _, _, start, end in tasks if end > start), default=1.0)
    begin = max(0.0, now - 24 * slot)
    drawn = timeline((t for t in tasks if t[2] >= begin), slot=slot, begin=begin)
    return "the pipeline is deadlocked:\n" + "\n".join(lines) + f"\nlast tasks (slots of {slot:g} s):\n{drawn}"


class _Run:
    """State of one simulation; lists are by stage, pairs by direction (which is also the kind of the task).

    Events are (time, number, stage, task, ended): the end of a task, or the arrival at a stage of the message that a
    neighbour's task sent. All events of one instant are handled before stages are asked for their next task.
    """

    def __init__(
        self,
        schedules: Sequence[StageSchedule],
        seconds: tuple[list[float], list[float]],
        messages: tuple[list[MessageTime | None], list[MessageTime | None]],
        record: bool,
    ) -> None:
        n = len(schedules)
        self.schedules = schedules
        self.seconds = seconds
        # By direction and sender; 0 for the outward ends of the pipeline, which send nothing.
        self.latency = [[m.latency if m else 0.0 for m in way] for way in messages]
        self.transfer = [[m.transfer if m else 0.0 for m in way] for way in messages]
        self.record = record
        self.heap: list[tuple[float, int, int, Task, bool]] = []
        self.number = 0
        self.computing = [False] * n
        self.idle_since = [0.0] * n
        self.sent: list[list[dict[int, float]]] = [[{} for _ in range(n)] for _ in range(2)]
        self.busy = [0.0] * n
        self.waited = [0.0] * n
        self.most_held = [0] * n
        self.tasks: list[_TaskRow] = []
        self.messages: list[TimedMessage] = []

    def start_task(self, stage: int, now: float) -> None:
        """Ask the schedule of a free stage for its next task and start it, if there is one."""
        schedule = self.schedules[stage]
        task = schedule.next_task()
        if task is None:
            return
        kind = task[0]
        begun = self.idle_since[stage]
        if now > begun:
            since = self.sent[kind][stage].get(task[2], now)
            self.waited[stage] += now - (since if since > begun else begun)
        end = now + self.seconds[kind][stage]
        self.computing[stage] = True
        self.busy[stage] += end - now
        self.most_held[stage] = max(self.most_held[stage], schedule.held)
        self.number += 1
        heappush(self.heap, (end, self.number, stage, task, True))
        self.tasks.append((stage, task, now, end))

    def finish_task(self, stage: int, task: Task, now: float) -> int | None:
        """The stage's task has ended. Returns the stage to send a message to, or None."""
        self.computing[stage] = False
        self.idle_since[stage] = now
        self.schedules[stage].finished(task)
        kind = task[0]
        peer = stage - 1 if kind else stage + 1
        if not 0 <= peer < len(self.schedules):
            return None
        self.sent[kind][peer][task[2]] = now
        return peer

    def asynchronous(self) -> float:
        """Messages beside computation. Returns the time of the last event."""
        heap, computing, schedules = self.heap, self.computing, self.schedules
        link_free = [[0.0] * len(schedules) for _ in range(2)]
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
                _, _, stage, task, ended = heappop(heap)
                touched.add(stage)
                kind, chunk, microbatch = task
                if not ended:
                    schedules[stage].arrived(Direction(kind), chunk, microbatch)
                    continue
                peer = self.finish_task(stage, task, now)
                if peer is None:
                    continue
                start = link_free[kind][stage]
                free = (start if start > now else now) + self.transfer[kind][stage]
                link_free[kind][stage] = free
                self.number += 1
                arrival = free + self.latency[kind][stage]
                heappush(heap, (arrival, self.number, peer, task, False))
                if self.record:
                    self.messages.append(TimedMessage(stage, Direction(kind), microbatch, now, arrival))

    def blocking(self) -> float:
        """Messages that occupy both ends. Returns the time of the last event."""
        heap, computing, schedules = self.heap, self.computing, self.schedules
        n = len(schedules)
        engaged = [0] * n
        posted: list[tuple[int, Task, float] | None] = [None] * n
        now = 0.0
        touched = set(range(n))
        while True:
            # A stage that stopped computing can now receive what its neighbours have posted, and send its own.
            for sender in {s + d for s in touched for d in (-1, 0, 1) if 0 <= s + d < n}:
                message = posted[sender]
                if message is None or computing[message[0]]:
                    continue
                peer, task, since = message
                posted[sender] = None
                engaged[sender] += 1
                engaged[peer] += 1
                kind = task[0]
                self.number += 1
                arrival = now + self.latency[kind][sender] + self.transfer[kind][sender]
                heappush(heap, (arrival, self.number, peer, task, False))
                if self.record:
                    self.messages.append(TimedMessage(sender, Direction(kind), task[2], since, arrival))
            for stage in touched:
                if not computing[stage] and not engaged[stage] and posted[stage] is None:
                    self.start_task(stage, now)
            if not heap:
                return now
            touched.clear()
            now = heap[0][0]
            while heap and heap[0][0] == now:
                _, _, stage, task, ended = heappop(heap)
                touched.add(stage)
                if ended:
                    to = self.finish_task(stage, task, now)
                    posted[stage] = None if to is None else (to, task, now)
                else:
                    sender = stage + (1 if task[0] else -1)
                    touched.add(sender)
                    engaged[stage] -= 1
                    engaged[sender] -= 1
                    schedules[stage].arrived(Direction(task[0]), task[1], task[2])
