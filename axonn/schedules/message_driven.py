"""Message-driven scheduling: whichever message arrives decides what a stage runs.

Algorithm 1 and 2 of Singh & Bhatele, IPDPS 2022 (arXiv 2110.13005): stage 0 starts `in_flight_limit` forwards and
injects one more per finished backward; every other stage runs a forward for a message from the previous stage and a
backward for one from the next, the backward first when both are ready; the last stage runs each backward right after
its forward. Several chunks of layers per stage, and backwards in two halves, are our extensions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from axonn.schedules.base import SPLIT, WHOLE, Direction, Kind, StageSchedule, Task
from axonn.schedules.layout import ChunkLayout

PICKS = ("backward-first", "forward-first", "arrival-order")
"""Rules by which one of several ready tasks is picked."""

_UNBOUNDED = 1 << 60
"""Above every key and every number of tasks."""


class MessageDriven(StageSchedule):
    """The schedule AxoNN is named for; with split backwards, message-driven zero bubble.

    `pick` is one of `PICKS`, or tasks in an order: then the ready task that comes first in it is picked. In the
    "-first" rules the oldest microbatch goes first among tasks of one kind, in its deepest chunk. Weight halves, which
    nobody waits for, run when nothing else may (unless `pick` is an order and has them earlier).

    Whole backwards: at most `in_flight_limit` (L) microbatches are in flight, counted on the stage with the inputs.
    Split backwards: L is a budget of activations, which are held until the weight half is done. A stage with v chunks
    holds at most L v of them; a chunk's forwards leave one place for each deeper chunk, so that a microbatch under way
    can always go on. Since a microbatch holds its chunks one after the other, 2 v / (v + 1) times L are in flight.
    """

    def __init__(
        self,
        *,
        stage: int,
        stages: int,
        microbatches: int,
        layout: ChunkLayout,
        in_flight_limit: int,
        pick: str | Sequence[Task] = "backward-first",
        splits_backward: bool = False,
    ) -> None:
        kinds = SPLIT if splits_backward else WHOLE
        super().__init__(stage=stage, stages=stages, microbatches=microbatches, layout=layout, kinds=kinds)
        if in_flight_limit < 1:
            raise ValueError(f"the in-flight limit must be at least 1, not {in_flight_limit}")
        chunks = self.chunks
        self._limit = min(in_flight_limit, microbatches) * chunks
        self._most_in_flight = -(-2 * chunks * in_flight_limit // (chunks + 1)) if splits_backward else in_flight_limit
        self._source = next((c for c in range(chunks) if layout.is_source(stage, c)), None)
        self._sink = next((c for c in range(chunks) if layout.is_sink(stage, c)), None)
        self._backward = Kind.INPUT if splits_backward else Kind.BACKWARD
        key = self._keys(pick)
        self._counts = pick == "arrival-order"
        # By kind and chunk: a task with its key for every microbatch, and of these the ones that are ready. In a queue
        # keys only grow, since microbatches come in order. Its tasks may run while the stage holds less than `room`.
        self._entries = {
            (kind, chunk): [(key(task), task) for task in (Task(kind, chunk, m) for m in range(microbatches))]
            for kind in kinds
            for chunk in range(chunks)
        }
        self._ready = {which: deque[tuple[int, Task]]() for which in self._entries}
        rooms = [in_flight_limit * chunks - deeper for deeper in reversed(range(chunks))]
        self._queues = [
            (rooms[chunk] if kind == Kind.FORWARD else _UNBOUNDED, queue)
            for (kind, chunk), queue in self._ready.items()
        ]
        self._made_ready = 0
        self._injected = 0
        self._in_flight = 0
        self._inject()

    @property
    def limit(self) -> int:
        return self._limit

    @property
    def follows_arrivals(self) -> bool:
        # Whatever the rule, it picks among what is there by then. A single stage has no messages.
        return self.stages > 1

    def arrived(self, direction: Direction, chunk: int, microbatch: int) -> None:
        self._add(self._backward if direction else Kind.FORWARD, chunk, microbatch)

    def next_task(self) -> Task | None:
        best = None
        lowest = _UNBOUNDED
        held = self.held
        for room, queue in self._queues:
            if queue and held < room and queue[0][0] < lowest:
                best = queue
                lowest = queue[0][0]
        if best is None:
            return None
        _, task = best.popleft()
        kind, chunk, microbatch = task
        if kind == Kind.INPUT:
            self._add(Kind.WEIGHT, chunk, microbatch)
        elif kind == Kind.FORWARD:
            self.held += 1
            if chunk == self._source:
                self._inject()
            if chunk == self._sink:
                self._add(self._backward, chunk, microbatch)
        return task

    def finished(self, task: Task) -> None:
        super().finished(task)
        if task[0] == self._backward and task[1] == self._source:
            self._in_flight -= 1
            self._inject()

    def _inject(self) -> None:
        """Make the source's next forward ready, unless one is ready or as many microbatches as allowed are in flight.

        Ready counts as in flight.
        """
        if self._source is None or self._injected == self.microbatches or self._ready[Kind.FORWARD, self._source]:
            return
        if self._in_flight < self._most_in_flight:
            self._in_flight += 1
            self._injected += 1
            self._add(Kind.FORWARD, self._source, self._injected - 1)

    def _add(self, kind: Kind, chunk: int, microbatch: int) -> None:
        entry = self._entries[kind, chunk][microbatch]
        if self._counts:
            self._made_ready += 1
            entry = (entry[0] + self._made_ready, entry[1])
        self._ready[kind, chunk].append(entry)

    def _keys(self, pick: str | Sequence[Task]) -> Callable[[Task], int]:
        """What is picked by: the ready task with the smallest key runs."""
        if not isinstance(pick, str):
            places = {task: place for place, task in enumerate(pick)}
            return places.__getitem__
        # Of three classes; inside a class by age, or by arrival (`_add` counts on).
        size = self.chunks * self.microbatches if pick != "arrival-order" else 1 << 40

        def key(task: Task) -> int:
            kind, chunk, microbatch = task
            if kind == Kind.WEIGHT:
                late = 2
            elif pick == "arrival-order":
                # What the stage injects by itself comes after everything that arrived.
                late = int(kind == Kind.FORWARD and chunk == self._source)
            else:
                late = int((kind == Kind.FORWARD) != (pick == "forward-first"))
            age = 0 if pick == "arrival-order" else microbatch * self.chunks + self.chunks - 1 - chunk
            return late * size + age

        return key
