"""The schedule of a rank that is told what to run by another one of its stage."""

from __future__ import annotations

from axonn.schedules.base import StageSchedule, Task
from axonn.schedules.static import StaticSchedule


class FollowerSchedule(StaticSchedule):
    """Runs what `schedule` picks on another rank of the stage, in that order. It is told of each pick by `tell`."""

    def __init__(self, schedule: StageSchedule) -> None:
        super().__init__(
            stage=schedule.stage,
            stages=schedule.stages,
            microbatches=schedule.microbatches,
            layout=schedule.layout,
            order=(),
            kinds=schedule.kinds,
        )
        self._most = schedule.limit

    def tell(self, task: Task) -> None:
        """`task` runs after all that was told before."""
        self.order.append(task)

    @property
    def limit(self) -> int:
        return self._most

    def waiting_for(self) -> str:
        if self._position == len(self.order) < self.tasks:
            return "being told its next task"
        return super().waiting_for()
