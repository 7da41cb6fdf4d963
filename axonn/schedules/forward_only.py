"""Evaluation: forwards only."""

from __future__ import annotations

from collections import deque

from axonn.schedules.base import Direction, Kind, StageSchedule, Task
from axonn.schedules.layout import ChunkLayout


class Forwards(StageSchedule):
    """Runs forwards in the order in which their activations arrive; microbatches that begin here come after these."""

    def __init__(self, *, stage: int, stages: int, microbatches: int, layout: ChunkLayout) -> None:
        kinds = (Kind.FORWARD,)
        super().__init__(stage=stage, stages=stages, microbatches=microbatches, layout=layout, kinds=kinds)
        self._arrived: deque[Task] = deque()
        source = [chunk for chunk in range(self.chunks) if layout.is_source(stage, chunk)]
        self._to_begin = deque(Task(Kind.FORWARD, chunk, m) for chunk in source for m in range(microbatches))

    @property
    def follows_arrivals(self) -> bool:
        # The microbatches of one chunk come in their order.
        return self.stages > 1 and self.chunks > 1

    @property
    def limit(self) -> int:
        return 1

    def arrived(self, direction: Direction, chunk: int, microbatch: int) -> None:
        self._arrived.append(Task(Kind.FORWARD, chunk, microbatch))

    def next_task(self) -> Task | None:
        ready = self._arrived or self._to_begin
        if not ready:
            return None
        self.held += 1
        return ready.popleft()
