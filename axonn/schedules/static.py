"""Schedules whose order is fixed in advance: GPipe and 1F1B. A stage waits for the input of its next task."""

from __future__ import annotations

from collections.abc import Sequence

from axonn.schedules.base import Direction, Kind, StageSchedule, Task


class StaticSchedule(StageSchedule):
    """Runs `order`, task after task."""

    def __init__(self, *, stage: int, stages: int, microbatches: int, order: Sequence[Task]) -> None:
        super().__init__(stage=stage, stages=stages, microbatches=microbatches)
        self.order = tuple(order)
        self._position = 0
        self._there: tuple[set[int], set[int]] = (set(), set())

    @property
    def limit(self) -> int:
        most = held = 0
        for task in self.order:
            held += 1 if task.kind == Kind.FORWARD else -1
            most = max(most, held)
        return most

    def waiting_for(self) -> str:
        if self._position == len(self.order):
            return "nothing"
        task = self.order[self._position]
        what, stage = ("activation", self.stage - 1) if task.kind == Kind.FORWARD else ("gradient", self.stage + 1)
        return f"the {what} of microbatch {task.microbatch} from stage {stage}, to run {task}"

    def arrived(self, direction: Direction, chunk: int, microbatch: int) -> None:
        self._there[direction].add(microbatch)

    def next_task(self) -> Task | None:
        if self._position == len(self.order):
            return None
        task = self.order[self._position]
        kind, _, microbatch = task
        forward = kind == Kind.FORWARD
        if not (self.first if forward else self.last):
            there = self._there[kind]
            if microbatch not in there:
                return None
            there.remove(microbatch)
        if forward:
            self.held += 1
        self._position += 1
        return task


def gpipe_order(microbatches: int) -> list[Task]:
    """All forwards, then all backwards (Huang et al., GPipe, NeurIPS 2019)."""
    return [Task(kind, 0, m) for kind in Kind for m in range(microbatches)]


def one_f_one_b_order(stage: int, stages: int, microbatches: int) -> list[Task]:
    """Warm-up forwards, then one forward and one backward in turn (PipeDream-Flush: Narayanan et al., SC 2021)."""
    warmup = min(microbatches, stages - 1 - stage)
    order = [Task(Kind.FORWARD, 0, m) for m in range(warmup)]
    for m in range(microbatches - warmup):
        order += [Task(Kind.FORWARD, 0, warmup + m), Task(Kind.BACKWARD, 0, m)]
    order += [Task(Kind.BACKWARD, 0, m) for m in range(microbatches - warmup, microbatches)]
    return order
