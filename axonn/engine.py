"""The engine: one `train_batch` that composes pipeline, gradient reduction and optimizer, on every rank of a grid."""

from __future__ import annotations

import torch

from axonn.collectives import Collectives, Group, SerialCollectives
from axonn.config import OptimizerConfig
from axonn.errors import ConfigError, GridError
from axonn.grid import AXES, ProcessGrid
from axonn.inter_layer.accumulation import accumulate_in_place
from axonn.inter_layer.executor import PipelineExecutor
from axonn.inter_layer.stage import ParameterSpec, Stage, parameter_specs, stage_spans
from axonn.models.base import PipelineModel
from axonn.optim.gradients import GradientReducer
from axonn.schedules import ScheduleSpec, StageSchedule, make_schedule
from axonn.trace import SpanKind, SpanRecorder
from axonn.transport import Transport


def microbatches_of(*, batch_size: int, microbatch_size: int, grid: ProcessGrid) -> int:
    """Microbatches per pipeline. Raises `GridError` when the batch does not divide; all sizes count sequences."""
    if batch_size % (grid.data * microbatch_size):
        raise GridError(
            f"batch_size {batch_size} is not a multiple of G_data x microbatch_size = "
            f"{grid.data} x {microbatch_size} = {grid.data * microbatch_size}; change one of the three"
        )
    return batch_size // (grid.data * microbatch_size)


def check_axes(grid: ProcessGrid) -> None:
    """Raise `GridError` when the grid has an axis that the engine does not run yet."""
    if grid.tensor > 1:
        raise GridError(f"the engine runs data x inter-layer grids; set G_row and G_col of {grid} to 1")


