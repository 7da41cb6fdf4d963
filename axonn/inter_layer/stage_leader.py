"""Agreement of the ranks of one stage on the same tasks in the same order: one of them, the leader, decides.

Each rank of a stage receives its own shard of every message, and the shards of one message need not arrive at the same
time. If each rank followed its own arrivals, two ranks could pick different microbatches and meet in different
collectives. So the leader decides by its arrivals and sends its decision to the others, who wait for their own shards
of what the task needs. Decisions need no reply: the leader goes on at once, and a rank may receive one while it still
runs the previous task.
"""

from __future__ import annotations

from axonn.distributed.transport import Transport
from axonn.grid import TENSOR_AXES, ProcessGrid
from axonn.schedules import FollowerSchedule, Kind, StageSchedule, Task


class StageCoordinator:
    """The part of rank `rank` of `grid` in its stage's agreement. `transport` may be None when there is one stage."""

    def __init__(self, grid: ProcessGrid, rank: int, transport: Transport | None) -> None:
        self._leader, *self._followers = grid.group(rank, TENSOR_AXES)
        self._leads = rank == self._leader
        self._transport = transport

    def begin(self, schedule: StageSchedule) -> StageSchedule:
        """Return the schedule that this rank drives in a batch for which the stage has `schedule`."""
        if self._leads or not schedule.follows_arrivals:
            return schedule
        assert self._transport is not None, "a stage without others has no arrivals"
        self._transport.expect_decisions(self._leader, schedule.tasks)
        return FollowerSchedule(schedule)

    def next_task(self, schedule: StageSchedule) -> Task | None:
        """Return the next task of `schedule`, as `begin` returned it; None when this rank has to wait."""
        transport = self._transport
        if transport is None or not self._followers:
            return schedule.next_task()
        if isinstance(schedule, FollowerSchedule):
            for kind, chunk, microbatch in transport.poll_decisions():
                schedule.tell(Task(Kind(kind), chunk, microbatch))
        task = schedule.next_task()
        if task is not None and self._leads and schedule.follows_arrivals:
            for follower in self._followers:
                transport.send_decision(follower, task)
        return task
