"""The orders of the static schedules: which tasks one stage runs, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from axonn.schedules.base import Kind, Task
from axonn.schedules.definition import ScheduleDefinition
from axonn.schedules.layout import ChunkPlacement
from axonn.schedules.spec import ScheduleSpec

_TRIED: tuple[tuple[int, ChunkPlacement], ...] = ((1, "loop"), (2, "loop"), (2, "v"))
"""Chunks and placements that the planner tries of a static schedule, where they fit."""


def _one_chunk(chunks: int, placement: ChunkPlacement) -> bool:
    """Whether there is nothing to place."""
    return (chunks, placement) == (1, "loop")


@dataclass(frozen=True, kw_only=True)
class StaticOrder(ScheduleDefinition):
    """A static schedule: its order, and the chunks that it is defined for."""

    make: Callable[[int, int, int, int], list[Task]]
    """The tasks of a stage, of (stage, stages, microbatches, chunks)."""
    fits: Callable[[int, ChunkPlacement], bool] = _one_chunk
    """Whether it is defined for so many chunks that lie so."""
    needs: str = "one chunk per stage; remove chunks and placement"
    """What to say where it does not fit."""
    outdone: bool = False
    """Whether the planner need not try it, another schedule being always as good."""

    def variants(self, name: str, stages: int) -> list[ScheduleSpec]:
        fitting = [] if self.outdone else [pair for pair in _TRIED if self.fits(*pair)]
        return [ScheduleSpec(name=name, chunks=chunks, placement=placement) for chunks, placement in fitting]


def gpipe_order(microbatches: int) -> list[Task]:
    """All forwards, then all backwards (Huang et al., GPipe, NeurIPS 2019)."""
    return [Task(kind, 0, m) for kind in (Kind.FORWARD, Kind.BACKWARD) for m in range(microbatches)]


def one_f_one_b_order(stage: int, stages: int, microbatches: int) -> list[Task]:
    """Warm-up forwards, then one forward and one backward in turn (PipeDream-Flush: Narayanan et al., SC 2021)."""
    forwards = [Task(Kind.FORWARD, 0, m) for m in range(microbatches)]
    backwards = [Task(Kind.BACKWARD, 0, m) for m in range(microbatches)]
    return _in_turn(forwards, backwards, warmup=stages - 1 - stage)


def interleaved_order(stage: int, stages: int, microbatches: int, chunks: int) -> list[Task]:
    """1F1B over chunks in loops (Narayanan et al., SC 2021, section 2.2).

    Microbatches go through the chunks in groups of as many as there are stages. A last group that is not full keeps the
    places of the microbatches that it lacks empty: to leave whole microbatches out of a live order keeps it live.
    """
    full = -(-microbatches // stages) * stages
    steps = [
        (chunk, m) for first in range(0, full, stages) for chunk in range(chunks) for m in range(first, first + stages)
    ]
    forwards = [Task(Kind.FORWARD, chunk, m) for chunk, m in steps]
    backwards = [Task(Kind.BACKWARD, chunks - 1 - chunk, m) for chunk, m in steps]
    order = _in_turn(forwards, backwards, warmup=2 * (stages - 1 - stage) + (chunks - 1) * stages)
    return [task for task in order if task.microbatch < microbatches]


def zero_bubble_order(stage: int, stages: int, microbatches: int) -> list[Task]:
    """ZB-H1 (Qi et al., arXiv 2401.10241, section 2.2): 1F1B with split backwards, in the memory of 1F1B.

    Weight halves come `stage` microbatches after their input halves, so that every stage holds as much as the first.
    """
    order = []
    for task in one_f_one_b_order(stage, stages, microbatches):
        if task.kind == Kind.FORWARD:
            order.append(task)
            continue
        order.append(task._replace(kind=Kind.INPUT))
        if task.microbatch >= stage:
            order.append(Task(Kind.WEIGHT, 0, task.microbatch - stage))
    late = range(max(0, microbatches - stage), microbatches)
    return order + [Task(Kind.WEIGHT, 0, m) for m in late]


def zero_bubble_v_order(stage: int, stages: int, microbatches: int) -> list[Task]:
    """ZB-V (Qi et al., arXiv 2401.10241, section 6): two chunks in a V.

    The way down and back up is filled with forwards, chunk 0 ahead of chunk 1; then each stage repeats F I W of either
    chunk; at the end input halves go first and weight halves fill what would be idle. With fewer microbatches than the
    filling takes, the places of those that lack stay empty.
    """
    full = max(microbatches, 2 * stages - 1)
    order = _Builder()
    down, up = 0, 1
    order.add(Kind.FORWARD, down, times=2 * (stages - stage) - 1)
    for _ in range(stage):
        order.add(Kind.FORWARD, up)
        order.add(Kind.FORWARD, down)
    for _ in range(stages - stage):
        for kind in (Kind.FORWARD, Kind.INPUT, Kind.WEIGHT):
            order.add(kind, up)
    while order.count[Kind.FORWARD, up] < full:
        if order.count[Kind.FORWARD, down] < full:
            order.add(Kind.FORWARD, down)
        order.add(Kind.INPUT, down)
        order.add(Kind.WEIGHT, down)
        for kind in (Kind.FORWARD, Kind.INPUT, Kind.WEIGHT):
            order.add(kind, up)
    for _ in range(stage):
        order.add(Kind.INPUT, down)
        order.add(Kind.INPUT, up)
    for _ in range(stages - stage):
        order.add(Kind.INPUT, down)
        order.add(Kind.WEIGHT, down)
    for chunk in (up, down):
        order.add(Kind.WEIGHT, chunk, times=full - order.count[Kind.WEIGHT, chunk])
    return [task for task in order.tasks if task.microbatch < microbatches]


def _in_turn(forwards: list[Task], backwards: list[Task], *, warmup: int) -> list[Task]:
    """`warmup` forwards, then a forward and a backward in turn, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    order = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[len(forwards) - warmup :]


