"""How a batch is computed, in terms that are the same for every framework."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from axonn.config import GPTConfig, GridConfig, ScheduleConfig, StrictModel
from axonn.errors import ConfigError
from axonn.grid import AXES, Axis, ProcessGrid
from axonn.perf.machine import Library, MachineFile

OptimizerPlacement = Literal["device", "offloaded", "sharded"]
"""device: 20 bytes per parameter; offloaded: the memory optimisation (DESIGN section 5); sharded: ZeRO stage 1."""


class Strategy(StrictModel):
    """A parallel strategy. What a framework does differently is one of these fields, never a number of its own."""

    grid: GridConfig
    order: tuple[Axis, ...] = Field(default=AXES, strict=False)
    """Placement on nodes: axes from the slowest to the fastest varying one (`ProcessGrid.order`)."""
    microbatch_size: int = Field(ge=1)
    schedule: ScheduleConfig = ScheduleConfig()
    blocking_messages: bool = False
    """True when sending and receiving occupies the stream that computes, so that no computation runs meanwhile."""
    message_library: Library = "mpi"
    partition_messages: bool = True
    """Each tensor-parallel rank sends its own part of an activation and the parts are gathered by the receivers
    (Narayanan et al., SC 2021, section 4.1; DeepSpeed's pipeline does so too). No effect without tensor parallelism."""
    optimizer: OptimizerPlacement = "device"
    bsize: int = Field(default=4_000_000, ge=1)
    """Bucket of the offloaded optimizer, in elements."""
    k: int = Field(default=4, ge=1)
    """Coarsening factor: the gradients are all-reduced in chunks of `k` buckets."""
    buckets_resident: int = Field(default=1, ge=1)
    recompute: bool = True
    """Activation checkpointing: only the input of every `checkpoint_layers` layers is kept, the rest recomputed."""
    checkpoint_layers: int = Field(default=1, ge=1)

    def model_post_init(self, context: Any) -> None:
        if sorted(self.order) != sorted(AXES):
            raise ValueError(f"order {self.order} must name each of {AXES} once")

    @property
    def tensor(self) -> int:
        """G_tensor."""
        return self.grid.row * self.grid.col

    def process_grid(self, machine: MachineFile) -> ProcessGrid:
        """The grid, placed on the machine's nodes."""
        g = self.grid
        return ProcessGrid(
            data=g.data,
            inter=g.inter,
            row=g.row,
            col=g.col,
            order=self.order,
            ranks_per_node=machine.node.gpus.number,
        )

    def microbatches(self, batch_size: int) -> int:
        """Microbatches per pipeline. Raises `ConfigError` when the batch does not divide."""
        unit = self.grid.data * self.microbatch_size
        if batch_size < 1 or batch_size % unit:
            raise ConfigError(
                f"batch_size {batch_size} is no multiple of G_data x microbatch_size = "
                f"{self.grid.data} x {self.microbatch_size}; change one of them"
            )
        return batch_size // unit

    def layers_of(self, model: GPTConfig) -> list[int]:
        """Transformer layers of each stage, as even as possible, more on the earlier stages.

        Raises `ConfigError` when there are more stages than layers.
        """
        stages = self.grid.inter
        if stages > model.layers:
            raise ConfigError(f"{stages} stages need at least {stages} layers, {model.name} has {model.layers}")
        share, rest = divmod(model.layers, stages)
        return [share + (stage < rest) for stage in range(stages)]

    def check(self, model: GPTConfig) -> None:
        """Raise `ConfigError` when the tensor axes do not divide the model."""
        for axis, extent, what, size in (
            ("col", self.grid.col, "heads", model.heads),
            ("col", self.grid.col, "hidden", model.hidden),
            ("row", self.grid.row, "hidden", model.hidden),
        ):
            if size % extent:
                raise ConfigError(f"{what} ({size}) of {model.name} is no multiple of {axis} = {extent}; change {axis}")
