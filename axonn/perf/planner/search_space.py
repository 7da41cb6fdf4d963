"""Search space of the planner: all configurations of our engine on a number of ranks, within the user's pins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from axonn.config.optimizer_config import DEFAULT_ALGORITHM
from axonn.config.train_config import FloatType
from axonn.errors import ConfigError
from axonn.grid import AXES, Axis
from axonn.perf.planner.closed_form import Extents
from axonn.perf.strategy import OptimizerPlacement
from axonn.schedules import ScheduleSpec, definition_of, variants

Checkpointing = Literal["none", "auto"] | int
"""auto: the number of blocks per checkpoint that needs the least memory."""

MOST_ROWS = 64
"""Largest microbatch size that is tried, unless it is pinned."""
LIMITS = (1.0, 1.5, 2.0, 3.0, 4.0)
"""In-flight limits that are tried with the finalists, in units of G_inter."""
BSIZES = (1_000_000, 4_000_000, 16_000_000)
COARSENING = (1, 4, 16)


@dataclass(frozen=True, kw_only=True)
class Space:
    """The search space. A setting that is None is searched; any other value pins it.

    `order`: placement on nodes, from the slowest to the fastest axis; the engine runs the default. `reserve`: fraction
    of a device's memory that is left for what no model counts: the runtime, buffers of libraries, fragmentation.
    `fixed`: fields of `Strategy` that differ from our engine in every configuration.
    """

    gpus: int
    batch_size: int
    precision: FloatType = "float16"
    algorithm: str = DEFAULT_ALGORITHM
    order: tuple[Axis, ...] = AXES
    data: int | None = None
    inter: int | None = None
    row: int | None = None
    col: int | None = None
    microbatch_size: int | None = None
    schedule: ScheduleSpec | None = None
    checkpointing: Checkpointing | None = None
    optimizer: OptimizerPlacement | None = None
    overdecomposition: int | None = None
    reserve: float = 0.05
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def grids(self) -> list[Extents]:
        """Return all grids of `gpus` ranks that the pins allow. Raises `ConfigError` when there is none."""
        found = [
            (data, inter, row, self.gpus // (data * inter * row))
            for data in _factors(self.gpus, self.data)
            for inter in _factors(self.gpus // data, self.inter)
            for row in _factors(self.gpus // (data * inter), self.row)
            if self.col in (None, self.gpus // (data * inter * row))
        ]
        if not found:
            pinned = ", ".join(f"{axis} = {n}" for axis in AXES if (n := getattr(self, axis)) is not None)
            raise ConfigError(f"no grid of {self.gpus} ranks has {pinned}; the pinned extents must divide {self.gpus}")
        return found

    def microbatch_sizes(self, data: int) -> list[int]:
        """Return the microbatch sizes that divide the batch shard of a pipeline; none if the batch does not divide."""
        share, rest = divmod(self.batch_size, data)
        if rest or not share:
            return []
        if self.microbatch_size is not None:
            return [] if share % self.microbatch_size else [self.microbatch_size]
        return [n for n in range(1, min(share, MOST_ROWS) + 1) if share % n == 0]

    def schedules(self, inter: int) -> list[ScheduleSpec]:
        """Return the schedules to try; with one stage they are all equal, so only one."""
        if self.schedule is not None:
            return [self.schedule]
        return [ScheduleSpec()] if inter == 1 else variants(inter)

    def limits(self, schedule: ScheduleSpec, inter: int) -> list[ScheduleSpec]:
        """Return the schedule with each in-flight limit to try."""
        if not definition_of(schedule.name).has_limit or inter == 1 or self.schedule is not None:
            return [schedule]
        limits = sorted({max(1, round(limit * inter)) for limit in LIMITS})
        return [replace(schedule, in_flight_limit=limit) for limit in limits]

    def optimizers(self) -> Sequence[OptimizerPlacement]:
        """Return the placements of the optimizer to try."""
        return ("device", "offloaded") if self.optimizer is None else (self.optimizer,)

    def checkpointings(self) -> Sequence[Checkpointing]:
        """Return the settings of activation checkpointing to try."""
        return ("none", "auto") if self.checkpointing is None else (self.checkpointing,)

    def sub_shards(self, tensor: int, microbatch_size: int) -> Sequence[int]:
        """Return the numbers of sub-shards to try; only tensor-parallel collectives make overdecomposition pay."""
        if self.overdecomposition is not None:
            return (self.overdecomposition,) if self.overdecomposition <= microbatch_size else ()
        return (1, 2) if tensor > 1 and microbatch_size > 1 else (1,)


def _factors(number: int, pinned: int | None) -> Iterator[int]:
    if pinned is not None:
        return iter([pinned] if number % pinned == 0 else [])
    return (n for n in range(1, number + 1) if number % n == 0)
