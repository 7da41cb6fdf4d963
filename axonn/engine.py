"""The engine: one `train_batch` that composes pipeline, gradient reduction and optimizer, on every rank of a grid."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from axonn.checkpoint.local_shard import LocalShard
from axonn.config.defaults import checkpoint_blocks, sub_shards
from axonn.config.train_config import OptimizerConfig, PrecisionConfig
from axonn.device.compilation import CompileMode, Compiler
from axonn.device.devices import usable
from axonn.device.streams import DeviceToHostCopy, Timeline
from axonn.distributed.collectives import CollectiveGroup, Collectives, SerialCollectives
from axonn.distributed.transport import Transport
from axonn.errors import ConfigError, GridError
from axonn.grid import AXES, ProcessGrid
from axonn.inter_layer.batch_shard import Batch, Inputs
from axonn.inter_layer.executor import PipelineExecutor
from axonn.inter_layer.non_finite import NotFinite
from axonn.inter_layer.stage import ParameterSpec, StageChunk, parameter_specs, tied_stages, virtual_spans
from axonn.models.base import PipelineModel
from axonn.models.initialization import fill
from axonn.observability.traffic import Traffic, TrafficMeter
from axonn.optim.model_optimizer import ModelOptimizer
from axonn.schedules import ScheduleSpec, StageSchedule, make_schedule
from axonn.spans import SpanKind, SpanRecorder
from axonn.tensor import TensorContext


def microbatches_of(*, batch_size: int, microbatch_size: int, grid: ProcessGrid) -> int:
    """Return the microbatches per pipeline; sizes count samples. Raises `GridError` when the batch does not divide."""
    if batch_size % (grid.data * microbatch_size):
        raise GridError(
            f"batch_size {batch_size} is not a multiple of G_data x microbatch_size = "
            f"{grid.data} x {microbatch_size} = {grid.data * microbatch_size}; change one of the three"
        )
    return batch_size // (grid.data * microbatch_size)


@dataclass(frozen=True, kw_only=True)
class BatchResult:
    """Result of one training step, the same on every rank."""

    loss: float
    """Mean loss of the batch, before the update; also NaN if a gradient between stages was non-finite and there is no
    loss scaling to skip the step."""
    applied: bool
    """False when gradients overflowed, so that no rank updated anything."""
    learning_rate: float
    loss_scale: float
    gradient_norm: float | None
    """Gradient norm of the whole model, before clipping; None without `clip_norm`."""


class Engine:
    """Trainer of `model` on one rank of `grid`, in step with the engines of the other ranks.

    Every rank makes one with the same arguments. `transport` is needed when G_inter > 1, `collectives` when there is
    more than one rank. `activation_checkpointing` counts blocks, see `TrainConfig`; `overdecomposition`: see
    `axonn.config.defaults.sub_shards`; `compile`: see `axonn.device.compilation.Compiler`. `device`: where this rank
    computes. `steps` is the length of the run, needed if the learning rate depends on it. Raises `GridError` or
    `ConfigError` when the configuration does not fit.
    """

    def __init__(
        self,
        model: PipelineModel,
        *,
        grid: ProcessGrid,
        rank: int = 0,
        batch_size: int,
        microbatch_size: int,
        transport: Transport | None = None,
        collectives: Collectives | None = None,
        schedule: ScheduleSpec | None = None,
        optimizer: OptimizerConfig | None = None,
        precision: PrecisionConfig | None = None,
        activation_checkpointing: int | Literal["auto"] | None = None,
        overdecomposition: int | None = None,
        compile: CompileMode = "auto",
        device: torch.device | None = None,
        seed: int = 0,
        steps: int | None = None,
        spans: SpanRecorder | None = None,
    ) -> None:
        model.check(grid)
        self.device = usable(device)
        _check_connections(grid, transport, collectives)
        self.grid = grid
        self.rank = rank
        self.spans = spans
        self.coordinates = grid.coordinates(rank)
        self.batch_size = batch_size
        self.microbatches = microbatches_of(batch_size=batch_size, microbatch_size=microbatch_size, grid=grid)
        self.batches = 0
        """Batches trained on so far."""
        self._schedule = schedule or ScheduleSpec()
        first = self._new_schedule()  # An unknown schedule is an error now rather than in the first batch.
        self.layout = first.layout
        self._collectives = collectives or SerialCollectives(grid, rank)
        self._meter = TrafficMeter(self._collectives, transport)
        self._world = self._collectives.axis_group(AXES)
        precision = precision or PrecisionConfig()
        dtype = getattr(torch, precision.compute)
        self._timeline = Timeline(self.device, spans)
        self._context = TensorContext(
            grid, rank, self._collectives, seed=seed, timeline=self._timeline, compiler=Compiler(compile)
        )
        self.virtual_spans = virtual_spans(model, self.layout)
        self.chunks = self._build_chunks(model, dtype, activation_checkpointing, limit=first.limit)
        """The modules of this rank."""
        self.specs: list[ParameterSpec] = parameter_specs(model, self.chunks, self.virtual_spans, self.layout)
        self._optimizer = self._build_optimizer(model, optimizer or OptimizerConfig(), precision, steps=steps)
        if transport is not None:
            transport.spans = spans
        shards = sub_shards(overdecomposition, microbatch_size=microbatch_size, grid=grid)
        self._executor = self._build_executor(model, transport, microbatch_size, shards, dtype)

    def _build_chunks(
        self,
        model: PipelineModel,
        dtype: torch.dtype,
        activation_checkpointing: int | Literal["auto"] | None,
        *,
        limit: int,
    ) -> list[StageChunk]:
        """Build this rank's chunks without storage: the optimizer allocates all parameters."""
        chunks = []
        for chunk in range(self.layout.chunks):
            span = self.virtual_spans[self.layout.virtual(self.coordinates.inter, chunk)]
            blocks = [model.layers[i].block for i in span]
            recompute = checkpoint_blocks(activation_checkpointing, blocks, limit=limit, chunks=self.layout.chunks)
            meta = torch.device("meta")
            chunks.append(StageChunk(model, span, context=self._context, dtype=dtype, device=meta, recompute=recompute))
        return chunks

    def _build_optimizer(
        self, model: PipelineModel, config: OptimizerConfig, precision: PrecisionConfig, *, steps: int | None
    ) -> ModelOptimizer:
        """Build the optimizer, which allocates and initialises the parameters of this rank."""
        placed = {spec.name: spec.placement for spec in self.specs}

        def initialise(name: str, part: torch.Tensor) -> None:
            fill(
                part,
                model.initial(name),
                name=name,
                seed=self._context.seed,
                placement=placed[name],
                grid=self.grid,
                coordinates=self.coordinates,
                on=self.device,
            )

        return ModelOptimizer(
            self.specs,
            grid=self.grid,
            rank=self.rank,
            collectives=self._collectives,
            config=config,
            precision=precision,
            initialise=initialise,
            timeline=self._timeline,
            steps=steps,
            ties=sorted(set(tied_stages(model, self.virtual_spans, self.layout).values())),
        )

    def _build_executor(
        self, model: PipelineModel, transport: Transport | None, microbatch_size: int, shards: int, dtype: torch.dtype
    ) -> PipelineExecutor:
        return PipelineExecutor(
            model=model,
            chunks=self.chunks,
            layout=self.layout,
            context=self._context,
            sub_shards=shards,
            grid=self.grid,
            rank=self.rank,
            transport=transport if self.grid.inter > 1 else None,
            microbatch_size=microbatch_size,
            dtype=dtype,
            timeline=self._timeline,
        )

    @property
    def is_first_stage(self) -> bool:
        """True if this rank needs the inputs of a batch."""
        return any(self.layout.is_source(self.coordinates.inter, chunk) for chunk in range(self.layout.chunks))

    @property
    def is_last_stage(self) -> bool:
        """True if this rank needs the targets of a batch."""
        return any(self.layout.is_sink(self.coordinates.inter, chunk) for chunk in range(self.layout.chunks))

    @property
    def held_microbatches(self) -> int:
        """Microbatches (of each chunk) whose activations or gradients this rank holds; zero between batches."""
        return self._executor.held

    def shard(self, step: int) -> range:
        """Return the global numbers of the samples that this rank's pipeline computes in batch number `step`."""
        rows = self.batch_size // self.grid.data
        first = step * self.batch_size + self.coordinates.data * rows
        return range(first, first + rows)

    def train_batch(self, inputs: Inputs | None, targets: torch.Tensor | None) -> BatchResult:
        """Run one training step on this rank's shard of a batch.

        `inputs` and `targets` are [batch_size / G_data, ...]; inputs may be None except on the first stage
        (`is_first_stage`), targets except on the last (`is_last_stage`). Raises `ConfigError` for another number of
        rows.
        """
        self._meter.start()
        loss = self._run_pipeline(inputs, targets)
        step = self._optimizer.begin_step(self.batches)
        # The only place in a batch where the host waits for the device.
        value = loss.wait()
        result = step.wait()
        self._meter.stop()
        self.batches += 1
        if self.spans is not None:
            self.spans.step += 1
        return BatchResult(
            loss=value,
            applied=result.applied,
            learning_rate=result.learning_rate,
            loss_scale=result.loss_scale,
            gradient_norm=result.gradient_norm,
        )

    def compute_gradients(self, inputs: Inputs | None, targets: torch.Tensor | None) -> float:
        """Run `train_batch` without the optimizer step: each `.grad` is the gradient of the mean loss of the batch."""
        loss = self._run_pipeline(inputs, targets)
        self._optimizer.reduce()
        return loss.wait()

    def evaluate_batch(self, inputs: Inputs | None, targets: torch.Tensor | None) -> float:
        """Return the mean loss of a batch, the same on every rank, without changing anything."""
        self._check_rows(inputs, targets)
        batch = self._batch(inputs, targets)
        with nullcontext() if self.spans is None else self.spans.paused():
            local = self._executor.evaluate(self.microbatches, batch)
            return self._mean_loss(local).wait()

    def memory(self) -> dict[str, int]:
        """Return bytes by category: parameters, gradients, optimizer_state, buckets and activations (peak so far) on
        the device; host: optimizer state in host memory."""
        return {**self._optimizer.memory()._asdict(), "activations": self._executor.most_active_bytes}

    def not_finite(self) -> list[NotFinite]:
        """Return the non-finite values that this rank's tasks passed on in the last `train_batch`.

        The least over all ranks is where they began. Waits for the device.
        """
        return self._executor.not_finite()

    def traffic(self) -> list[Traffic]:
        """Return what this rank sent in the last `train_batch`, by axis of the grid and by operation."""
        return self._meter.read()

    def state_tensors(self) -> dict[str, LocalShard]:
        """Return this rank's shards of the tensors in a checkpoint, under names that are global over the job.

        To load a checkpoint, write into them and call `state_loaded`.
        """
        return self._optimizer.state_tensors()

    def state_loaded(self) -> None:
        """Continue from the values that were written into `state_tensors`."""
        self._optimizer.state_loaded()

    def progress(self) -> dict[str, int | float]:
        """Return the plain numbers that a checkpoint keeps beside its tensors, the same on every rank."""
        return {"batches": self.batches, **self._optimizer.progress()}

    def load_progress(self, progress: Mapping[str, int | float]) -> None:
        """Continue from the numbers that `progress` returned."""
        optimizer_progress = dict(progress)
        self.batches = int(optimizer_progress.pop("batches"))
        self._optimizer.load_progress(optimizer_progress)

    def _run_pipeline(self, inputs: Inputs | None, targets: torch.Tensor | None) -> _Loss:
        """Run forward and backward of the batch; the all-reduce of the loss is still under way on return."""
        self._check_rows(inputs, targets)
        start = self._timeline.now()
        self._optimizer.zero()
        self._timeline.span(SpanKind.OPTIMIZER, start, self._timeline.now())
        scale = self._optimizer.loss_scale / (self.microbatches * self.grid.data)
        batch = self._batch(inputs, targets)
        local = self._executor.train(self._new_schedule(), batch, loss_scale=scale)
        # A stage that is done early reduces and updates while the others still run backwards. With loss scaling the
        # optimizer tests all gradients itself.
        return self._mean_loss(local, None if self._optimizer.may_skip else self._executor.nan_flag())

    def _batch(self, inputs: Inputs | None, targets: torch.Tensor | None) -> Batch:
        return Batch(inputs, targets, step=self.batches, samples=self.shard(self.batches), device=self.device)

    def _mean_loss(self, local: torch.Tensor | None, nan_flag: torch.Tensor | None = None) -> _Loss:
        # The ranks of a stage have the same loss, which counts once.
        counts = self.coordinates.row == self.coordinates.col == 0
        mean = local / (self.microbatches * self.grid.data) if local is not None and counts else None
        if nan_flag is not None:
            mean = nan_flag if mean is None else mean + nan_flag
        return _Loss(mean, self._collectives, self._world, self.spans, self.device)

    def _new_schedule(self) -> StageSchedule:
        return make_schedule(
            self._schedule, stage=self.coordinates.inter, stages=self.grid.inter, microbatches=self.microbatches
        )

    def _check_rows(self, inputs: Inputs | None, targets: torch.Tensor | None) -> None:
        rows = self.batch_size // self.grid.data
        needed: dict[str, tuple[bool, Inputs | None]] = {
            "inputs": (self.is_first_stage, inputs),
            "targets": (self.is_last_stage, targets),
        }
        for name, (needs, value) in needed.items():
            tensors = (value,) if value is None or isinstance(value, torch.Tensor) else value
            for tensor in tensors:
                if needs and (tensor is None or tensor.shape[0] != rows):
                    actual = "None" if tensor is None else f"{tensor.shape[0]} rows"
                    raise ConfigError(
                        f"rank {self.rank} needs {name} of {rows} rows (batch_size / G_data), got {actual}"
                    )


def _check_connections(grid: ProcessGrid, transport: Transport | None, collectives: Collectives | None) -> None:
    if grid.inter > 1 and transport is None:
        raise ConfigError(f"G_inter = {grid.inter} needs a transport for the messages between stages")
    if grid.size > 1 and collectives is None:
        raise ConfigError(f"{grid.size} ranks need collectives")


class _Loss:
    """All-reduce of the loss over all ranks, under way."""

    def __init__(
        self,
        local: torch.Tensor | None,
        collectives: Collectives,
        world: CollectiveGroup,
        spans: SpanRecorder | None,
        device: torch.device,
    ) -> None:
        self._value = torch.zeros(1, dtype=torch.float64, device=device)
        if local is not None:
            self._value.copy_(local)
        self._spans = spans if len(world.ranks) > 1 else None
        self._work = collectives.all_reduce(self._value, world)

    def wait(self) -> float:
        start = SpanRecorder.now()
        self._work.wait()
        if self._spans is not None:
            # A single number: the time goes into waiting for ranks that are not done yet.
            self._spans.add(SpanKind.IDLE, start, self._spans.now())
        return DeviceToHostCopy(self._value).wait()[0]