class Engine:
    """Trains `model` on one rank of `grid`, in step with the engines of the other ranks.

    Every rank makes one with the same arguments. `transport` is needed when G_inter > 1, `collectives` when there is
    more than one rank. Raises `GridError` or `ConfigError` when the configuration does not fit.
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
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        seed: int = 0,
        spans: SpanRecorder | None = None,
    ) -> None:
        check_axes(grid)
        self.device = torch.device("cpu") if device is None else device
        if self.device.type != "cpu":
            raise ConfigError(f"the engine runs on 'cpu'; device '{self.device}' is not supported yet")
        if grid.inter > 1 and transport is None:
            raise ConfigError(f"G_inter = {grid.inter} needs a transport for the messages between stages")
        if grid.size > 1 and collectives is None:
            raise ConfigError(f"{grid.size} ranks need collectives")
        self.grid = grid
        self.rank = rank
        self.spans = spans
        self.here = grid.coordinates(rank)
        self.batch_size = batch_size
        self.microbatches = microbatches_of(batch_size=batch_size, microbatch_size=microbatch_size, grid=grid)
        self._schedule = schedule or ScheduleSpec()
        self._new_schedule()  # An unknown schedule is an error now rather than in the first batch.
        self._collectives = collectives or SerialCollectives(grid, rank)
        self._world = self._collectives.axis_group(AXES)
        self.spans_of_stages = stage_spans(model, grid.inter)
        self.stage = Stage(model, self.spans_of_stages[self.here.inter], seed=seed, dtype=dtype, device=self.device)
        accumulate_in_place(self.stage)
        self.specs: list[ParameterSpec] = parameter_specs(model, self.stage, self.spans_of_stages)
        if transport is not None:
            transport.spans = spans
        self._executor = PipelineExecutor(
            model=model,
            stage=self.stage,
            grid=grid,
            rank=rank,
            transport=transport if grid.inter > 1 else None,
            microbatch_size=microbatch_size,
            dtype=dtype,
            device=self.device,
            spans=spans,
        )
        self._reducer = GradientReducer(self.specs, grid=grid, rank=rank, collectives=self._collectives, spans=spans)
        o = optimizer or OptimizerConfig()
        self._optimizer = torch.optim.AdamW(
            [spec.parameter for spec in self.specs],
            lr=o.lr,
            betas=o.betas,
            eps=o.eps,
            weight_decay=o.weight_decay,
            fused=True,
        )

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank needs the inputs of a batch."""
        return self.here.inter == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank needs the targets of a batch."""
        return self.here.inter == self.grid.inter - 1

    @property
    def held_microbatches(self) -> int:
        """Microbatches whose activations or gradients this rank still holds; zero between batches."""
        return self._executor.held

    def shard(self, step: int) -> range:
        """Global numbers of the samples that this rank's pipeline computes in batch number `step`."""
        rows = self.batch_size // self.grid.data
        first = step * self.batch_size + self.here.data * rows
        return range(first, first + rows)

    def train_batch(self, inputs: torch.Tensor | None, targets: torch.Tensor | None) -> float:
        """One optimizer step on this rank's shard of a batch; returns the mean loss of the whole batch on every rank.

        `inputs` and `targets` are [batch_size / G_data, ...]; inputs may be None except on the first stage, targets
        except on the last.
        """
        loss = self._start_batch(inputs, targets)
        start = SpanRecorder.now()
        self._optimizer.step()
        if self.spans is not None:
            self.spans.add(SpanKind.OPTIMIZER, start, self.spans.now())
        value = loss.wait()
        if self.spans is not None:
            self.spans.step += 1
        return value

    def compute_gradients(self, inputs: torch.Tensor | None, targets: torch.Tensor | None) -> float:
        """As `train_batch`, without the optimizer: each parameter's `.grad` is that of the mean loss of the batch."""
        return self._start_batch(inputs, targets).wait()

    def _start_batch(self, inputs: torch.Tensor | None, targets: torch.Tensor | None) -> _Loss:
        """Pipeline and gradient reduction; the loss is still on its way to the other ranks."""
        self._check_rows(inputs, targets)
        self._reducer.zero()
        scale = 1.0 / (self.microbatches * self.grid.data)
        local = self._executor.train(self._new_schedule(), inputs, targets, loss_scale=scale)
        # A stage that is done early reduces and updates while the others still run backwards.
        loss = _Loss(local, self._collectives, self._world, self.spans)
        self._reducer.reduce()
        return loss

    def evaluate_batch(self, inputs: torch.Tensor | None, targets: torch.Tensor | None) -> float:
        """Mean loss of a batch on every rank, without changing anything."""
        self._check_rows(inputs, targets)
        local = self._executor.evaluate(self.microbatches, inputs, targets)
        scale = 1.0 / (self.microbatches * self.grid.data)
        return _Loss(None if local is None else local * scale, self._collectives, self._world, self.spans).wait()

    def _new_schedule(self) -> StageSchedule:
        return make_schedule(
            self._schedule, stage=self.here.inter, stages=self.grid.inter, microbatches=self.microbatches
        )

    def _check_rows(self, inputs: torch.Tensor | None, targets: torch.Tensor | None) -> None:
        rows = self.batch_size // self.grid.data
        needed = {"inputs": (self.is_first_stage, inputs), "targets": (self.is_last_stage, targets)}
        for name, (used, tensor) in needed.items():
            if used and (tensor is None or tensor.shape[0] != rows):
                found = "None" if tensor is None else f"{tensor.shape[0]} rows"
                raise ConfigError(f"rank {self.rank} needs {name} of {rows} rows (batch_size / G_data), got {found}")


class _Loss:
    """The sum over all ranks of their part of the loss, under way."""

    def __init__(
        self, local: torch.Tensor | None, collectives: Collectives, world: Group, spans: SpanRecorder | None
    ) -> None:
        self._value = torch.zeros(1, dtype=torch.float64)
        if local is not None:
            self._value[0] = local
        self._spans = spans if len(world.ranks) > 1 else None
        self._work = collectives.all_reduce(self._value, world)

    def wait(self) -> float:
        start = SpanRecorder.now()
        self._work.wait()
        if self._spans is not None:
            self._spans.add(SpanKind.ALL_REDUCE, start, self._spans.now())
        return float(self._value)
