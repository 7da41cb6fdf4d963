"""Properties of schedules that the closed form needs: stated by their definitions, or found by running them.

A schedule that states nothing runs on even stages whose messages take no time, a forward and each half of a backward
taking 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from axonn.perf.pipeline.extrapolation import extrapolated
from axonn.perf.pipeline.simulator import simulate
from axonn.schedules import Kind, ScheduleSpec, StageSchedule, definition_of, make_schedule

_UNITS = {Kind.FORWARD: 1, Kind.BACKWARD: 2, Kind.INPUT: 1, Kind.WEIGHT: 1}
_MICROBATCH = 3
"""Units that a microbatch takes on each stage."""


class UnitRun(NamedTuple):
    """A run in unit time."""

    makespan: float
    in_flight: int
    """Most microbatches that were in flight at once."""


def most_held(schedule: ScheduleSpec, stages: int, microbatches: int) -> list[int]:
    """Return the most microbatches that each stage can hold, in any order of arriving messages.

    A microbatch that all chunks of a stage hold counts as one.
    """
    stated = definition_of(schedule.name).most_held
    return _limits(schedule, stages, microbatches) if stated is None else stated(schedule, stages, microbatches)


def in_flight(schedule: ScheduleSpec, stages: int, microbatches: int) -> float:
    """Return the number of microbatches that can be in flight at once in the pipeline."""
    if (stated := definition_of(schedule.name).in_flight) is not None:
        return stated(schedule, stages, microbatches)
    return extrapolated(
        lambda count: unit_run(schedule, stages, count).in_flight, schedule, stages=stages, microbatches=microbatches
    )


def splits_backward(schedule: ScheduleSpec, stages: int) -> bool:
    """Return whether backwards run in two halves."""
    if (stated := definition_of(schedule.name).weights_in_bubble) is not None:
        return stated(schedule) > 0
    return make_schedule(schedule, stage=0, stages=stages, microbatches=1).splits_backward


def bubble(
    schedule: ScheduleSpec, microbatches: int, *, period: float, whole: Sequence[float], weight: Sequence[float]
) -> float:
    """Return the seconds that a batch takes beyond one `period` for each microbatch, messages left out.

    `whole`: seconds of a microbatch on each stage; `weight`: the weight half's part of them.
    """
    stages = len(whole)
    if (stated := definition_of(schedule.name).weights_in_bubble) is not None:
        # Weight halves fill idle time: more of them, the more microbatches a stage may hold.
        filling = stated(schedule)
        idle = [max(0.0, t - filling * w) for t, w in zip(whole, weight, strict=True)]
        return (sum(idle) - max(idle)) / schedule.chunks
    makespan = extrapolated(
        lambda count: unit_run(schedule, stages, count).makespan, schedule, stages=stages, microbatches=microbatches
    )
    idle_microbatches = makespan / _MICROBATCH - microbatches
    # A stage that waits for others in each period is idle then, not once more.
    return max(0.0, idle_microbatches * sum(whole) / stages - microbatches * (period - max(whole)))


@lru_cache(maxsize=4096)
def unit_run(schedule: ScheduleSpec, stages: int, microbatches: int) -> UnitRun:
    """Run the schedule in unit time."""
    run = simulate(
        _machines(schedule, stages, microbatches), seconds=lambda stage, task: _UNITS[task.kind] / schedule.chunks
    )
    # A microbatch is in flight between its first task and its last gradient on the stage with the inputs.
    changes = [
        (start, 1) if task.kind == Kind.FORWARD else (end, -1)
        for stage, task, start, end in run.tasks
        if (stage, task.chunk) == (0, 0) and task.kind != Kind.WEIGHT
    ]
    return UnitRun(run.makespan, max(accumulate(change for _, change in sorted(changes))))


@lru_cache(maxsize=4096)
def _limits(schedule: ScheduleSpec, stages: int, microbatches: int) -> list[int]:
    return [-(-one.limit // schedule.chunks) for one in _machines(schedule, stages, microbatches)]


def _machines(schedule: ScheduleSpec, stages: int, microbatches: int) -> list[StageSchedule]:
    return [make_schedule(schedule, stage=s, stages=stages, microbatches=microbatches) for s in range(stages)]
