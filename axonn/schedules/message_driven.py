"""Message-driven scheduling: whichever message arrives decides what a stage runs.

Algorithm 1 and 2 of Singh & Bhatele, IPDPS 2022 (arXiv 2110.13005): stage 0 starts `in_flight_limit` forwards and
injects one more per finished backward; every other stage runs a forward for a message from the previous stage and a
backward for one from the next, the backward first when both are ready; the last stage runs each backward right after
its forward.
"""

from __future__ import annotations

from collections import deque
from typing import Literal

from axonn.schedules.base import Direction, Kind, StageSchedule, Task

PickRule = Literal["backward-first", "forward-first", "arrival-order"]


class MessageDriven(StageSchedule):
    """The schedule AxoNN is named for.

    `in_flight_limit` is the number of microbatches in flight per pipeline; `pick` says which of two ready tasks runs.
    """

    def __init__(
        self, *, stage: int, stages: int, microbatches: int, in_flight_limit: int, pick: PickRule = "backward-first"
    ) -> None:
        super().__init__(stage=stage, stages=stages, microbatches=microbatches)
        if in_flight_limit < 1:
            raise ValueError(f"the in-flight limit must be at least 1, not {in_flight_limit}")
        self._limit = min(in_flight_limit, microbatches)
        self._pick = pick
        # The last stage's own backwards count as ready: with backward-first they follow their forward at once.
        self._ready: tuple[deque[int], deque[int]] = (deque(), deque())
        self._order: deque[Direction] = deque()
        self._to_inject = microbatches if self.first else 0
        self._tasks = tuple(tuple(Task(kind, 0, m) for m in range(microbatches)) for kind in Kind)

    @property
    def limit(self) -> int:
        return self._limit

    def arrived(self, direction: Direction, chunk: int, microbatch: int) -> None:
        self._ready[direction].append(microbatch)
        if self._pick == "arrival-order":
            self._order.append(direction)

    def next_task(self) -> Task | None:
        forwards, backwards = self._ready
        # Stage 0 has no messages from before: a forward is ready whenever the limit leaves room.
        injectable = self._to_inject > 0 and self.held < self._limit
        if self._pick == "backward-first":
            backward = bool(backwards)
        elif self._pick == "forward-first":
            backward = bool(backwards) and not (forwards or injectable)
        else:
            backward = bool(self._order) and self._order[0] == Direction.BACKWARD
        if backward:
            microbatch = backwards.popleft()
            self._forget(Direction.BACKWARD)
            return self._tasks[Kind.BACKWARD][microbatch]
        if injectable:
            microbatch = self.microbatches - self._to_inject
            self._to_inject -= 1
        elif forwards:
            microbatch = forwards.popleft()
            self._forget(Direction.FORWARD)
        else:
            return None
        self.held += 1
        if self.last:
            self.arrived(Direction.BACKWARD, 0, microbatch)
        return self._tasks[Kind.FORWARD][microbatch]

    def _forget(self, direction: Direction) -> None:
        if self._pick == "arrival-order":
            self._order.remove(direction)
