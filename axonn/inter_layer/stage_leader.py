"""How the ranks of one stage come to run the same tasks in the same order.

Each of them gets its own part of every message, and the parts of one message need not arrive together. If each let its
own arrivals decide, two ranks could pick different microbatches, and meet in different collectives. So one rank, the
leader, decides by its arrivals and tells the others, who wait for their own parts of what the task needs. Telling needs
no answer: the leader goes on at once, and a rank may be told while it still runs the task before.
"""

from __future__ import annotations

from axonn.distributed.transport import Transport
from axonn.grid import TENSOR_AXES, ProcessGrid
from axonn.schedules import FollowerSchedule, Kind, StageSchedule, Task


class Agreement:
    """What the rank `rank` of `grid` does for it. `transport` may be None when there is one stage."""

    def __init__(self, grid: ProcessGrid, rank: int, transport: Transport | None) -> None:
        self._leader, *self._others = grid.group(rank, TENSOR_AXES)
        self._leads = rank == self._leader
        self._transport = transport

    def begin(self, schedule: StageSchedule) -> StageSchedule:
        """What this rank drives in a batch for which the stage has `schedule`."""
        if self._leads or not schedule.follows_arrivals:
            return schedule
        assert self._transport is not None, "a stage without others has no arrivals"
        self._transport.expect_decisions(self._leader, schedule.tasks)
        return FollowerSchedule(schedule)

    def next_task(self, schedule: StageSchedule) -> Task | None:
        """The next task of `schedule`, which is what `begin` gave; None when this rank has to wait."""
        transport = self._transport
        if transport is None or not self._others:
            return schedule.next_task()
        if isinstance(schedule, FollowerSchedule):
            for kind, chunk, microbatch in transport.told():
                schedule.tell(Task(Kind(kind), chunk, microbatch))
        task = schedule.next_task()
        if task is not None and self._leads and schedule.follows_arrivals:
            for other in self._others:
                transport.tell(other, task)
        return task
