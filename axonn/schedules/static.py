"""Schedules whose order is fixed in advance. A stage waits for the input of its next task."""

from __future__ import annotations

from collections.abc import Sequence

from axonn.schedules.base import SPLIT, WHOLE, Direction, Kind, StageSchedule, Task
from axonn.schedules.layout import ChunkLayout


class StaticSchedule(StageSchedule):
    """Runs `order`, task after task (`axonn.schedules.orders` makes them)."""

    def __init__(
        self,
        *,
        stage: int,
        stages: int,
        microbatches: int,
        layout: ChunkLayout,
        order: Sequence[Task],
        kinds: tuple[Kind, ...] | None = None,
    ) -> None:
        if kinds is None:
            kinds = SPLIT if any(task.kind == Kind.INPUT for task in order) else WHOLE
        super().__init__(stage=stage, stages=stages, microbatches=microbatches, layout=layout, kinds=kinds)
        self.order = list(order)
        self._position = 0
        self._there: set[tuple[Direction, int, int]] = set()
        # Tasks of these chunks need no message of that direction; weight halves need none at all.
        chunks = range(self.chunks)
        self._unfed = {(Direction.FORWARD, c) for c in chunks if layout.is_source(stage, c)} | {
            (Direction.BACKWARD, c) for c in chunks if layout.is_sink(stage, c)
        }

    @property
    def follows_arrivals(self) -> bool:
        return False

    @property
    def limit(self) -> int:
        most = held = 0
        for task in self.order:
            held += (task.kind == Kind.FORWARD) - (task.kind == self._last_kind)
            most = max(most, held)
        return most

    def waiting_for(self) -> str:
        if self._position == len(self.order):
            return "nothing"
        task = self.order[self._position]
        direction = task.kind.sends
        origin = None if direction is None else self.layout.origin(self.stage, task.chunk, direction)
        if origin is None:
            return f"its turn to run {task}"
        what = "activation" if direction == Direction.FORWARD else "gradient"
        where = f"stage {origin[0]}" if origin[0] != self.stage else f"its own chunk {origin[1]}"
        return f"the {what} of microbatch {task.microbatch} from {where}, to run {task}"

    def arrived(self, direction: Direction, chunk: int, microbatch: int) -> None:
        self._there.add((direction, chunk, microbatch))

    def next_task(self) -> Task | None:
        if self._position == len(self.order):
            return None
        task = self.order[self._position]
        kind, chunk, microbatch = task
        if kind != Kind.WEIGHT:
            direction = Direction.FORWARD if kind == Kind.FORWARD else Direction.BACKWARD
            if (direction, chunk) not in self._unfed:
                needed = (direction, chunk, microbatch)
                if needed not in self._there:
                    return None
                self._there.remove(needed)
        if kind == Kind.FORWARD:
            self.held += 1
        self._position += 1
        return task