class _Builder:
    """Tasks in order; those of one kind and chunk take the microbatches one after the other."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.count = {(kind, chunk): 0 for kind in Kind for chunk in (0, 1)}

    def add(self, kind: Kind, chunk: int, *, times: int = 1) -> None:
        for _ in range(times):
            self.tasks.append(Task(kind, chunk, self.count[kind, chunk]))
            self.count[kind, chunk] += 1


def _held_of_interleaved(spec: ScheduleSpec, stages: int, microbatches: int) -> list[int]:
    pairs = [2 * (stages - 1 - stage) + (spec.chunks - 1) * stages + 1 for stage in range(stages)]
    return [min(microbatches, -(-count // spec.chunks)) for count in pairs]


def _one_on_each_stage(spec: ScheduleSpec, stages: int, microbatches: int) -> float:
    """Microbatches under way where each stage holds one per stage, and a microbatch its chunks one after the other."""
    return min(stages * (2 * spec.chunks / (spec.chunks + 1)), microbatches)


GPIPE = StaticOrder(
    make=lambda stage, stages, microbatches, chunks: gpipe_order(microbatches),
    most_held=lambda spec, stages, microbatches: [microbatches] * stages,
    in_flight=lambda spec, stages, microbatches: microbatches,
    weights_in_bubble=lambda spec: 0,
    # 1F1B takes as long and holds less.
    outdone=True,
)
ONE_F_ONE_B = StaticOrder(
    make=lambda stage, stages, microbatches, chunks: one_f_one_b_order(stage, stages, microbatches),
    most_held=lambda spec, stages, microbatches: [min(microbatches, stages - stage) for stage in range(stages)],
    in_flight=_one_on_each_stage,
    weights_in_bubble=lambda spec: 0,
)
INTERLEAVED = StaticOrder(
    make=interleaved_order,
    most_held=_held_of_interleaved,
    in_flight=_one_on_each_stage,
    weights_in_bubble=lambda spec: 0,
    fits=lambda chunks, placement: chunks > 1 and placement == "loop",
    needs="two or more chunks in loops; set chunks: 2, placement: loop",
)
ZERO_BUBBLE = StaticOrder(
    make=lambda stage, stages, microbatches, chunks: (zero_bubble_order if chunks == 1 else zero_bubble_v_order)(
        stage, stages, microbatches
    ),
    fits=lambda chunks, placement: (chunks, placement) in ((1, "loop"), (2, "v")),
    needs="one chunk (ZB-H1) or two in a V (ZB-V); set chunks: 2, placement: v, or remove both",
    most_held=lambda spec, stages, microbatches: [min(microbatches, stages)] * stages,
    in_flight=_one_on_each_stage,
    weights_in_bubble=lambda spec: 1 if spec.chunks == 1 else 2,
)
