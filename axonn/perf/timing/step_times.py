"""When each stage reduces its gradients and updates its parameters, after the last of its own tasks.

As `axonn.engine.Engine.train_batch` does it: a stage that is done early goes on while others still run backwards.
First the stages that hold a tied parameter add up its gradients, then the replicas of each stage reduce theirs, then
each updates. Where gradients may overflow, all ranks agree on it, before the reduction or after it: all wait for the
last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from axonn.grid import AXES
from axonn.perf.layers.model_outline import ModelOutline
from axonn.perf.machine.machine_file import MachineFile
from axonn.perf.machine.network import all_reduce_time, edge, message_time, place
from axonn.perf.strategy import Strategy
from axonn.perf.timing.communication import BYTES
from axonn.perf.timing.task_times import Interval
from axonn.perf.timing.update_times import StepTime
from axonn.spans import Span, SpanKind

_FLAG_BYTES = 4


class Tie(NamedTuple):
    """A parameter that two stages hold: which, and the seconds in which they add up its gradients."""

    stages: tuple[int, int]
    seconds: float


class StageEnd(NamedTuple):
    """What a stage does after its last task, as seconds since the beginning of the batch."""

    tied: Interval
    reduction: Interval
    optimizer: Interval

    @property
    def reducing(self) -> float:
        """Seconds in collectives."""
        return self.tied[1] - self.tied[0] + self.reduction[1] - self.reduction[0]

    @property
    def updating(self) -> float:
        """Seconds of the optimizer."""
        return self.optimizer[1] - self.optimizer[0]

    def spans(self, stage: int, last_task: float, end: float) -> list[Span]:
        """Up to the end of the batch, what is left between its parts being idle."""
        found: list[Span] = []
        free = last_task
        parts = (SpanKind.ALL_REDUCE, self.tied), (SpanKind.ALL_REDUCE, self.reduction)
        for kind, (begin, stop) in (*parts, (SpanKind.OPTIMIZER, self.optimizer), (SpanKind.IDLE, (end, end))):
            if begin > free:
                found.append(Span(stage, SpanKind.IDLE, 0, -1, -1, -1, free, begin))
            if stop > begin:
                found.append(Span(stage, kind, 0, -1, -1, -1, begin, stop))
            free = max(free, stop)
        return found


def finish(
    ends: Sequence[float],
    steps: Sequence[StepTime],
    *,
    ties: Sequence[Tie] = (),
    agreement: Literal["before", "after", "never"] = "never",
    flag: float = 0.0,
) -> list[StageEnd]:
    """What each stage does after its last task, which ends at `ends`: "before" or "after" the reduction (or never,
    "never") all agree, in `flag` seconds."""
    tied = [(end, end) for end in ends]
    for tie in ties:
        begin = max(tied[stage][1] for stage in tie.stages)
        for stage in tie.stages:
            first, done = tied[stage]
            tied[stage] = (first if done > first else begin, begin + tie.seconds)
    ready = [done for _, done in tied]
    if agreement == "before":
        ready = [max(ready) + flag] * len(ready)
    reduced = [begin + step.reduction for begin, step in zip(ready, steps, strict=True)]
    update = [max(reduced) + flag] * len(reduced) if agreement == "after" else reduced
    return [
        StageEnd(tied[stage], (ready[stage], reduced[stage]), (update[stage], update[stage] + step.optimizer))
        for stage, step in enumerate(steps)
    ]


def ties_of(outline: ModelOutline, machine: MachineFile, strategy: Strategy) -> list[Tie]:
    """The tied parameters whose stages are not the same, each with the time of an all-reduce of two ranks, which moves
    everything once each way."""
    grid = strategy.process_grid(machine)
    held = [outline.parameters(spans, grid) for spans in strategy.spans_of_stages(outline)]
    found = []
    for name in {first for first, _ in outline.ties}:
        stages = [stage for stage, parameters in enumerate(held) if name in parameters]
        if len(stages) < 2:
            continue
        first, last = stages[0], stages[-1]
        way = edge(grid, first, last)
        nbytes = BYTES[strategy.gradient_type] * held[first][name]
        time = message_time(machine, nbytes, library="nccl", same_node=way.same_node, flows=way.flows)
        found.append(Tie((first, last), time.seconds))
    return found


def flag_time(machine: MachineFile, strategy: Strategy) -> float:
    """Seconds of the all-reduce of one number over all ranks."""
    return all_reduce_time(machine, _FLAG_BYTES, place(strategy.process_grid(machine), AXES, 0, machine))
