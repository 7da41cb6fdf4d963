"""Parallel strategies: how a batch is computed, in terms common to all frameworks."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from axonn.config.model_config import ModelConfig
from axonn.config.optimizer_config import DEFAULT_ALGORITHM
from axonn.config.train_config import FloatType, StrictModel
from axonn.errors import ConfigError
from axonn.grid import AXES, Axis, ProcessGrid
from axonn.inter_layer.partition import partition_chunks
from axonn.optim.algorithms.base import Algorithm
from axonn.optim.algorithms.registry import ALGORITHMS, AlgorithmName
from axonn.perf.layers.model_outline import ModelOutline, with_sequence_parallelism
from axonn.perf.machine.machine_file import Library, MachineFile
from axonn.schedules import ChunkLayout, ScheduleSpec

OptimizerPlacement = Literal["device", "offloaded", "sharded"]
"""device: 20 bytes per parameter; offloaded: streamed from host memory in buckets (IPDPS 2022, section V-B); sharded:
ZeRO stage 1."""


Recompute = Literal["full", "selective", "none"]
"""Activation checkpointing. full: only the input of every `checkpoint_layers` layers is saved and the rest recomputed;
selective: only the attention scores are recomputed (Korthikanti et al., arXiv 2205.05198, section 5)."""


class Strategy(StrictModel):
    """A parallel strategy. Frameworks differ only in these fields, never in constants of their own."""

    grid: ProcessGrid
    order: tuple[Axis, ...] = Field(default=AXES, strict=False)
    """Placement on nodes: the axes from the slowest to the fastest varying one (`ProcessGrid.order`)."""
    microbatch_size: int = Field(ge=1)
    schedule: ScheduleSpec = ScheduleSpec()
    blocking_messages: bool = False
    """True if sends and receives occupy the compute stream, so that no computation overlaps them."""
    message_library: Library = "mpi"
    partition_messages: bool = True
    """True if each tensor-parallel rank sends its shard of an activation, and the receivers all-gather the shards
    (Narayanan et al., SC 2021, section 4.1; also in DeepSpeed's pipeline). No effect without tensor parallelism."""
    algorithm: AlgorithmName = DEFAULT_ALGORITHM
    """Name of the optimizer's algorithm; left out of dumps where it is the default."""
    optimizer: OptimizerPlacement = "device"
    """Where the optimizer's state lies."""
    bsize: int = Field(default=4_000_000, ge=1)
    """Bucket size of the offloaded optimizer, in elements."""
    k: int = Field(default=4, ge=1)
    """Coarsening factor: gradients are all-reduced in chunks of `k` buckets."""
    buckets_resident: int = Field(default=1, ge=1)
    recompute: Recompute = "full"
    checkpoint_layers: int = Field(default=1, ge=1)
    compute: FloatType = "float16"
    """Type of parameters, activations, gradients and messages."""
    partition: Literal["layers", "work"] = "layers"
    """layers: equal numbers of layers per stage, with the embedding in the first stage and the head in the last; work:
    stages of nearly equal work, as in our engine."""
    overdecomposition: int = Field(default=1, ge=1)
    """Number of sub-shards of a microbatch; one computes while the collectives of another run."""
    overlap_input_gradients: bool = False
    """True if the collective of the input gradient overlaps the computation of the weight gradient."""
    sequence_parallel: bool = False
    """True if norms, dropout and residuals are cut along the sequence among the ranks of col; all-reduces then become
    reduce-scatters and all-gathers (Korthikanti et al., section 4.2.2), and messages between stages are cut too."""
    reduce_type: FloatType | None = None
    """Type in which gradients are all-reduced over the replicas (default: `compute`)."""
    overlap_reduction: bool = False
    """True if that all-reduce overlaps the backward of the last microbatch (PyTorch's DistributedDataParallel)."""
    optimizer_kernels: Literal["fused", "separate"] = "fused"
    """fused: the update is one kernel, as in Apex, if the algorithm has one; separate: one kernel per operation, as in
    plain PyTorch."""
    clip_norm: bool = False
    """True if the gradient is clipped by its norm, at the cost of two more passes over it."""
    agree_on_overflow: Literal["before", "after", "never"] | None = None
    """Point at which all ranks agree whether gradients overflowed, waiting for the last of them: before the reduction
    over the replicas (as in our engine), after it, or never. Default: before in float16, whose loss is scaled, else
    never."""
    accumulate: Literal["in-place", "separate"] = "separate"
    """in-place: the product that computes a weight gradient adds it to that of the previous microbatches."""

    def model_post_init(self, context: Any) -> None:
        if sorted(self.order) != sorted(AXES):
            raise ValueError(f"order {self.order} must name each of {AXES} once")

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        plain: dict[str, Any] = handler(self)
        if self.algorithm == DEFAULT_ALGORITHM:
            plain.pop("algorithm", None)
        return plain

    @property
    def update(self) -> Algorithm[Any]:
        """The optimizer's algorithm."""
        return ALGORITHMS[self.algorithm]

    @property
    def tensor(self) -> int:
        """G_tensor, the number of tensor-parallel ranks."""
        return self.grid.tensor

    @property
    def gradient_type(self) -> FloatType:
        """Type in which gradients are all-reduced."""
        return self.reduce_type or self.compute

    @property
    def agreement(self) -> Literal["before", "after", "never"]:
        """`agree_on_overflow`, or its default for the compute type."""
        return self.agree_on_overflow or ("before" if self.compute == "float16" else "never")

    @property
    def logical_grid(self) -> ProcessGrid:
        """The grid without placement on nodes."""
        return ProcessGrid(data=self.grid.data, inter=self.grid.inter, row=self.grid.row, col=self.grid.col)

    def process_grid(self, machine: MachineFile) -> ProcessGrid:
        """Return the grid placed on the nodes of `machine`."""
        g = self.grid
        return ProcessGrid(
            data=g.data,
            inter=g.inter,
            row=g.row,
            col=g.col,
            order=self.order,
            ranks_per_node=machine.node.gpus.number,
        )

    def laid_out(self, outline: ModelOutline) -> ModelOutline:
        """Return the outline, with sequence parallelism if set. Raises `ConfigError` if a layer does not support it."""
        return with_sequence_parallelism(outline) if self.sequence_parallel else outline

    @property
    def message_parts(self) -> int:
        """Number of shards, among the ranks of col, of a message to the next stage."""
        return self.grid.col if self.partition_messages or self.sequence_parallel else 1

    def microbatches(self, batch_size: int) -> int:
        """Return the microbatches per pipeline. Raises `ConfigError` when the batch does not divide."""
        unit = self.grid.data * self.microbatch_size
        if batch_size < 1 or batch_size % unit:
            raise ConfigError(
                f"batch_size {batch_size} is no multiple of G_data x microbatch_size = "
                f"{self.grid.data} x {self.microbatch_size}; change one of them"
            )
        return batch_size // unit

    def virtual_spans(self, outline: ModelOutline) -> list[range]:
        """Return the links of each virtual stage. Raises `ConfigError` when the model has too few layers."""
        layout = self.schedule.layout(self.grid.inter)
        if self.partition == "work":
            return list(_cut(tuple(link.cost for link in outline.links), layout))
        count = layout.virtual_stages
        blocks = sorted({link.block for link in outline.links if link.block is not None})
        if count > len(blocks):
            chunks = f" with {layout.chunks} chunks each" if layout.chunks > 1 else ""
            raise ConfigError(
                f"{layout.stages} stages{chunks} need at least {count} layers, {outline.name} has {len(blocks)}"
            )
        share, rest = divmod(len(blocks), count)
        ends, block = [], 0
        for stage in range(count - 1):
            block += share + (stage < rest)
            ends.append(next(i for i, link in enumerate(outline.links) if link.block == blocks[block]))
        ends.append(len(outline.links))
        return [range(first, end) for first, end in zip([0, *ends], ends, strict=False)]

    def spans_of_stages(self, outline: ModelOutline) -> list[list[range]]:
        """Return the links of each chunk of each stage."""
        spans = self.virtual_spans(outline)
        layout = self.schedule.layout(self.grid.inter)
        return [[spans[layout.virtual(s, c)] for c in range(layout.chunks)] for s in range(layout.stages)]

    def check(self, model: ModelConfig) -> None:
        """Raise `ConfigError` when the tensor axes cannot cut the layers of `model`."""
        model.check_tensor_axes(row=self.grid.row, col=self.grid.col)


@lru_cache(maxsize=256)
def _cut(costs: tuple[float, ...], layout: ChunkLayout) -> tuple[range, ...]:
    return tuple(partition_chunks(costs, layout))
