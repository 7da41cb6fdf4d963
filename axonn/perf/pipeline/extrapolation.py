"""The pipeline phase of many microbatches from a simulation of few.

After its fill a pipeline repeats itself, so what more microbatches take follows from how much longer one run of the
simulator takes than a shorter one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from axonn.perf.layers.model_outline import ModelOutline
from axonn.perf.machine.machine_file import MachineFile
from axonn.perf.prediction import simulate_pipeline
from axonn.perf.strategy import Strategy
from axonn.perf.timing.stage_times import StageTimes
from axonn.schedules import ScheduleSpec


def extrapolated(run: Callable[[int], float], schedule: ScheduleSpec, *, stages: int, microbatches: int) -> float:
    """Return what `run(microbatches)` comes to, from runs of few where they are many; both may be of any unit."""
    # Whole rounds of the stages, for schedules that take microbatches in groups of as many.
    limit = max(schedule.limit_on(stages), stages)
    short = stages * (-(-limit // stages) + 2)
    # What follows arrivals with several chunks repeats itself only after many rounds.
    long = short + 2 * stages * (1 if schedule.chunks == 1 else 3)
    if microbatches <= short + long:
        return run(microbatches)
    rest = microbatches % stages
    first, second = run(short + rest), run(long + rest)
    return second + (microbatches - rest - long) * (second - first) / (long - short)


def pipeline_seconds(
    outline: ModelOutline,
    machine: MachineFile,
    strategy: Strategy,
    *,
    microbatches: int,
    stages: Sequence[StageTimes],
) -> float:
    """Seconds of the pipeline phase; within 1% of simulating all microbatches, with chunks 2% (a test)."""

    def run(count: int) -> float:
        return simulate_pipeline(outline, machine, strategy, microbatches=count, stages=stages).makespan

    return extrapolated(run, strategy.schedule, stages=len(stages), microbatches=microbatches)
