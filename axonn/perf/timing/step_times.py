"""Timeline of each stage after its last task: reduction of its gradients and update of its parameters.

As in `axonn.engine.Engine.train_batch`, a stage that is done early continues while others still run backwards. First
the stages that share a tied parameter all-reduce its gradients, then the replicas of each stage reduce theirs, then
each updates. If gradients may overflow, all ranks agree on it, before or after the reduction, and so wait for the last.
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
    """A tied parameter: the two stages that hold it, and the seconds of the all-reduce of its gradients."""

    stages: tuple[int, int]
    seconds: float


class StageEnd(NamedTuple):
    """Intervals of a stage after its last task, in seconds since the start of the batch."""

    tied: Interval
    reduction: Interval
    optimizer: Interval

    @property
    def reducing(self) -> float:
        """Seconds in gradient all-reduces."""
        return self.tied[1] - self.tied[0] + self.reduction[1] - self.reduction[0]

    @property
    def updating(self) -> float:
        """Seconds of the optimizer."""
        return self.optimizer[1] - self.optimizer[0]

    def spans(self, stage: int, last_task: float, end: float) -> list[Span]:
        """Return spans from the last task to the end of the batch, with idle spans in between."""
        spans: list[Span] = []
        free = last_task
        parts = (SpanKind.ALL_REDUCE, self.tied), (SpanKind.ALL_REDUCE, self.reduction)
        for kind, (begin, stop) in (*parts, (SpanKind.OPTIMIZER, self.optimizer), (SpanKind.IDLE, (end, end))):
            if begin > free:
                spans.append(Span(stage, SpanKind.IDLE, 0, -1, -1, -1, free, begin))
            if stop > begin:
                spans.append(Span(stage, kind, 0, -1, -1, -1, begin, stop))
            free = max(free, stop)
        return spans


def finish(
    ends: Sequence[float],
    steps: Sequence[StepTime],
    *,
    ties: Sequence[Tie] = (),
    agreement: Literal["before", "after", "never"] = "never",
    flag: float = 0.0,
) -> list[StageEnd]:
    """Return the end of each stage, whose last task ends at `ends`.

    `agreement`: whether all ranks agree on overflow "before" or "after" the reduction, in `flag` seconds, or "never".
    """
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
    """Return the tied parameters that several stages hold, each with the time of an all-reduce of two ranks.

    That moves all elements once each way, which takes as long as one message.
    """
    grid = strategy.process_grid(machine)
    held = [outline.parameters(spans, grid) for spans in strategy.spans_of_stages(outline)]
    ties = []
    for name in {first for first, _ in outline.ties}:
        stages = [stage for stage, parameters in enumerate(held) if name in parameters]
        if len(stages) < 2:
            continue
        first, last = stages[0], stages[-1]
        between = edge(grid, first, last)
        nbytes = BYTES[strategy.gradient_type] * held[first][name]
        time = message_time(machine, nbytes, library="nccl", same_node=between.same_node, flows=between.flows)
        ties.append(Tie((first, last), time.seconds))
    return ties


def flag_time(machine: MachineFile, strategy: Strategy) -> float:
    """Return the seconds of the all-reduce of the overflow flag over all ranks."""
    return all_reduce_time(machine, _FLAG_BYTES, place(strategy.process_grid(machine), AXES, 0, machine))
