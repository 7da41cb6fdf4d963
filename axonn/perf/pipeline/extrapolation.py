"""The pipeline phase of many microbatches from a simulation of few.

After its fill a pipeline repeats itself, so what more microbatches take follows from how much longer one run of the
simulator takes than a shorter one.
"""

from __future__ import annotations

from collections.abc import Sequence

from axonn.perf.layers.model_outline import ModelOutline
from axonn.perf.machine.machine_file import MachineFile
from axonn.perf.pipeline.simulator import Simulation
from axonn.perf.prediction import simulate_pipeline
from axonn.perf.strategy import Strategy
from axonn.perf.timing.stage_times import StageTimes


def pipeline_seconds(
    outline: ModelOutline,
    machine: MachineFile,
    strategy: Strategy,
    *,
    microbatches: int,
    stages: Sequence[StageTimes],
) -> float:
    """Seconds of the pipeline phase; within 1% of simulating all microbatches, with chunks 2% (a test)."""

    def run(count: int) -> Simulation:
        return simulate_pipeline(outline, machine, strategy, microbatches=count, stages=stages)

    # Whole rounds of the stages, for schedules that take microbatches in groups of as many.
    inter = len(stages)
    limit = max(strategy.schedule.in_flight_limit or 2 * inter, inter)
    short = inter * (-(-limit // inter) + 2)
    # What follows arrivals with several chunks repeats itself only after many rounds.
    long = short + 2 * inter * (1 if strategy.schedule.chunks == 1 else 3)
    if microbatches <= short + long:
        return run(microbatches).makespan
    rest = microbatches % inter
    first, second = run(short + rest).makespan, run(long + rest).makespan
    return second + (microbatches - rest - long) * (second - first) / (long - short)
