"""All configurations of our engine that a number of ranks could run, with what the user has pinned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from axonn.config.train_config import FloatType
from axonn.errors import ConfigError
from axonn.grid import AXES, Axis
from axonn.perf.planner.closed_form import Extents
from axonn.perf.strategy import OptimizerPlacement
from axonn.schedules import ScheduleSpec, definition_of, variants

Checkpointing = Literal["none", "auto"] | int
"""auto: as many blocks together as need the least memory."""

MOST_ROWS = 64
"""Of a microbatch that are tried, unless it is pinned."""
LIMITS = (1.0, 1.5, 2.0, 3.0, 4.0)
"""In-flight limits that are tried with the finalists, in G_inter."""
BSIZES = (1_000_000, 4_000_000, 16_000_000)
COARSENING = (1, 4, 16)


@dataclass(frozen=True, kw_only=True)
class Space:
    """What is searched; a pin is None where everything is tried.

    `order`: placement on nodes, from the slowest to the fastest axis; the engine runs the default. `reserve`: share of
    a device's memory that is left to what no model counts: the runtime's own, buffers of libraries, fragmentation.
    `fixed`: fields of `Strategy` that are otherwise than our engine has them, in every configuration.
    """

    gpus: int
    batch_size: int
    precision: FloatType = "float16"
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
        """All products of four factors that the pins allow. Raises `ConfigError` when there is none."""
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
        """That divide a pipeline's share of the batch; none where it has none."""
        share, rest = divmod(self.batch_size, data)
        if rest or not share:
            return []
        if self.microbatch_size is not None:
            return [] if share % self.microbatch_size else [self.microbatch_size]
        return [n for n in range(1, min(share, MOST_ROWS) + 1) if share % n == 0]

    def schedules(self, inter: int) -> list[ScheduleSpec]:
        """With one stage all are the same."""
        if self.schedule is not None:
            return [self.schedule]
        return [ScheduleSpec()] if inter == 1 else variants(inter)

    def limits(self, schedule: ScheduleSpec, inter: int) -> list[ScheduleSpec]:
        """The schedule with all its in-flight limits."""
        if not definition_of(schedule.name).has_limit or inter == 1 or self.schedule is not None:
            return [schedule]
        limits = sorted({max(1, round(limit * inter)) for limit in LIMITS})
        return [replace(schedule, in_flight_limit=limit) for limit in limits]

    def optimizers(self) -> Sequence[OptimizerPlacement]:
        """Places of the optimizer to try."""
        return ("device", "offloaded") if self.optimizer is None else (self.optimizer,)

    def checkpointings(self) -> Sequence[Checkpointing]:
        """Ways of checkpointing to try."""
        return ("none", "auto") if self.checkpointing is None else (self.checkpointing,)

    def sub_shards(self, tensor: int, microbatch_size: int) -> Sequence[int]:
        """Overdecomposition hides the collectives of tensor parallelism, where there are any."""
        if self.overdecomposition is not None:
            return (self.overdecomposition,) if self.overdecomposition <= microbatch_size else ()
        return (1, 2) if tensor > 1 and microbatch_size > 1 else (1,)


def _factors(number: int, pinned: int | None) -> Iterator[int]:
    if pinned is not None:
        return iter([pinned] if number % pinned == 0 else [])
    return (n for n in range(1, number + 1) if number % n == 0)
